"""Train a tiny MoE model with GMPO on the CPU.

A tiny Qwen3-MoE, warmed up by supervised learning, learns addition in two processes with expert parallelism.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

from ..command_line import Options, parse_options
from ..errors import InputError, RunError
from .plot_metrics import plot_runs


class Demo(Options):
    """Run the demo. The last line of the output is one JSON object."""

    prepare_only: bool = False
    """Make only the model and the problems that examples/moe/tiny_cpu.toml reads."""


def main(argv: list[str]) -> None:
    options = parse_options(Demo, argv, "megatron-gmpo demo")

    from ..testing.demo import CONFIG, DONE, TINY, make_demo_model

    if not Path(CONFIG).is_file():
        raise InputError(f"config file {CONFIG} does not exist: run the demo from the root of the repository")
    start = time.perf_counter()
    if DONE.is_file():
        print(f"model and problems: {TINY}, from an earlier run", file=sys.stderr)
    else:
        make_demo_model()
    if options.prepare_only:
        return
    run_dir = Path("runs") / time.strftime("demo-%Y%m%d-%H%M%S")
    _train(CONFIG, run_dir)
    figures = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    print(plot_runs((run_dir,)))
    result = {
        "pass@1_before": figures[0]["eval/heldout/pass@1"],
        "pass@1_after": figures[-1]["eval/heldout/pass@1"],
        "seconds": round(time.perf_counter() - start, 1),
        "run_dir": str(run_dir),
    }
    print(json.dumps(result))


def _train(config: str, run_dir: Path) -> None:
    """Train in two processes with expert parallelism, and show their output."""
    launch = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "megatron_gmpo.train",
    ]
    options = ["--parallel.expert_model_parallel_size", "2", "--run_dir", str(run_dir)]
    code = subprocess.run([sys.executable, *launch, config, *options]).returncode
    if code:
        raise RunError(f"training ended with exit code {code}: its output is above")
