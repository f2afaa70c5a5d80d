"""Measure the trainer's own share of a step of the demo.

The share is the time outside rollout, log probabilities, training and weight sync: advantages, packing of
the batch, transcripts and metrics. The target is at most 5 %. The first steps do not count because they
load and compile code. The last step does not count because it evaluates.

Run: python -m benchmarks.step_overhead   (under a minute; the first run also makes the demo's model, in
                                          about another minute)
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from megatron_gmpo.testing.demo import TASKS

DEMO = TASKS["addition"]
STEPS, WARM_UP_STEPS = 40, 5
WORK = ("rollout", "logprobs", "train", "weight_sync")
LIMIT = 0.05


def time_of_steps(run_dir: Path) -> list[dict[str, float]]:
    """Run the demo for ``STEPS`` steps; return ``time/*`` of each counted step, in seconds by phase."""
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
    options = {
        "run_dir": run_dir,
        "parallel.expert_model_parallel_size": 2,
        "train.num_steps": STEPS,
        "eval.before": "false",
        "eval.interval": 0,
        "checkpoint.save_final": "false",
    }
    subprocess.run(
        [*launch, DEMO.config, *(str(a) for k, v in options.items() for a in (f"--{k}", v))],
        check=True,
        timeout=600,
    )
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [
        {name.removeprefix("time/"): value for name, value in line.items() if name.startswith("time/")}
        for line in lines[WARM_UP_STEPS:-1]
    ]


def main() -> None:
    if not DEMO.done.is_file():
        DEMO.make()
    with tempfile.TemporaryDirectory() as folder:
        steps = time_of_steps(Path(folder) / "run")
    mean = {name: sum(step[name] for step in steps) / len(steps) for name in steps[0]}
    overhead = 1 - sum(mean[name] for name in WORK) / mean["step"]
    for name in (*WORK, "other", "step"):
        print(f"{name:12} {mean[name] * 1000:8.1f} ms {mean[name] / mean['step']:7.1%}")
    result = {
        "benchmark": "step_overhead",
        "overhead": round(overhead, 4),
        "within_limit": overhead <= LIMIT,
        "seconds_per_step": round(mean["step"], 4),
        "steps": len(steps),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
