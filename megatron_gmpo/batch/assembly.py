"""Assemble sampled groups into one flat TrainBatch."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from .columns import RoutingShape, TrainBatch
from .samples import Sample, SampleGroup


def make_train_batch(
    groups: list[SampleGroup],
    advantages: Tensor,
    routing: RoutingShape | None = None,
    *,
    mask_truncated: bool = False,
) -> TrainBatch:
    """Concatenate the samples of all groups.

    Args:
        groups: groups in order; every sample starts with at least one prompt token.
        advantages: (S,), one per sample, group by group.
        routing: the shape that recorded experts must have; None omits them.
        mask_truncated: give samples that reached the token limit an empty response mask. Like every sequence
            without response tokens, they then contribute exactly 0 and count in no divisor.

    Raises:
        InputError: see ``stack_routed_experts``.
    """
    samples = [sample for group in groups for sample in group.samples]
    assert advantages.shape == (len(samples),)
    assert not any(sample.response_mask[0] for sample in samples)

    def joined(columns: list[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.concatenate(columns))

    mask = joined([sample.response_mask for sample in samples])
    if mask_truncated:
        truncated = np.array([sample.finish_reason == "length" for sample in samples])
        mask &= torch.from_numpy(truncated.repeat([len(sample.tokens) for sample in samples])).logical_not()
    return TrainBatch(
        tokens=joined([sample.tokens for sample in samples]).long(),
        lengths=torch.tensor([len(sample.tokens) for sample in samples]),
        response_mask=mask,
        advantages=advantages.float(),
        rollout_logprobs=joined([sample.rollout_logprobs for sample in samples]).where(mask, 0.0),
        routed_experts=stack_routed_experts(samples, routing) if routing else None,
    )


def stack_routed_experts(samples: list[Sample], routing: RoutingShape) -> Tensor:
    """Concatenate the samples' records of routed experts.

    Returns:
        (L, layers, topk) int16; -1 on each sample's last token and in layers without experts.

    Raises:
        InputError: a sample has no record, a record of another shape, an expert that the model does not have,
            or a token with the same expert twice.
    """
    moe = list(routing.moe_layers)
    length = sum(len(sample.tokens) for sample in samples)
    stacked = np.full((length, routing.num_layers, routing.topk), -1, np.int16)
    start = 0
    for number, sample in enumerate(samples):
        rows = len(sample.tokens) - 1
        stacked[start : start + rows, moe] = _checked_experts(number, sample, routing)
        start += rows + 1
    return torch.from_numpy(stacked)


def _checked_experts(number: int, sample: Sample, routing: RoutingShape) -> np.ndarray:
    """Return the (L - 1, MoE layers, topk) experts of sample ``number``."""
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
    return experts
