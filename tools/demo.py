"""The demo: a tiny Qwen3-MoE, warmed up by supervised learning, learns addition by GMPO in two processes with expert parallelism.

python -m tools.demo
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import tyro
from rich.console import Console

from tools import arithmetic, plot_metrics
from tools.make_tiny_model import make_tiny_model
from tools.warm_up import warm_up

CONFIG = "examples/moe/tiny_cpu.toml"
TINY = Path("runs/tiny")  # where CONFIG looks for model and problems

console = Console(stderr=True)


def make_model() -> None:
    """The warmed-up model and the problems, unless an earlier demo left them."""
    done = TINY / "warm_up.json"
    if done.is_file():
        console.print(f"model and problems: {TINY}, from an earlier run")
        return
    arithmetic.main(TINY)
    make_tiny_model(TINY / "model")
    train, _ = arithmetic.addition_problems()
    loss = warm_up(TINY / "model", train)
    done.write_text(json.dumps({"loss": loss}))


def train(run_dir: Path) -> None:
    """GMPO on two ranks that share the experts; its output is shown as it comes."""
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "megatron_gmpo.train",
    ]
    options = ["--parallel.expert_model_parallel_size", "2", "--run_dir", str(run_dir)]
    subprocess.run([*launch, CONFIG, *options], check=True)


def main(prepare_only: bool = False) -> None:
    """Run the demo; the last line of the output is one JSON object.

    Args:
        prepare_only: Only make the model and the problems that examples/moe/tiny_cpu.toml reads.
    """
    start = time.perf_counter()
    make_model()
    if prepare_only:
        return
    run_dir = Path("runs") / time.strftime("demo-%Y%m%d-%H%M%S")
    train(run_dir)
    figures = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    plot_metrics.main((run_dir,))
    result = {
        "pass@1_before": figures[0]["eval/heldout/pass@1"],
        "pass@1_after": figures[-1]["eval/heldout/pass@1"],
        "seconds": round(time.perf_counter() - start, 1),
        "run_dir": str(run_dir),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    tyro.cli(main, use_underscores=True)
