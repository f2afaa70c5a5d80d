"""Measure training steps while a checkpoint is written in the background.

Run: python -m benchmarks.checkpoint   (about one minute)

One rank trains a Qwen3 with random weights in fp32 on all cores. The process that writes the checkpoint is
throttled, so that it writes during several steps. Rounds of steps without and with a save in progress
alternate. The last line is JSON:

step_s, step_s_while_writing   median seconds of a step without a save, and while one is written
rise           step_s_while_writing / step_s - 1; the limit is 0.2
stall_s        median seconds that training waits at the start and at the end of a save in the background
at_once_s      seconds of a save that is not in the background, on the disk without the throttle
write_s        median seconds from the start of a save in the background to the complete checkpoint
bytes          size of the checkpoint
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from transformers.utils import logging

from benchmarks import throttled_write
from benchmarks.step_work import Step, make_model, realistic_shape
from megatron_gmpo.batch.assembly import make_train_batch
from megatron_gmpo.batch.exchange import Exchange
from megatron_gmpo.batch.index import StepIndex
from megatron_gmpo.command_line import Options, one_line_errors, parse_options
from megatron_gmpo.config import Config, Positive
from megatron_gmpo.distributed import Nodes
from megatron_gmpo.losses.advantages import group_advantages
from megatron_gmpo.losses.objective import make_objective
from megatron_gmpo.models.description import describe_model
from megatron_gmpo.platform import prepare_megatron, start_process_group
from megatron_gmpo.policy.parallel import start_model_parallel
from megatron_gmpo.policy.policy import Policy
from megatron_gmpo.weights import write_files

LIMIT = 0.2
CPU = torch.device("cpu")


class Checkpoint(Options):
    """Measure training steps while a checkpoint is written in the background."""

    layers: Positive = 4
    """Decoder layers."""
    hidden: Positive = 512
    """Width of the residual stream; the MLP has three times this width."""
    megabytes_per_second: Positive = 40
    """Speed of the disk."""
    rounds: Positive = 3
    """Saves in the background."""
    steps: Positive = 4
    """Steps without a save in a round."""


def make_step(options: Checkpoint, folder: Path) -> tuple[Policy, Callable[[], float]]:
    """Return a policy and a function that trains one step and returns its seconds."""
    model = folder / "model"
    make_model(model, options.layers, options.hidden)
    cfg = Config.model_validate({"model": {"path": str(model), "dtype": "fp32"}, "optimizer": {"lr": 1e-6}})
    groups = start_model_parallel(cfg.parallel, cfg.seed, cfg.distributed_timeout_s)
    policy = Policy(cfg, describe_model(cfg, 1, CPU), groups, CPU)
    objective = make_objective(cfg.algorithm, is_moe=False, max_new_tokens=768)
    exchange = Exchange(Nodes("here"), policy.replica, "", cfg.distributed_timeout_s)
    given = realistic_shape(Step(shrink=4)).given
    assert given

    def step() -> float:
        began = time.perf_counter()
        index = StepIndex.gather(dict(enumerate(given)), len(given))
        advantages = group_advantages(index, objective.advantage)
        plan = policy.plan(index, advantages, objective)
        batch = make_train_batch(dict(enumerate(given)), index, advantages, plan, exchange, 0)
        policy.prepare(batch)
        for minibatch in policy.minibatches(batch):
            policy.train_step(minibatch, objective)
        return time.perf_counter() - began

    return policy, step


def measure(options: Checkpoint, folder: Path) -> dict[str, float]:
    policy, step = make_step(options, folder)
    checkpoints, number = folder / "checkpoints", count(1)
    state: dict[str, Any] = {"config": {"train": {}}}
    step()
    plain: list[float] = []
    writing: list[float] = []
    stalls: list[float] = []
    writes: list[float] = []
    for _ in range(options.rounds):
        plain += [step() for _ in range(options.steps)]
        began = time.perf_counter()
        save = policy.start_save(checkpoints, next(number), state, 1, background=True)
        stall = time.perf_counter() - began
        while not save.ended(wait=False):
            writing.append(step())
        ended = time.perf_counter()
        save.finish()
        stalls.append(stall + time.perf_counter() - ended)
        writes.append(time.perf_counter() - began)
    began = time.perf_counter()
    policy.start_save(checkpoints, next(number), state, 1).finish()
    at_once = time.perf_counter() - began
    newest = max(checkpoints.glob("iter_*"))  # a thread may still remove the one before
    return {
        "step_s": median(plain),
        "step_s_while_writing": median(writing),
        "rise": median(writing) / median(plain) - 1,
        "stall_s": median(stalls),
        "at_once_s": at_once,
        "write_s": median(writes),
        "bytes": sum(file.stat().st_size for file in newest.rglob("*.distcp")),
    }


def main(options: Checkpoint) -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    os.environ["BYTES_PER_SECOND"] = str(1e6 * options.megabytes_per_second)
    prepare_megatron(CPU)
    start_process_group(CPU, 60)
    slow = patch.object(write_files, "__file__", throttled_write.__file__)
    with tempfile.TemporaryDirectory() as folder, slow:
        found = measure(options, Path(folder))
    result = {
        "benchmark": "checkpoint",
        **{name: float(f"{value:.3g}") for name, value in found.items()},
        "within_limit": found["rise"] < LIMIT,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    with one_line_errors():
        main(parse_options(Checkpoint, sys.argv[1:], "python -m benchmarks.checkpoint"))
