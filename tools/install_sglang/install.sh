#!/usr/bin/env bash
# Create a separate environment for the SGLang servers, because SGLang pins versions of torch and transformers
# that differ from the trainer's.
# usage: install.sh VENV [cpu|gpu]      default: gpu if nvidia-smi finds a GPU, else cpu
set -euo pipefail

venv=${1:?"usage: install.sh VENV [cpu|gpu]"}
here=$(cd "$(dirname "$0")" && pwd)
version=0.5.23
kind=${2:-$(nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)}

[ -x "$venv/bin/python" ] || "${PYTHON:-python3.11}" -m venv "$venv"
pip() { "$venv/bin/python" -m pip install --disable-pip-version-check --no-input --no-cache-dir -q "$@"; }

case $kind in
gpu)
  pip "sglang[all]==$version"
  ;;
cpu)
  # the file pins every dependency, except some that only CUDA needs
  pip --no-deps -r "$here/constraints_cpu.txt"
  site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
  mkdir -p "$site/sgl_kernel"
  cp "$here/sgl_kernel/__init__.py" "$site/sgl_kernel/"
  cp "$here/sglang_cpu_shim.py" "$site/"
  echo 'import sglang_cpu_shim' >"$site/sglang_cpu_shim.pth"
  ;;
*)
  echo "error: kind = '$kind': choose cpu or gpu" >&2
  exit 2
  ;;
esac
echo "SGLang $version for $kind in $venv"
