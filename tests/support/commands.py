"""Start the command lines as a user does, in separate processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from .forks import ROOT, TORCHRUN, Command, Fork

CONFIG = "examples/moe/tiny_cpu.toml"
_TIMEOUT_S = 240


def command_line(module: str, *argv: object, ranks: int | None = None) -> list[str]:
    """Return ``python -m module argv...`` for a new interpreter, under torchrun if ``ranks`` are given."""
    module, arguments = _under_torchrun(module, argv, ranks)
    return [sys.executable, "-m", module, *arguments]


def start_module(module: str, *argv: object, ranks: int | None = None, **env: str) -> Fork:
    """Start the ``command_line`` in a fork, with ``env`` added to the environment."""
    module, arguments = _under_torchrun(module, argv, ranks)
    return Fork(Command(module, arguments, _environment(env), ranks or 0))


def run_module(
    module: str, *argv: object, ranks: int | None = None, fresh: bool = False, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run the ``command_line`` until it ends, in a fork or, if ``fresh``, in a new interpreter."""
    if fresh:
        return subprocess.run(
            command_line(module, *argv, ranks=ranks),
            cwd=ROOT,
            env=_environment(env),
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
        )
    with start_module(module, *argv, ranks=ranks, **env) as process:
        stdout, stderr = process.communicate(_TIMEOUT_S)
    return subprocess.CompletedProcess([module, *map(str, argv)], process.wait(), stdout, stderr)


def _under_torchrun(module: str, argv: tuple[object, ...], ranks: int | None) -> tuple[str, list[str]]:
    arguments = list(map(str, argv))
    if not ranks:
        return module, arguments
    handled = "SIGTERM,SIGINT,SIGUSR1"
    launch = ["--standalone", "--signals-to-handle", handled, "--nproc-per-node", str(ranks), "-m", module]
    return TORCHRUN, [*launch, *arguments]


def _environment(added: dict[str, str]) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"} | added


def options(**values: object) -> list[str]:
    """Return ``["--rollout.save_path", p]`` for ``options(rollout__save_path=p)``."""
    return [part for key, value in values.items() for part in (f"--{key.replace('__', '.')}", str(value))]


def json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def last_of_report(stderr: str) -> str:
    """Return the last entry of torchrun's report about failed ranks, after which nothing follows."""
    *_, entry, border = stderr.splitlines()
    assert set(border) == {"="}, stderr
    return entry.removeprefix("  traceback : ")


def error_lines(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if line.startswith("error:")]
