"""Batches that every rank of a test holds whole, and their shares on the replicas."""

from __future__ import annotations

from dataclasses import fields, replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_gmpo.batch.columns import TrainBatch
from megatron_gmpo.batch.images import ROW, image_columns
from megatron_gmpo.batch.index import StepIndex
from megatron_gmpo.batch.packing import pack
from megatron_gmpo.batch.plan import planned
from megatron_gmpo.distributed import all_gather_objects
from megatron_gmpo.losses.objective import Objective
from megatron_gmpo.policy.fp8 import total_multiple
from megatron_gmpo.policy.policy import Policy


def split(batch: TrainBatch, parts: int) -> list[TrainBatch]:
    """Split a whole batch like a step's minibatches: consecutive sequences, equal in size to within 1."""
    parts = min(parts, len(batch))
    bounds = [round(i * len(batch) / parts) for i in range(parts + 1)]
    return [batch.take(torch.arange(first, end)) for first, end in pairwise(bounds)]


def lean_share(policy: Policy, batch: TrainBatch, objective: Objective) -> TrainBatch:
    """Return this replica's share of a whole batch, without the sequences that a step leaves out."""
    zeros = np.zeros(len(batch), np.int32)
    responses = batch.response_lengths.numpy()
    sizes = {
        "length": batch.lengths.numpy(),
        "response_length": responses,
        "turns": np.where(responses > 0, batch.units.numpy(), 0),
    }
    index = StepIndex(**dict.fromkeys((f.name for f in fields(StepIndex)), zeros) | sizes)
    return planned(batch, policy.plan(index, batch.advantages, objective), policy.replica)


def whole(batch: TrainBatch, share: TrainBatch, values: Tensor) -> Tensor:
    """Return (L, ...) of the whole batch from every replica's (tokens, ...); 0 where none has a value."""
    assert share.numbers is not None
    found = torch.zeros(len(batch.tokens), *values.shape[1:], dtype=values.dtype)
    for index, part in all_gather_objects((batch.token_index(share.numbers), values)):
        found[index] = part
    return found


def recorded_experts(policy: Policy, batch: TrainBatch, share: TrainBatch) -> Tensor:
    """Return the experts that the routers of all ranks recorded, (L, layers, topk) int16, else -1."""
    assert policy.routing
    assert share.numbers is not None
    shape, index = policy.routing.shape, batch.token_index(share.numbers)
    pieces: list[tuple[int, Tensor, Tensor]] = []
    for (layer, number), experts in share.own_experts.items():
        packed = pack(share, _members(share, number), **_packing(policy))
        slots = policy.routing.own(packed.input_index)
        pieces.append((layer, index[slots[slots >= 0]], experts[slots >= 0].short()))
    found = torch.full((len(batch.tokens), shape.num_layers, shape.topk), -1, dtype=torch.int16)
    for layer, tokens, experts in (piece for part in all_gather_objects(pieces) for piece in part):
        assert (found[tokens, layer] < 0).all(), "two ranks recorded a token"
        found[tokens, layer] = experts
    return found


def _members(share: TrainBatch, number: int) -> list[int]:
    return [members for step in share.plan for members in step.microbatches][number]


def _packing(policy: Policy) -> dict[str, Any]:
    cp = policy.groups.cp
    return {
        "cp_size": cp.size(),
        "cp_rank": cp.rank(),
        "sequence_multiple": policy.cfg.parallel.sequence_multiple,
        "total_multiple": total_multiple(policy.cfg),
    }


def without_images(batch: TrainBatch) -> TrainBatch:
    """Return a batch of text for a vision-language model."""
    of: Any = SimpleNamespace(image_token=-1, merge_size=1)
    counts, rows = torch.zeros_like(batch.lengths), np.zeros(0, ROW)
    columns = image_columns(batch.tokens, batch.response_mask, batch.lengths, counts, rows, of)
    return replace(batch, **columns)
