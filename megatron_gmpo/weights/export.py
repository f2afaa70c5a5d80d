"""Export the parameters of a parallel Megatron model as complete tensors by Hugging Face name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.fp8_utils import dequantize_fp8_tensor, is_float8tensor
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from ..models.mapping import Mapping, Row
from .parameters import LocalParameter, local_parameters


@torch.no_grad()
def export_hf(
    chunks: list[torch.nn.Module], mapping: Mapping, groups: ProcessGroupCollection
) -> Iterator[tuple[str, Tensor]]:
    """Yield ``(Hugging Face name, complete tensor)`` in the model's dtype on every rank.

    Collective: every rank must exhaust the iterator, which gathers one parameter at a time. A tied output
    layer is yielded once, as the embedding.
    """
    device = next(chunks[0].parameters()).device
    mine = {parameter.name: parameter for parameter in local_parameters(chunks, groups)}
    for name, owner in _owners(mine, groups).items():
        match = mapping.find(name)
        if mapping.tied and match.hf == ("lm_head.weight",):
            continue
        full = _gather(mine.get(name), owner, match, groups, device)
        yield from zip(match.hf, match.operation.separate(full), strict=True)


@dataclass(frozen=True)
class _Owner:
    """The pipeline and expert rank that holds a parameter, and what the other ranks need to receive it."""

    pp_rank: int
    ep_rank: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    is_expert: bool


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


def _values(tensor: Tensor) -> Tensor:
    """Return a weight's values, dequantized if it is held in FP8."""
    return dequantize_fp8_tensor(tensor.detach()) if is_float8tensor(tensor) else tensor.detach()


def _gather(
    parameter: LocalParameter | None,
    owner: _Owner,
    match: Row,
    groups: ProcessGroupCollection,
    device: torch.device,
) -> Tensor:
    """Return a parameter's complete tensor on every rank.

    Args:
        parameter: None on ranks that do not hold it.
    """
    tp = groups.expt_tp if owner.is_expert else groups.tp
    on_stage = groups.pp.rank() == owner.pp_rank
    shard = (
        _values(parameter.tensor)
        if parameter and on_stage
        else torch.empty(owner.shape, dtype=owner.dtype, device=device)
    )
    if on_stage and owner.is_expert and groups.ep.size() > 1:
        shard = shard.clone()
        dist.broadcast(shard, src=dist.get_global_rank(groups.ep, owner.ep_rank), group=groups.ep)
    shards = [shard]
    if tp.size() > 1:
        shards = [torch.empty_like(shard) for _ in range(tp.size())]
        if on_stage:
            dist.all_gather(shards, shard.contiguous(), group=tp)
    full = match.operation.unshard(shards)
    if groups.pp.size() > 1:
        full = full.contiguous()
        dist.broadcast(full, src=dist.get_global_rank(groups.pp, owner.pp_rank), group=groups.pp)
    return full
