"""The plan of a step: which replica computes which sequences, in which microbatches of which optimizer step.

It follows from lengths alone, so that all ranks make the same plan without a message.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch

from ..metrics.figures import Metric
from .columns import Minibatch, TrainBatch

Assignment = Callable[[np.ndarray], list[list[list[int]]]]
"""Numbers of sequences -> ``[replica][microbatch]``, lists of these numbers, see ``plan_microbatches``."""


@dataclass(frozen=True, eq=False)
class StepPlan:
    """The plan of the S sequences of a step.

    Attributes:
        lengths: (S,) tokens of each sequence.
        response_lengths: (S,) tokens that carry loss; 0 where a sequence counts in no divisor.
        units: (S,) sequences of the loss with such tokens that each sequence is: 0 or 1, or its turns.
        bounds: (first, end) numbers of the sequences of each optimizer step.
        microbatches: ``[optimizer step][replica][microbatch]``: ascending numbers of the sequences. A
            sequence that nobody computes is in none of them.
    """

    lengths: np.ndarray
    response_lengths: np.ndarray
    units: np.ndarray
    bounds: list[tuple[int, int]]
    microbatches: list[list[list[list[int]]]]

    @cached_property
    def replica_of(self) -> np.ndarray:
        """Return (S,) int32: the data-parallel replica that computes each sequence, -1 for none."""
        replica_of = np.full(len(self.lengths), -1, np.int32)
        for replicas in self.microbatches:
            for replica, microbatches in enumerate(replicas):
                for members in microbatches:
                    replica_of[members] = replica
        return replica_of

    def numbers(self, replica: int) -> np.ndarray:
        """Return the ascending numbers of the sequences that a replica computes: the rows of its batch."""
        return np.flatnonzero(self.replica_of == replica)

    def minibatches(self, replica: int) -> list[Minibatch]:
        """Return the optimizer steps of a replica."""
        numbers, found, before = self.numbers(replica), list[Minibatch](), 0
        for (first, end), replicas in zip(self.bounds, self.microbatches, strict=True):
            span = slice(first, end)
            rows = np.searchsorted(numbers, (first, end)).tolist()
            found.append(
                Minibatch(
                    rows=(rows[0], rows[1]),
                    microbatches=[
                        np.searchsorted(numbers, members).tolist() for members in replicas[replica]
                    ],
                    first_microbatch=before,
                    sequences=int(self.units[span].sum()),
                    response_tokens=int(self.response_lengths[span].sum()),
                    tokens=int(self.lengths[span].sum()),
                    computed_tokens=int(self.lengths[span][self.replica_of[span] >= 0].sum()),
                )
            )
            before += len(replicas[replica])
        return found


def minibatch_bounds(count: int, parts: int) -> list[tuple[int, int]]:
    """Return (start, end) of at most ``parts`` ranges of ``count`` sequences, equal in size to within 1."""
    parts = min(parts, count)
    return list(pairwise(round(i * count / parts) for i in range(parts + 1)))


def plan_step(
    lengths: np.ndarray,
    response_lengths: np.ndarray,
    units: np.ndarray,
    computed: np.ndarray,
    parts: int,
    assign: Assignment,
) -> StepPlan:
    """Plan the S sequences of a step.

    Args:
        lengths, response_lengths, units: (S,), see ``StepPlan``.
        computed: (S,) bool, the sequences to compute.
        parts: number of optimizer steps; fewer if there are fewer sequences.
        assign: assigns the sequences of an optimizer step.
    """
    bounds = minibatch_bounds(len(lengths), parts)
    return StepPlan(
        lengths,
        response_lengths,
        units,
        bounds,
        [assign(first + np.flatnonzero(computed[first:end])) for first, end in bounds],
    )


def computed_metrics(plan: Sequence[Minibatch], without_pass: int) -> dict[str, Metric]:
    """Return the shares of a step's work that are done and left out.

    Args:
        plan: the step's updates.
        without_pass: the first updates need no pass for old log probabilities.

    Returns:
        ``train/computed_tokens``, the share of the tokens that are computed; ``train/saved``, the share of
        the passes over tokens that is left out. A token's old log probability is one pass, its training
        three.
    """
    tokens = sum(part.tokens for part in plan)
    computed = sum(part.computed_tokens for part in plan)
    passed = sum(part.computed_tokens for part in plan[without_pass:])
    return {
        "train/computed_tokens": Metric(computed, tokens),
        "train/saved": Metric(4 * tokens - 3 * computed - passed, 4 * tokens),
    }


def planned(batch: TrainBatch, plan: StepPlan, replica: int) -> TrainBatch:
    """Return a replica's share of a batch that holds all sequences of the plan."""
    numbers = torch.from_numpy(plan.numbers(replica))
    share = batch.take(numbers)
    share.numbers, share.plan = numbers, plan.minibatches(replica)
    return share
