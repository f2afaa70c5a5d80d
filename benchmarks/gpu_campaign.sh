#!/usr/bin/env bash
# Measure everything that needs a GPU: benchmarks/gpu_campaign.sh OUT [--dry-run]; see gpu_campaign.py.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-$(test -x .venv/bin/python && echo .venv/bin/python || echo python3)}
exec "$python" -m benchmarks.gpu_campaign "$@"
