"""From sampled groups to one flat TrainBatch."""

from __future__ import annotations

from itertools import chain, combinations

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from .columns import RoutingShape, TrainBatch
from .samples import Sample, SampleGroup


def make_train_batch(
    groups: list[SampleGroup], advantages: Tensor, routing: RoutingShape | None = None
) -> TrainBatch:
    """Lays the samples of all groups end to end.

    Args:
        groups: in order; every token list holds at least one prompt token.
        advantages: (S,), one for each sample, group by group.
        routing: what the samples' records of routed experts must look like; None leaves them out.

    Raises:
        InputError: see ``stack_routed_experts``.
    """
    samples = [sample for group in groups for sample in group.samples]
    assert advantages.shape == (len(samples),)
    assert not any(sample.response_mask[0] for sample in samples)
    mask = torch.tensor(
        list(chain.from_iterable(sample.response_mask for sample in samples)), dtype=torch.bool
    )
    rollout_logprobs = torch.tensor(
        list(chain.from_iterable(sample.rollout_logprobs for sample in samples)), dtype=torch.float32
    )
    return TrainBatch(
        tokens=torch.tensor(
            list(chain.from_iterable(sample.tokens for sample in samples)), dtype=torch.int64
        ),
        lengths=torch.tensor([len(sample.tokens) for sample in samples], dtype=torch.int64),
        response_mask=mask,
        advantages=advantages.float(),
        rollout_logprobs=rollout_logprobs.where(mask, 0.0),
        routed_experts=stack_routed_experts(samples, routing) if routing else None,
    )


def stack_routed_experts(samples: list[Sample], routing: RoutingShape) -> Tensor:
    """The samples' records end to end, (L, layers, topk) int16; -1 on each sample's last token and in layers without experts.

    Raises:
        InputError: a sample has no record, one of another shape, an expert that the model does not have, or one twice for a token.
    """
    moe = list(routing.moe_layers)
    record = np.full(
        (sum(len(sample.tokens) for sample in samples), routing.num_layers, routing.topk), -1, np.int16
    )
    start = 0
    for number, sample in enumerate(samples):
        found, expected = sample.routed_experts, (len(sample.tokens) - 1, routing.num_layers, routing.topk)
        if found is None:
            raise InputError(
                f"sample {number} has no record of its routed experts: generate with rollout.routed_experts = true"
            )
        if found.shape != expected:
            raise InputError(
                f"sample {number}: routed experts of shape {found.shape}, not {expected} (tokens - 1, layers, topk): "
                "generate with the model of model.path"
            )
        experts = found[:, moe]
        ranked = np.ascontiguousarray(
            experts.reshape(-1, routing.topk).T
        )  # (topk, tokens x layers): whole rows are compared
        if ranked.size and not 0 <= ranked.min() <= ranked.max() < routing.num_experts:
            outside = ranked[(ranked < 0) | (ranked >= routing.num_experts)]
            raise InputError(
                f"sample {number}: routed expert {outside[0]} of {routing.num_experts}: generate with the model of model.path"
            )
        if any((one == other).any() for one, other in combinations(ranked, 2)):
            raise InputError(
                f"sample {number}: a token has the same routed expert twice: generate with the model of model.path"
            )
        record[start : start + len(found), moe] = experts
        start += len(sample.tokens)
    return torch.from_numpy(record)
