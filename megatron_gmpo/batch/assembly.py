"""Make the TrainBatch of a replica from the samples of all ranks."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from ..distributed import agreed
from ..errors import InputError
from .columns import RoutingShape, TrainBatch
from .exchange import Exchange
from .index import StepIndex, samples_of
from .plan import StepPlan
from .samples import Sample, SampleGroup


def make_train_batch(
    groups: Mapping[int, SampleGroup],
    index: StepIndex,
    advantages: Tensor,
    plan: StepPlan,
    exchange: Exchange,
    routing: RoutingShape | None,
) -> TrainBatch:
    """Move the columns of all ranks' samples and return the batch of this rank's replica. Collective.

    The tokens stay in the memory that the exchange maps.

    Args:
        groups: this rank's groups by their position in the step.
        index: the sequences of all ranks. A sequence without response tokens in it carries no loss.
        advantages: (S,), one per sequence of the step.
        plan: the plan of the step.
        routing: the shape that recorded experts must have; None leaves the records where they are.

    Raises:
        InputError: see ``check_routed_experts``. Raised on every rank.
    """
    samples = samples_of(groups, index)
    if routing is None:
        index = replace(index, expert_bytes=np.zeros_like(index.expert_bytes))
    else:
        with agreed():
            check_routed_experts(samples, routing)
    columns = exchange.distribute(samples, index, plan.replica_of)
    numbers = plan.numbers(exchange.replica)
    lengths = index.length[numbers]
    mask, logprobs = columns.response_mask, columns.rollout_logprobs
    kept = np.repeat(index.response_length[numbers] > 0, lengths)
    if mask[~kept].any():
        mask, logprobs = mask & kept, np.where(kept, logprobs, np.float32(0))
    return TrainBatch(
        tokens=_tensor(columns.tokens),
        lengths=torch.from_numpy(lengths.astype(np.int64)),
        response_mask=_tensor(mask),
        advantages=advantages[torch.from_numpy(numbers)].float(),
        rollout_logprobs=_tensor(logprobs),
        routed_experts=None if columns.routed_experts is None else _tensor(columns.routed_experts),
        numbers=torch.from_numpy(numbers),
        plan=plan.minibatches(exchange.replica),
    )


def whole_batch(groups: Iterable[SampleGroup]) -> TrainBatch:
    """Return the batch of groups that every rank holds, with advantages of 0 and without a plan."""
    samples = [sample for group in groups for sample in group.samples]
    records = [sample.routed_experts for sample in samples]

    def joined(columns: list[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.concatenate(columns))

    return TrainBatch(
        tokens=joined([sample.tokens for sample in samples]),
        lengths=torch.tensor([len(sample.tokens) for sample in samples]),
        response_mask=joined([sample.response_mask for sample in samples]),
        advantages=torch.zeros(len(samples)),
        rollout_logprobs=joined([sample.rollout_logprobs for sample in samples]),
        routed_experts=joined(
            [np.pad(record, ((0, 1), (0, 0), (0, 0))) for record in records if record is not None]
        )
        if all(record is not None for record in records)
        else None,
    )


def _tensor(values: np.ndarray) -> Tensor:
    """Return a tensor of the same memory, which must not be written to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(values)


def check_routed_experts(samples: Mapping[int, Sample], routing: RoutingShape) -> None:
    """Check the record of routed experts of samples by their number, before they travel.

    Raises:
        InputError: a sample has no record, a record of another shape, an expert that the model does not have,
            or a token with the same expert twice.
    """
    for number, sample in samples.items():
        _check_experts(number, sample, routing)


def _check_experts(number: int, sample: Sample, routing: RoutingShape) -> None:
    found, expected = sample.routed_experts, (len(sample.tokens) - 1, routing.num_layers, routing.topk)
    if found is None:
        raise InputError(
            f"sample {number} has no record of its routed experts: "
            "generate with rollout.routed_experts = true"
        )
    if found.shape != expected:
        raise InputError(
            f"sample {number}: routed experts of shape {found.shape}, not {expected} "
            "(tokens - 1, layers, topk): generate with the model of model.path"
        )
    experts = found[:, list(routing.moe_layers)]
    # (topk, slots), contiguous, because the checks below compare whole rows
    ranked = np.ascontiguousarray(experts.reshape(-1, routing.topk).T)
    if ranked.size and not 0 <= ranked.min() <= ranked.max() < routing.num_experts:
        outside = ranked[(ranked < 0) | (ranked >= routing.num_experts)]
        raise InputError(
            f"sample {number}: routed expert {outside[0]} of {routing.num_experts}: "
            "generate with the model of model.path"
        )
    if any((one == other).any() for one, other in combinations(ranked, 2)):
        raise InputError(
            f"sample {number}: a token has the same routed expert twice: "
            "generate with the model of model.path"
        )
