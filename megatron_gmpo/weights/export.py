"""Hugging Face safetensors folders <-> the parameters of a parallel Megatron model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.fp8_utils import dequantize_fp8_tensor, is_float8tensor
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from ..distributed import all_gather_objects, rank
from ..errors import InputError
from ..models.mapping import ROUTER_BIAS, Mapping, Row, canonical_name, is_expert, with_global_numbers
from .safetensors_folder import SafetensorsFolder


@dataclass(frozen=True)
class LocalParameter:
    """A parameter, or a router's bias, that this rank holds, under its canonical global name."""

    name: str
    tensor: Tensor
    is_expert: bool


def unwrapped(chunk: Any) -> Any:
    """The model in Megatron's wrappers for data parallelism and precision."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk


def local_parameters(
    chunks: list[torch.nn.Module], groups: ProcessGroupCollection
) -> Iterator[LocalParameter]:
    """This rank's parameters, chunk by chunk (one chunk per virtual pipeline stage)."""
    for chunk in chunks:
        model = unwrapped(chunk)
        layer_numbers = {i: layer.layer_number - 1 for i, layer in enumerate(model.decoder.layers)}
        first_expert = groups.ep.rank() * ((model.config.num_moe_experts or 0) // groups.ep.size())
        biases = ((name, buffer) for name, buffer in model.named_buffers() if name.endswith(ROUTER_BIAS))
        for name, parameter in chain(model.named_parameters(), biases):
            name = with_global_numbers(canonical_name(name), layer_numbers, first_expert)
            yield LocalParameter(name, parameter, is_expert(name))


@torch.no_grad()
def load_hf(
    chunks: list[torch.nn.Module], mapping: Mapping, path: str, groups: ProcessGroupCollection
) -> None:
    """Fills the model from a Hugging Face folder; every rank reads what it holds. Needs no communication but a final agreement.

    Raises:
        InputError: a tensor of the folder that no parameter of any rank takes, one that is missing, one of the wrong shape; raised
            on every rank.
    """
    used: set[str] = set()
    try:
        source = SafetensorsFolder(path, left_out=mapping.left_out)
        if mapping.tied and rank() == 0:
            source.check_tied()
        for parameter in local_parameters(chunks, groups):
            used.update(_load_parameter(parameter, source, mapping, groups))
        present, problem = set(source.names), None
    except InputError as error:
        present, problem = set[str](), str(error)
    reports = all_gather_objects((problem, used))
    for problem, _ in reports:  # one rank's problem is everybody's: nobody is left waiting in a collective
        if problem:
            raise InputError(problem)
    tied = {"lm_head.weight"} if mapping.tied else set()
    extra = sorted(present.difference(tied, *(used for _, used in reports)))
    if extra:
        raise InputError(
            f"{path!r} has {len(extra)} tensors that no Megatron parameter takes, the first {extra[0]!r}"
        )


def _load_parameter(
    parameter: LocalParameter, source: SafetensorsFolder, mapping: Mapping, groups: ProcessGroupCollection
) -> tuple[str, ...]:
    try:
        match = mapping.find(parameter.name)
    except KeyError as error:
        raise InputError(
            f"[megatron] asks for more than the model has: {error.args[0]}; remove the field that adds it"
        ) from None
    names = ("model.embed_tokens.weight",) if mapping.tied and match.hf == ("lm_head.weight",) else match.hf
    missing = [name for name in names if name not in source.names]
    if missing:
        raise InputError(
            f"{str(source.path)!r} lacks the tensor {missing[0]!r} that Megatron parameter {parameter.name!r} needs"
        )
    tp = groups.expt_tp if parameter.is_expert else groups.tp
    try:
        shard = match.operation.shard(
            match.operation.join([source.get(name) for name in names]), tp.rank(), tp.size()
        )
        fits = shard.shape == parameter.tensor.shape
    except RuntimeError:  # parts that cannot even be joined
        fits, shard = False, parameter.tensor
    if not fits:
        shapes = ", ".join(f"{name} {tuple(source.get(name).shape)}" for name in names)
        raise InputError(
            f"{str(source.path)!r}: {shapes} does not fit Megatron parameter {parameter.name!r}, {tuple(parameter.tensor.shape)} on each "
            f"of {tp.size()} tensor-parallel ranks: the weights do not belong to this config.json"
        )
    parameter.tensor.copy_(shard)
    if hasattr(
        parameter.tensor, "_high_precision_init_val"
    ):  # in FP8: what the optimizer makes its main weights of (distrib_optimizer.py)
        parameter.tensor._high_precision_init_val = shard.to(parameter.tensor.dtype)  # pyright: ignore[reportAttributeAccessIssue]
    return names


@torch.no_grad()
def export_hf(
    chunks: list[torch.nn.Module], mapping: Mapping, groups: ProcessGroupCollection
) -> Iterator[tuple[str, Tensor]]:
    """Yields ``(Hugging Face name, full tensor)`` in the model's own dtype, one parameter at a time, on every rank.

    Collective: every rank must run the iterator to its end. Tied output layers are yielded once, as the embedding.
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
    pp_rank: int
    ep_rank: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    is_expert: bool


def _owners(mine: dict[str, LocalParameter], groups: ProcessGroupCollection) -> dict[str, _Owner]:
    """Which pipeline and expert rank holds each parameter of the model, in a order all ranks share."""
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
                owners.setdefault(name, owner)  # a tied embedding lives on the first and the last stage
    return owners


def _gather_objects(item: Any, group: dist.ProcessGroup) -> list[Any]:
    if group.size() == 1:
        return [item]
    items: list[Any] = [None] * group.size()
    dist.all_gather_object(items, item, group=group)
    return items


def _values(tensor: Tensor) -> Tensor:
    """A weight's values, also of one that is held in FP8."""
    return dequantize_fp8_tensor(tensor.detach()) if is_float8tensor(tensor) else tensor.detach()


def _gather(
    parameter: LocalParameter | None,
    owner: _Owner,
    match: Row,
    groups: ProcessGroupCollection,
    device: torch.device,
) -> Tensor:
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
