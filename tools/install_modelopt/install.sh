#!/usr/bin/env bash
# Create a separate environment for NVIDIA's ModelOpt, because its import patches torch and transformers.
# usage: install.sh VENV
set -euo pipefail

venv=${1:?"usage: install.sh VENV"}
here=$(cd "$(dirname "$0")" && pwd)
[ -x "$venv/bin/python" ] || "${PYTHON:-python3.11}" -m venv "$venv"
"$venv/bin/python" -m pip install --disable-pip-version-check --no-input --no-cache-dir -q \
  -c "$here/constraints.txt" nvidia-modelopt requests torch transformers accelerate
echo "ModelOpt in $venv"
