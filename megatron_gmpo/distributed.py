"""Collectives: sums with a defined gradient, Python objects, errors, and a folder that all ranks write.

``Nodes`` knows which ranks share a node.

``sum_over_group`` takes a group, or None for a single rank. The other functions use the default process
group. Without a process group, this process is rank 0 of 1.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import files
from .errors import RunError, disk_full


class _SumIdentityBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def sum_over_group(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Return the sum of ``x`` over ``group``; the backward pass is the identity.

    Use it where the result, and the loss computed from it, is replicated on every rank of the group. Each
    rank then has the gradient of that loss with respect to its own summand. A sum in the backward pass would
    scale the gradient by ``group.size()``.
    """
    if group is None or group.size() == 1:
        return x
    return _SumIdentityBackward.apply(x, group)  # pyright: ignore[reportReturnType]


def rank() -> int:
    """Return the rank of this process, 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes, 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def all_gather_objects(item: Any) -> list[Any]:
    """Return every rank's ``item``, in rank order, on every rank. Collective."""
    if world_size() == 1:
        return [item]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, item)
    return gathered


def gather_bytes(data: bytes) -> list[bytes]:
    """Return every rank's ``data``, in rank order, on rank 0, and [] on the others. Collective.

    Unlike ``gather_object`` of torch, it does not pad all messages to the longest one.
    """
    if world_size() == 1:
        return [data]
    sizes = torch.zeros(world_size(), dtype=torch.int64)
    sizes[rank()] = len(data)
    dist.all_reduce(sizes)
    if rank():
        if data:
            dist.send(torch.frombuffer(bytearray(data), dtype=torch.uint8), 0)
        return []
    received = [data]
    for source, size in enumerate(sizes.tolist()[1:], 1):
        buffer = torch.empty(size, dtype=torch.uint8)
        if size:
            dist.recv(buffer, source)
        received.append(buffer.numpy().tobytes())
    return received


def broadcast_object(item: Any) -> Any:
    """Return rank 0's ``item`` on every rank. Collective."""
    if world_size() == 1:
        return item
    items = [item]
    dist.broadcast_object_list(items, src=0, device=torch.device("cpu"))
    return items[0]


def sum_over_ranks(number: int) -> int:
    """Return the sum of every rank's ``number``, on every rank. Collective."""
    total = torch.tensor(number)
    if world_size() > 1:
        dist.all_reduce(total)
    return int(total)


class Nodes:
    """The ranks by node. Every rank makes one together: the constructor is collective.

    The groups are made at their first use, for which all ranks meet.

    Args:
        name: name of this rank's node, ``supervision.records.node_name()``.
        timeout_s: limit for one collective of the groups.

    Attributes:
        name: name of this rank's node.
        ranks: by the name of each node, its ranks in ascending order. The nodes are ordered by their lowest
            rank.
        here: number of this rank's node in this order.
    """

    def __init__(self, name: str, timeout_s: float | None = None) -> None:
        self.name, self._timeout_s = name, timeout_s
        self.ranks: dict[str, list[int]] = {}
        for each, of_rank in enumerate(all_gather_objects(name)):
            self.ranks.setdefault(of_rank, []).append(each)
        self.here = list(self.ranks).index(name)

    def __len__(self) -> int:
        return len(self.ranks)

    @property
    def local_ranks(self) -> list[int]:
        """Return the ranks of this node, in ascending order."""
        return self.ranks[self.name]

    @property
    def leader(self) -> int:
        """Return the first rank of this node, which acts for the node."""
        return self.local_ranks[0]

    @property
    def is_leader(self) -> bool:
        """Return whether this rank is its node's leader."""
        return rank() == self.leader

    @property
    def of_rank(self) -> list[int]:
        """Return the number of the node of each rank."""
        numbers = {each: n for n, ranks in enumerate(self.ranks.values()) for each in ranks}
        return [numbers[each] for each in sorted(numbers)]

    @functools.cached_property
    def group(self) -> dist.ProcessGroup | None:
        """Return the gloo group of this node's ranks; None without ranks. Collective at its first use."""
        return self._own_group(list(self.ranks.values()))

    @functools.cached_property
    def leaders(self) -> dist.ProcessGroup | None:
        """Return the gloo group of all nodes' leaders, None on other ranks. Collective at its first use."""
        return self._own_group([[ranks[0] for ranks in self.ranks.values()]])

    def from_leaders(self, item: Any) -> list[Any]:
        """Return the ``item`` of each node's leader, in the order of the nodes, on every rank. Collective."""
        items = [item]
        if len(self) > 1:
            leaders = self.leaders
            if leaders:
                items *= len(self)
                dist.all_gather_object(items, item, group=leaders)
        if world_size() > len(self):
            shared = [items]
            dist.broadcast_object_list(shared, src=self.leader, group=self.group, device=torch.device("cpu"))
            items = shared[0]
        return items

    def _own_group(self, members: list[list[int]]) -> dist.ProcessGroup | None:
        if not dist.is_initialized():
            return None
        timeout = timedelta(seconds=self._timeout_s) if self._timeout_s else None
        group, _ = dist.new_subgroups_by_enumeration(members, timeout=timeout, backend="gloo")
        return group if isinstance(group, dist.ProcessGroup) else None


def barrier() -> None:
    """Wait for every rank. Collective."""
    if world_size() > 1:
        dist.barrier()


@contextmanager
def agreed() -> Iterator[None]:
    """Raise one rank's error on every rank. The end of the block is collective, and a barrier.

    The block must contain no collective. If a rank failed before it, the other ranks would wait in it.

    Raises:
        RunError: the block raised it on some rank. Every rank raises the error of the lowest rank that
            failed, with the same class and line. A rank whose block raised another exception raises that
            exception again, with its traceback. Ranks without an error then raise a ``RunError`` that quotes
            it.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        if world_size() == 1:
            raise
        error = raised
    if world_size() == 1:
        return
    first_failed = torch.tensor(world_size() if error is None else rank())
    dist.all_reduce(first_failed, op=dist.ReduceOp.MIN)
    source = int(first_failed)
    if source == world_size():
        return
    stated = [_stated(error)]
    dist.broadcast_object_list(stated, src=source, device=torch.device("cpu"))
    if error is not None and (rank() == source or not isinstance(error, RunError)):
        raise error
    assert stated[0] is not None
    raise stated[0]


@contextmanager
def folder_written_by_all(final: Path) -> Iterator[Path]:
    """Yield a new folder that every rank writes into; then rank 0 flushes and renames it. Collective.

    ``final`` must be missing or an empty folder. An error in the block removes the new folder.
    """
    partial = files.partial_path(final)
    try:
        with agreed():
            if rank() == 0:
                files.clear(partial)
                partial.mkdir(parents=True)
        yield partial
        barrier()
        with agreed():
            if rank() == 0:
                files.publish(partial, final)
    except BaseException:
        if rank() == 0:
            files.clear(partial)
        raise


def _stated(error: Exception | None) -> RunError | None:
    """Return the error that other ranks raise for ``error``."""
    if error is None or isinstance(error, RunError):
        return error
    if full := disk_full(error):
        return full
    return RunError(f"rank {rank()} failed with {type(error).__name__}: {' '.join(str(error).split())}")
