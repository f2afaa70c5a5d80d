"""Export the parameters of a parallel Megatron model as complete tensors by Hugging Face name.

The ranks of a pipeline stage put their shards of many parameters end to end and exchange them with one
all-gather: a dense parameter's shards over the tensor-parallel group, an expert's over the group of all
tensor and expert ranks. One broadcast then hands the gathered bytes to the other stages, unless each stage
exports its own parameters only. The next batch is gathered while the caller uses the tensors of the current.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.fp8_utils import dequantize_fp8_tensor, is_float8tensor
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from ..distributed import broadcast_object
from ..models.mapping import TOWER, Mapping
from .parameters import LocalParameter, local_parameters

BATCH_BYTES = 256 * 2**20
"""Bytes of complete tensors that one all-gather collects. A larger parameter gets its own."""

_ALIGNMENT = 16  # bytes; every dtype may be viewed at such an offset


class Export:
    """A model's current weights: iterate over ``(Hugging Face name, complete tensor)``, any number of times.

    Every iteration is collective: all ranks must exhaust it. The tensors have the model's dtype and are on
    every rank; use each before the next. A tied output layer is yielded once, as the embedding.

    Args:
        chunks: this rank's model chunks.
        mapping: the model's names.
        groups: the process groups.
        batch_bytes: bytes of complete tensors to gather at once. Two such batches are in memory.
        prepare: called before each iteration.
        with_tower: whether the parameters of a vision tower are yielded.
    """

    def __init__(
        self,
        chunks: list[torch.nn.Module],
        mapping: Mapping,
        groups: ProcessGroupCollection,
        batch_bytes: int = BATCH_BYTES,
        prepare: Callable[[], object] = nullcontext,
        *,
        with_tower: bool = True,
    ) -> None:
        self._chunks, self._mapping, self._groups = chunks, mapping, groups
        self._batch_bytes, self._prepare, self._with_tower = batch_bytes, prepare, with_tower

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return self._tensors(self._batches, self._groups.pp)

    def of_stage(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors of this rank's pipeline stage only; nothing is sent from stage to stage.

        The ranks of ``senders`` together yield each tensor once.
        """
        stage = self._groups.pp.rank()
        return self._tensors([batch for batch in self._batches if batch.stage == stage], None)

    @cached_property
    def senders(self) -> list[int]:
        """One rank of each stage that has tensors, in the order of the stages. Collective."""
        ranks = broadcast_object(dist.get_process_group_ranks(self._groups.pp))
        return [ranks[stage] for stage in sorted({batch.stage for batch in self._batches})]

    @torch.no_grad()
    def _tensors(self, batches: list[_Batch], pp: dist.ProcessGroup | None) -> Iterator[tuple[str, Tensor]]:
        self._prepare()
        mine = {parameter.name: parameter for parameter in local_parameters(self._chunks, self._groups)}
        gathered: _Gathered | None = None
        for batch in batches:
            ahead = _Gathered(batch, mine, pp)
            if gathered:
                yield from self._converted(gathered)
            gathered = ahead
        if gathered:
            yield from self._converted(gathered)

    def _converted(self, gathered: _Gathered) -> Iterator[tuple[str, Tensor]]:
        for name, parts in gathered.parameters():
            match = self._mapping.find(name)
            full = match.operation.unshard(parts)
            yield from zip(match.hf, match.operation.separate(full), strict=True)

    @cached_property
    def _batches(self) -> list[_Batch]:
        """The batches of all stages, equal on all ranks. Collective, once for all iterations."""
        mine = {parameter.name: parameter for parameter in local_parameters(self._chunks, self._groups)}
        owners = _owners(mine, self._groups)
        if self._mapping.tied:
            head = ("lm_head.weight",)
            owners = {name: o for name, o in owners.items() if self._mapping.find(name).hf != head}
        if not self._with_tower:
            owners = {name: owner for name, owner in owners.items() if not name.startswith(TOWER)}
        return list(_batches(owners, self._groups, self._batch_bytes))


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


@dataclass(frozen=True)
class _Batch:
    """Parameters of a stage that one all-gather collects, end to end in a row of bytes on each rank.

    Attributes:
        stage: the pipeline rank that holds the parameters.
        starts: first byte of each parameter in the row of a rank that holds it.
        nbytes: size of a row.
    """

    stage: int
    shards: _Shards
    owners: dict[str, _Owner]
    starts: dict[str, int]
    nbytes: int

    @classmethod
    def of(cls, stage: int, shards: _Shards, owners: dict[str, _Owner]) -> _Batch:
        """Lay the parameters out in rows."""
        starts: dict[str, int] = {}
        ends: dict[int, int] = {}
        for name, owner in owners.items():
            starts[name] = ends.get(owner.ep_rank, 0)
            ends[owner.ep_rank] = starts[name] + -(-owner.nbytes // _ALIGNMENT) * _ALIGNMENT
        return cls(stage, shards, owners, starts, max(ends.values()))


def _batches(owners: dict[str, _Owner], groups: ProcessGroupCollection, batch_bytes: int) -> Iterator[_Batch]:
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
                    yield _Batch.of(stage, shards, batch)
                    batch, nbytes = {}, 0
                batch[name] = kept[name]
                nbytes += complete
            if batch:
                yield _Batch.of(stage, shards, batch)


def _alternating(owners: dict[str, _Owner], stage: int) -> Iterator[str]:
    """Yield a stage's parameters, one of each expert-parallel rank in turn, so that batches are balanced."""
    per_rank: dict[int, list[str]] = {}
    for name, owner in owners.items():
        if owner.pp_rank == stage:
            per_rank.setdefault(owner.ep_rank, []).append(name)
    return (name for names in zip_longest(*per_rank.values()) for name in names if name is not None)


class _Gathered:
    """A batch that this rank has begun to gather.

    Args:
        batch: the batch.
        mine: the parameters of this rank by name.
        pp: the stages that receive the batch; None if only its own stage does.
    """

    def __init__(self, batch: _Batch, mine: dict[str, LocalParameter], pp: dist.ProcessGroup | None) -> None:
        self._batch, self._mine = batch, mine
        self._rows: Tensor | None = None
        self._work: Any = None
        stages = pp.size() if pp else 1
        if batch.shards.group.size() == stages == 1:
            return
        device = next(iter(mine.values())).tensor.device
        self._rows = torch.empty(batch.shards.group.size(), batch.nbytes, dtype=torch.uint8, device=device)
        if pp is None or pp.rank() == batch.stage:
            own = torch.empty_like(self._rows[0])
            for name, owner in batch.owners.items():
                if name in mine:
                    _view(own, batch.starts[name], owner).copy_(_values(mine[name].tensor))
            self._work = dist.all_gather_into_tensor(
                self._rows.view(-1), own, group=batch.shards.group, async_op=True
            )
        if pp is not None and stages > 1:
            if self._work:
                self._work.wait()
            source = dist.get_global_rank(pp, batch.stage)
            self._work = dist.broadcast(self._rows, src=source, group=pp, async_op=True)

    def parameters(self) -> Iterator[tuple[str, list[Tensor]]]:
        """Yield each parameter of the batch with all its shards."""
        if self._rows is None:
            yield from ((name, [_values(self._mine[name].tensor)]) for name in self._batch.owners)
            return
        self._work.wait()
        for name, owner in self._batch.owners.items():
            rows = self._batch.shards.positions(owner)
            yield name, [_view(self._rows[row], self._batch.starts[name], owner) for row in rows]


def _view(buffer: Tensor, start: int, owner: _Owner) -> Tensor:
    """Return a shard's part of a buffer of bytes."""
    return buffer[start : start + owner.nbytes].view(owner.dtype).view(owner.shape)


def _values(tensor: Tensor) -> Tensor:
    """Return a weight's values, dequantized if it is held in FP8."""
    return dequantize_fp8_tensor(tensor.detach()) if is_float8tensor(tensor) else tensor.detach()
