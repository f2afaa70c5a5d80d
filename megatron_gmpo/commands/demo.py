"""Train a small model with GMPO on the CPU.

``addition``: a tiny Qwen3-MoE, warmed up by supervised learning, learns addition in two processes with expert
parallelism. ``household``: a tiny Qwen3, warmed up on a few expert episodes, learns tasks of several turns.
``word_problems``: SmolLM2-135M-Instruct, a real language model, learns to answer word problems.
``geometry``: a tiny Qwen3-VL learns geometry problems whose numbers stand in pictures.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Literal

from ..command_line import Options, parse_options
from ..errors import InputError, RunError
from .plot_metrics import plot_runs


class Demo(Options):
    """Run a demo. The last line of the output is one JSON object."""

    task: Literal["addition", "household", "geometry", "word_problems"] = "addition"
    """Task that the model learns: two-digit ``addition`` (examples/moe/tiny_cpu.toml); ``household``, tasks
    in a text game (examples/agents/household_tiny_cpu.toml); ``geometry``, problems with pictures
    (examples/vision/geometry_tiny_cpu.toml); or ``word_problems``, with a real model
    (examples/moe/smollm2_135m_cpu.toml), which ``make real`` installs first."""
    prepare_only: bool = False
    """Make only the model and the data that the config reads."""


def main(argv: list[str]) -> None:
    options = parse_options(Demo, argv, "megatron-gmpo demo")

    from ..testing.demo import TASKS
    from ..view.folder import named_runs
    from ..view.page import export

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
    page = run_dir / "page.html"
    page.write_text(export(named_runs((run_dir,))), encoding="utf-8")
    print(plot_runs((run_dir,)))
    print(f"{page}: open it in a browser; megatron-gmpo view {run_dir} serves it")
    benchmark, _, metric = task.metric.rpartition("/")
    ends = [f"{benchmark}/ci_{end}@{metric.removeprefix('pass@')}" for end in ("low", "high")]
    result: dict[str, Any] = {}
    for when, line in (("before", figures[0]), ("after", figures[-1])):
        result[f"{task.name}_{when}"] = line[task.metric]
        result[f"{task.name}_{when}_interval"] = [round(line[end], 4) for end in ends]
    result |= {name: figures[-1][metric] for name, metric in task.at_end.items()}
    result |= {"seconds": round(time.perf_counter() - start, 1), "run_dir": str(run_dir)}
    print(json.dumps(result))


def _train(*arguments: str) -> None:
    """Train in two processes, and show their output."""
    launch = [
        "-m",
        "megatron_gmpo.supervision.torchrun",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "megatron_gmpo.train",
    ]
    code = subprocess.run([sys.executable, *launch, *arguments]).returncode
    if code:
        raise RunError(f"training ended with exit code {code}: its output is above")
