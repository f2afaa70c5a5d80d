"""Measure a training step against TRL's GMPOTrainer, and its FLOPs against those that it needs.

Run: python -m benchmarks.step   (about five minutes)

Both sides take steps in this process with one thread, on the same model: a Qwen3 with random weights in fp32.
A step has 8 responses to each prompt and 4 updates. All times are medians over the measured steps of CPU
seconds of the process, which equal the time of the clock on a quiet machine. There are two shapes:

equal      16 prompts of 16 tokens. Both sides sample responses of at most 64 tokens (mean 61) and train on
           them. They take turns, step by step. ``ratio_equal`` is the median of our time of a step, with the
           rollout, over that of TRL's step before it; ``ratio_equal_training`` leaves the rollout out.
realistic  prompts of 100 to 400 tokens; responses with lognormal lengths, median 150, sigma 0.9, up to 768;
           all responses to 40 % of the prompts have the same reward. Tokens and rewards are random. Both
           sides train on the same given responses, so ``ratio_realistic`` has no rollout.

The table of the realistic shape has these rows:

plain      this project without savings: every token is computed, every minibatch has a pass for its old log
           probabilities, and log probabilities come from the logits of all response tokens of a microbatch
1          sequences without gradient are not computed
1+2        the first minibatch takes its old log probabilities from its training pass
1+2+3      log probabilities come from hidden states, without logits: the product as it is

FLOPs are those of matrix products, from torch's counter. It has no formula for attention on the CPU; the one
here counts the lower triangle of the scores, because the kernel skips blocks above the diagonal. ``needed``
is a lower bound: for each sequence with gradient, three forward passes of its tokens except the last, and a
fourth one for the old log probabilities after the first minibatch; attention of each token to those before
it; the output layer only for response tokens; nothing computed again in the backward pass.
``max_difference`` is the largest difference between the product and ``plain`` in the first step: of the loss
of an update, or of the first update's gradient relative to its norm. The target is 1e-5.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, Literal
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoTokenizer
from transformers.utils import logging

from benchmarks.logprobs import reset_peak, resident
from benchmarks.step_work import (
    Shape,
    Step,
    counted_flops,
    equal_shape,
    make_model,
    needed_flops,
    realistic_shape,
    reward_of,
)
from benchmarks.trl_step import Seconds, trl_steps
from megatron_gmpo.batch.assembly import make_train_batch
from megatron_gmpo.batch.columns import TrainBatch
from megatron_gmpo.batch.exchange import Exchange
from megatron_gmpo.batch.index import StepIndex
from megatron_gmpo.batch.samples import Prompt, SampleGroup
from megatron_gmpo.command_line import one_line_errors, parse_options
from megatron_gmpo.config import Config
from megatron_gmpo.distributed import Nodes
from megatron_gmpo.losses.advantages import group_advantages
from megatron_gmpo.losses.objective import make_objective
from megatron_gmpo.metrics.figures import value_of
from megatron_gmpo.models.description import describe_model
from megatron_gmpo.platform import prepare_megatron, start_process_group
from megatron_gmpo.policy import schedule
from megatron_gmpo.policy.parallel import start_model_parallel, stop_model_parallel
from megatron_gmpo.policy.policy import Policy
from megatron_gmpo.rollout.embedded import EmbeddedEngine
from megatron_gmpo.rollout.engine import SamplingParams

CPU = torch.device("cpu")
LIMITS = {"ratio_equal": 1.0, "ratio_realistic": 0.4, "flops_over_needed": 1.05, "max_difference": 1e-5}

Savings = Literal["plain", "1", "1+2", "1+2+3"]
LEVELS: tuple[Savings, ...] = ("plain", "1", "1+2", "1+2+3")


def with_logits(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, vocab_size: int, temperature: float, **_: Any
) -> tuple[Tensor, Tensor]:
    """Compute what ``vocab_parallel_logprobs`` computes, on one rank, from the logits of all tokens."""
    logp = (hidden @ weight[:vocab_size].T / temperature).log_softmax(-1)
    return logp.gather(1, labels[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


class OurSide:
    """Take steps with the product's parts, with some of its savings.

    Args:
        model: Hugging Face folder.
        savings: the row of the table.
        shape: the data of a step.
        options: the options.

    Attributes:
        losses: the loss of every update of the first step.
        gradient: the gradient of the first update.
    """

    def __init__(self, model: Path, savings: Savings, shape: Shape, options: Step) -> None:
        self.cfg = Config.model_validate(
            {
                "model": {"path": str(model), "dtype": "fp32"},
                "algorithm": {"clip_low": 0.4, "clip_high": 0.4},
                "train": {"minibatches_per_step": options.updates},
                "optimizer": {"lr": 1e-6},
            }
        )
        stop_model_parallel()  # the previous row's
        groups = start_model_parallel(self.cfg.parallel, self.cfg.seed, self.cfg.distributed_timeout_s)
        self.policy = Policy(self.cfg, describe_model(self.cfg, 1, CPU), groups, CPU)
        self.objective = make_objective(self.cfg.algorithm, is_moe=False, max_new_tokens=shape.max_new_tokens)
        self.savings, self.shape, self.samples = LEVELS.index(savings), shape, options.samples
        self.exchange = Exchange(Nodes("here"), self.policy.replica, "", self.cfg.distributed_timeout_s)
        self.losses, self.gradient = list[float](), torch.empty(0)
        self.engine = (
            None
            if shape.given
            else EmbeddedEngine(
                str(model),
                AutoTokenizer.from_pretrained(model),
                device=CPU,
                dtype=torch.float32,
                batch_size=len(shape.prompts) * options.samples,
                seed=0,
            )
        )

    def step(self) -> Seconds:
        """Take a step; return its seconds by phase."""
        head = patch.object(schedule, "vocab_parallel_logprobs", with_logits)
        with head if self.savings < 3 else nullcontext():
            times = [time.process_time()]
            groups = self.shape.given or self._sample()
            times.append(time.process_time())
            minibatches = self._prepare(groups)
            times.append(time.process_time())
            for minibatch in minibatches:
                loss = self.policy.train_step(minibatch, self.objective)["loss"]
                if not len(self.gradient):
                    self.gradient = self._gradient()
                self.losses.append(value_of(loss))
            times.append(time.process_time())
        phases = dict(
            zip(
                ("rollout", "logprobs", "train"), (end - start for start, end in pairwise(times)), strict=True
            )
        )
        return {**phases, "step": times[-1] - times[0]}

    def _sample(self) -> list[SampleGroup]:
        assert self.engine
        self.engine.update_weights(self.policy.export_hf(), version=0)
        prompts = [Prompt(str(i), "", input_ids=ids) for i, ids in enumerate(self.shape.prompts)]
        sampling = SamplingParams(n=self.samples, max_new_tokens=self.shape.max_new_tokens)
        groups = [group for _, group in sorted(self.engine.generate(prompts, sampling).items())]
        for group in groups:
            for sample in group.samples:
                sample.reward = reward_of(sample.tokens[sample.response_mask].tolist())
        return groups

    def _prepare(self, groups: list[SampleGroup]) -> list[TrainBatch]:
        index = StepIndex.gather(dict(enumerate(groups)), len(groups))
        advantages = group_advantages(index, self.objective.advantage)
        # without the first saving, sequences with advantage 0 are computed too
        planned_for = advantages if self.savings else torch.ones(len(advantages))
        plan = self.policy.plan(index, planned_for, self.objective)
        batch = make_train_batch(dict(enumerate(groups)), index, advantages, plan, self.exchange, 0)
        if self.savings >= 2:
            self.policy.prepare(batch)
            return self.policy.minibatches(batch)
        self.policy.set_old_logprobs(batch)
        return [batch.minibatch(number) for number in range(len(batch.plan))]

    def _gradient(self) -> Tensor:
        parameters = (p for chunk in self.policy.chunks for p in chunk.parameters())
        return torch.cat([p.main_grad.flatten() for p in parameters])  # pyright: ignore[reportAttributeAccessIssue]


@dataclass(frozen=True)
class Measured:
    """One row of a table: seconds by phase, FLOPs of a step (0: not counted), and peak memory in bytes."""

    name: str
    seconds: Seconds
    flops: int
    memory: int


def extra_memory(work: Callable[[], Any]) -> tuple[Any, int]:
    """Return the result of ``work``, and the peak of resident memory beyond that before it, in bytes."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = resident()
    reset_peak()
    return work(), resident(peak=True) - before


def medians(steps: list[Seconds]) -> Seconds:
    return {phase: median(step[phase] for step in steps) for phase in steps[0]}


def take_trl_steps(
    model: Path, shape: Shape, options: Step, steps: int, after_step: Callable[[], object] = lambda: None
) -> list[Seconds]:
    with tempfile.TemporaryDirectory() as out:
        return trl_steps(
            model,
            Path(out),
            prompts=shape.prompts,
            samples=options.samples,
            updates=options.updates,
            microbatch=options.trl_sequences if shape.given else None,
            steps=steps,
            max_new_tokens=shape.max_new_tokens,
            reward=reward_of,
            given=shape.given,
            after_step=after_step,
        )


def take_our_steps(
    model: Path, savings: Savings, shape: Shape, options: Step, steps: int
) -> tuple[OurSide, list[Seconds]]:
    side = OurSide(model, savings, shape, options)
    return side, [side.step() for _ in range(steps)]


def difference(side: OurSide, plain: OurSide, updates: int) -> float:
    """Return ``max_difference``, see the module docstring."""
    losses = (abs(a - b) for a, b in zip(side.losses[:updates], plain.losses[:updates], strict=True))
    gradient = torch.linalg.vector_norm(side.gradient - plain.gradient) / plain.gradient.norm()
    return max(*losses, float(gradient))


def show(title: str, rows: list[Measured], needed: int) -> None:
    """Print a table of seconds, FLOPs and memory."""
    table = Table(
        "", "rollout", "old logprobs", "training", "step s", "over TRL", "GFLOP", "over needed", "peak MB"
    )
    table.title = title
    for row in rows:
        phases = [f"{row.seconds.get(name, 0):.2f}" for name in ("rollout", "logprobs", "train", "step")]
        flops = [f"{row.flops / 1e9:.1f}", f"{row.flops / needed:.3f}"] if row.flops else ["", ""]
        over = f"{row.seconds['step'] / rows[0].seconds['step']:.2f}"
        table.add_row(row.name, *phases, over, *flops, f"{row.memory / 1e6:.0f}")
    Console(width=110).print(table)


def measure_equal(model: Path, options: Step) -> dict[str, float]:
    shape = equal_shape(options)
    _, memory = extra_memory(lambda: take_trl_steps(model, shape, options, options.warm_up))
    (side, _), our_memory = extra_memory(
        lambda: take_our_steps(model, "1+2+3", shape, options, options.warm_up)
    )
    own: list[Seconds] = []
    trl = take_trl_steps(
        model, shape, options, options.warm_up + options.equal_steps, lambda: own.append(side.step())
    )
    trl, own = trl[options.warm_up :], own[options.warm_up :]
    show(
        "equal lengths",
        [Measured("TRL", medians(trl), 0, memory), Measured("1+2+3", medians(own), 0, our_memory)],
        1,
    )
    ratios = [ours["step"] / theirs["step"] for ours, theirs in zip(own, trl, strict=True)]
    training = [
        (ours["step"] - ours["rollout"]) / (theirs["step"] - theirs["rollout"])
        for ours, theirs in zip(own, trl, strict=True)
    ]
    print("ratios of the steps:", *(f"{ratio:.2f}" for ratio in sorted(ratios)))
    return {"ratio_equal": median(ratios), "ratio_equal_training": median(training)}


def measure_realistic(model: Path, options: Step) -> dict[str, float]:
    shape = realistic_shape(options)
    needed, count = needed_flops(shape, options), options.warm_up + options.steps
    steps, memory = extra_memory(lambda: take_trl_steps(model, shape, options, count))
    rows = [Measured("TRL", medians(steps[options.warm_up :]), 0, memory)]
    plain, worst = None, 0.0
    for savings in LEVELS:
        (side, steps), memory = extra_memory(
            lambda savings=savings: take_our_steps(model, savings, shape, options, count)
        )
        flops = counted_flops(side.step)
        rows.append(Measured(savings, medians(steps[options.warm_up :]), flops, memory))
        plain = plain or side
        worst = max(worst, difference(side, plain, options.updates))
    show(f"realistic; needed: {needed / 1e9:.1f} GFLOP", rows, needed)
    return {
        "ratio_realistic": rows[-1].seconds["step"] / rows[0].seconds["step"],
        "flops_over_needed": rows[-1].flops / needed,
        "max_difference": worst,
    }


def main(options: Step) -> None:
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    prepare_megatron(CPU)
    start_process_group(CPU, 600)
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        make_model(model, options.layers, options.hidden)
        figures = measure_equal(model, options) | measure_realistic(model, options)
    result = {
        "benchmark": "step",
        **{name: float(f"{value:.3g}") for name, value in figures.items()},
        "within_limit": all(figures[name] <= limit for name, limit in LIMITS.items()),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    with one_line_errors():
        main(parse_options(Step, sys.argv[1:], "python -m benchmarks.step"))
