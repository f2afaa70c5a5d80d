"""Export the parameters of a parallel Megatron model as complete tensors by Hugging Face name.

The ranks of a pipeline stage put their shards of many parameters end to end and exchange them with one
all-gather: a dense parameter's shards over the tensor-parallel group, an expert's over the group of all
tensor and expert ranks. One broadcast then hands the gathered bytes to the other stages.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.fp8_utils import dequantize_fp8_tensor, is_float8tensor
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from ..models.mapping import Mapping
from .parameters import LocalParameter, local_parameters

BATCH_BYTES = 256 * 2**20
"""Bytes of complete tensors that one all-gather collects. A larger parameter gets its own."""

_ALIGNMENT = 16  # bytes; every dtype may be viewed at such an offset


@torch.no_grad()
def export_hf(
    chunks: list[torch.nn.Module],
    mapping: Mapping,
    groups: ProcessGroupCollection,
    batch_bytes: int = BATCH_BYTES,
) -> Iterator[tuple[str, Tensor]]:
    """Yield ``(Hugging Face name, complete tensor)`` in the model's dtype on every rank.

    Collective: every rank must exhaust the iterator, which gathers about ``batch_bytes`` at a time. A tied
    output layer is yielded once, as the embedding.
    """
    device = next(chunks[0].parameters()).device
    mine = {parameter.name: parameter for parameter in local_parameters(chunks, groups)}
    owners = _owners(mine, groups)
    if mapping.tied:
        owners = {name: o for name, o in owners.items() if mapping.find(name).hf != ("lm_head.weight",)}
    for shards, batch in _batches(owners, groups, batch_bytes):
        for name, parts in _gather(batch, shards, mine, groups.pp, device):
            match = mapping.find(name)
            full = match.operation.unshard(parts)
            yield from zip(match.hf, match.operation.separate(full), strict=True)


@dataclass(frozen=True)
class _Owner:
    """The pipeline and expert rank that holds a parameter, and the form of each tensor-parallel shard."""

    pp_rank: int
    ep_rank: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    is_expert: bool

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def _owners(mine: dict[str, LocalParameter], groups: ProcessGroupCollection) -> dict[str, _Owner]:
    """Return the owner of each parameter of the model, in the same order on all ranks."""
    local = {
        name: _Owner(
            groups.pp.rank(),
            groups.ep.rank() if p.is_expert else 0,
            tuple(p.tensor.shape),
            p.tensor.dtype,
            p.is_expert,
        )
        for name, p in mine.items()
    }
    owners: dict[str, _Owner] = {}
    for per_stage in _gather_objects(local, groups.pp):
        for per_expert_rank in _gather_objects(per_stage, groups.ep):
            for name, owner in per_expert_rank.items():
                owners.setdefault(name, owner)  # the first and the last stage hold a tied embedding
    return owners


def _gather_objects(item: Any, group: dist.ProcessGroup) -> list[Any]:
    if group.size() == 1:
        return [item]
    items: list[Any] = [None] * group.size()
    dist.all_gather_object(items, item, group=group)
    return items


class _Shards:
    """The ranks of a stage that hold the shards of its dense parameters, or of its experts.

    Args:
        group: all ranks that hold different shards.
        tp: the tensor-parallel group, a part of ``group``.
        ep_rank: this rank's place among the expert-parallel ranks; 0 for dense parameters.
    """

    def __init__(self, group: dist.ProcessGroup, tp: dist.ProcessGroup, ep_rank: int) -> None:
        self.group, self.tp_size = group, tp.size()
        places = _gather_objects((ep_rank, tp.rank()), group)
        self._positions = {place: position for position, place in enumerate(places)}

    def positions(self, owner: _Owner) -> list[int]:
        """Return the ranks in ``group`` that hold the shards of a parameter, in tensor-parallel order."""
        return [self._positions[owner.ep_rank, tp_rank] for tp_rank in range(self.tp_size)]


def _batches(
    owners: dict[str, _Owner], groups: ProcessGroupCollection, batch_bytes: int
) -> Iterator[tuple[_Shards, dict[str, _Owner]]]:
    """Yield the parameters in batches of one stage and kind, in the same order on all ranks."""
    for is_expert in sorted({owner.is_expert for owner in owners.values()}):
        shards = (
            _Shards(groups.tp_ep, groups.expt_tp, groups.ep.rank())
            if is_expert
            else _Shards(groups.tp, groups.tp, 0)
        )
        kept = {name: owner for name, owner in owners.items() if owner.is_expert == is_expert}
        for stage in range(groups.pp.size()):
            batch: dict[str, _Owner] = {}
            nbytes = 0
            for name in _alternating(kept, stage):
                complete = kept[name].nbytes * shards.tp_size
                if batch and nbytes + complete > batch_bytes:
                    yield shards, batch
                    batch, nbytes = {}, 0
                batch[name] = kept[name]
                nbytes += complete
            if batch:
                yield shards, batch


def _alternating(owners: dict[str, _Owner], stage: int) -> Iterator[str]:
    """Yield a stage's parameters, one of each expert-parallel rank in turn, so that batches are balanced."""
    per_rank: dict[int, list[str]] = {}
    for name, owner in owners.items():
        if owner.pp_rank == stage:
            per_rank.setdefault(owner.ep_rank, []).append(name)
    return (name for names in zip_longest(*per_rank.values()) for name in names if name is not None)


def _gather(
    batch: dict[str, _Owner],
    shards: _Shards,
    mine: dict[str, LocalParameter],
    pp: dist.ProcessGroup,
    device: torch.device,
) -> Iterator[tuple[str, list[Tensor]]]:
    """Yield each parameter of a batch with all its shards, on every rank.

    Args:
        mine: the parameters of this rank by name.
    """
    if shards.group.size() == pp.size() == 1:
        yield from ((name, [_values(mine[name].tensor)]) for name in batch)
        return
    starts: dict[str, int] = {}
    ends: dict[int, int] = {}
    for name, owner in batch.items():
        starts[name] = ends.get(owner.ep_rank, 0)
        ends[owner.ep_rank] = starts[name] + -(-owner.nbytes // _ALIGNMENT) * _ALIGNMENT
    stage = next(iter(batch.values())).pp_rank
    gathered = torch.empty(shards.group.size(), max(ends.values()), dtype=torch.uint8, device=device)
    if pp.rank() == stage:
        own = torch.empty_like(gathered[0])
        for name, owner in batch.items():
            if name in mine:
                _view(own, starts[name], owner).copy_(_values(mine[name].tensor))
        dist.all_gather_into_tensor(gathered.view(-1), own, group=shards.group)
    if pp.size() > 1:
        dist.broadcast(gathered, src=dist.get_global_rank(pp, stage), group=pp)
    for name, owner in batch.items():
        yield name, [_view(gathered[i], starts[name], owner) for i in shards.positions(owner)]


def _view(buffer: Tensor, start: int, owner: _Owner) -> Tensor:
    """Return a shard's part of a buffer of bytes."""
    return buffer[start : start + owner.nbytes].view(owner.dtype).view(owner.shape)


def _values(tensor: Tensor) -> Tensor:
    """Return a weight's values, dequantized if it is held in FP8."""
    return dequantize_fp8_tensor(tensor.detach()) if is_float8tensor(tensor) else tensor.detach()
