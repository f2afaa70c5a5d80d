#!/usr/bin/env bash
# Build the folder that a GPU machine without network needs; see gpu_bundle.py.
# benchmarks/gpu_bundle.sh --transformer-engine DIR [OUT] [--dry-run]
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-$(test -x .venv/bin/python && echo .venv/bin/python || echo python3)}
exec "$python" -m benchmarks.gpu_bundle "$@"
