"""Train a tiny model with GMPO on the CPU.

``addition``: a tiny Qwen3-MoE, warmed up by supervised learning, learns addition in two processes with expert
parallelism. ``household``: a tiny Qwen3, warmed up on a few expert episodes, learns tasks of several turns.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

from ..command_line import Options, parse_options
from ..errors import InputError, RunError
from .plot_metrics import plot_runs


class Demo(Options):
    """Run a demo. The last line of the output is one JSON object."""

    task: Literal["addition", "household"] = "addition"
    """Task that the model learns: two-digit ``addition`` (examples/moe/tiny_cpu.toml), or ``household``,
    tasks in a text game (examples/agents/household_tiny_cpu.toml)."""
    prepare_only: bool = False
    """Make only the model and the data that the config reads."""


def main(argv: list[str]) -> None:
    options = parse_options(Demo, argv, "megatron-gmpo demo")

    from ..testing.demo import TASKS

    task = TASKS[options.task]
    if not Path(task.config).is_file():
        raise InputError(
            f"config file {task.config} does not exist: run the demo from the root of the repository"
        )
    start = time.perf_counter()
    if task.done.is_file():
        print(f"model and data: {task.done.parent}, from an earlier run", file=sys.stderr)
    else:
        task.make()
    if options.prepare_only:
        return
    run_dir = Path("runs") / time.strftime("demo-%Y%m%d-%H%M%S")
    _train(task.config, *task.options, "--run_dir", str(run_dir))
    figures = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    print(plot_runs((run_dir,)))
    name = task.metric.rpartition("/")[2]
    result = {
        f"{name}_before": figures[0][task.metric],
        f"{name}_after": figures[-1][task.metric],
        "seconds": round(time.perf_counter() - start, 1),
        "run_dir": str(run_dir),
    }
    print(json.dumps(result))


def _train(*arguments: str) -> None:
    """Train in two processes, and show their output."""
    launch = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "megatron_gmpo.train",
    ]
    code = subprocess.run([sys.executable, *launch, *arguments]).returncode
    if code:
        raise RunError(f"training ended with exit code {code}: its output is above")
