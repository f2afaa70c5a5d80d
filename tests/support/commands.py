"""Start the command lines as a user does, in separate processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_gmpo.testing.arithmetic import write_addition_problems

from .forks import ROOT, TORCHRUN, Command, Fork

OUR_TORCHRUN = "megatron_gmpo.supervision.torchrun"
CONFIG = "examples/moe/tiny_cpu.toml"
_TIMEOUT_S = 600


def command_line(module: str, *argv: object, ranks: int | None = None, launcher: str = TORCHRUN) -> list[str]:
    """Return ``python -m module argv...`` for a new interpreter, under ``launcher`` if ``ranks`` is set."""
    module, arguments = _under_torchrun(module, argv, ranks, launcher)
    return [sys.executable, "-m", module, *arguments]


def start_module(
    module: str, *argv: object, ranks: int | None = None, launcher: str = TORCHRUN, **env: str
) -> Fork:
    """Start the ``command_line`` in a fork, with ``env`` added to the environment."""
    module, arguments = _under_torchrun(module, argv, ranks, launcher)
    return Fork(Command(module, arguments, _environment(env), ranks or 0))


def run_module(
    module: str,
    *argv: object,
    ranks: int | None = None,
    launcher: str = TORCHRUN,
    fresh: bool = False,
    **env: str,
) -> subprocess.CompletedProcess[str]:
    """Run the ``command_line`` until it ends, in a fork or, if ``fresh``, in a new interpreter."""
    if fresh:
        return subprocess.run(
            command_line(module, *argv, ranks=ranks, launcher=launcher),
            cwd=ROOT,
            env=_environment(env),
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
        )
    with start_module(module, *argv, ranks=ranks, launcher=launcher, **env) as process:
        stdout, stderr = process.communicate(_TIMEOUT_S)
    return subprocess.CompletedProcess([module, *map(str, argv)], process.wait(), stdout, stderr)


def _under_torchrun(
    module: str, argv: tuple[object, ...], ranks: int | None, launcher: str
) -> tuple[str, list[str]]:
    arguments = list(map(str, argv))
    if not ranks:
        return module, arguments
    handled = "SIGTERM,SIGINT,SIGUSR1"
    launch = ["--standalone", "--signals-to-handle", handled, "--nproc-per-node", str(ranks), "-m", module]
    return launcher, [*launch, *arguments]


def _environment(added: dict[str, str]) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"} | added


def options(**values: object) -> list[str]:
    """Return ``["--rollout.save_path", p]`` for ``options(rollout__save_path=p)``."""
    return [part for key, value in values.items() for part in (f"--{key.replace('__', '.')}", str(value))]


def tiny_run(model: Path, folder: Path, **changes: object) -> list[str]:
    """Return the arguments of a small run of the example config: ``model``, 16 samples a step, no evaluation.

    Writes its problems into ``folder``.

    Args:
        changes: further options, as for ``options``.
    """
    write_addition_problems(folder)
    chosen: dict[str, object] = {
        "model__path": model,
        "data__path": folder / "train.jsonl",
        "data__max_prompts": 40,
        "eval__sets": "{}",
        "reward__name": "tests.support.rewards:share_of_digits",
        "rollout__prompts_per_step": 4,
        "rollout__samples_per_prompt": 4,
        "log__tensorboard": "false",
    }
    return [CONFIG, *options(**chosen | changes)]


def wait_until(holds: Callable[[], object], process: Fork, what: str) -> None:
    """Wait for an effect of a running process on its files; fail when the process ends before."""
    deadline = time.monotonic() + _TIMEOUT_S
    while not holds():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, f"{what} did not happen in time"
        time.sleep(0.05)


def outcome(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "outcome.json").read_text())


def json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def last_of_report(stderr: str) -> str:
    """Return the last entry of torchrun's report about failed ranks, after which nothing follows."""
    *_, entry, border = stderr.splitlines()
    assert set(border) == {"="}, stderr
    return entry.removeprefix("  traceback : ")


def error_lines(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if line.startswith("error:")]
