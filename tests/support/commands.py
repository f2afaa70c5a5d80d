"""The command lines as a user starts them, in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
CONFIG = "examples/moe/tiny_cpu.toml"
_TIMEOUT_S = 240


def command_line(module: str, *argv: object, ranks: int | None = None) -> list[str]:
    """``python -m module argv...``, under torchrun when ``ranks`` are given."""
    launch = ["-m", module]
    if ranks:
        handled = "SIGTERM,SIGINT,SIGUSR1"
        launch = [
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--signals-to-handle",
            handled,
            "--nproc-per-node",
            str(ranks),
            *launch,
        ]
    return [sys.executable, *launch, *map(str, argv)]


def run_module(
    module: str, *argv: object, ranks: int | None = None, **env: str
) -> subprocess.CompletedProcess[str]:
    """Runs the ``command_line`` to its end, with ``env`` added to the environment."""
    return subprocess.run(
        command_line(module, *argv, ranks=ranks),
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | env,
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
    )


def options(**values: object) -> list[str]:
    """``options(rollout__save_path=p)`` is ``["--rollout.save_path", p]``."""
    return [part for key, value in values.items() for part in (f"--{key.replace('__', '.')}", str(value))]


def json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def error_lines(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if line.startswith("error:")]
