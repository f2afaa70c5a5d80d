"""Collectives with a defined gradient, and objects between ranks. ``group=None`` means: there is nobody else."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


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
    """Sums ``x`` over ``group``; the backward is the identity.

    The right pair when the result, and the loss made of it, is replicated on every rank of the group: each rank then holds the
    gradient of the one loss with respect to its own summand. Summing in the backward too would give ``group.size()`` times it.
    """
    if group is None or group.size() == 1:
        return x
    return _SumIdentityBackward.apply(x, group)  # pyright: ignore[reportReturnType]


def rank() -> int:
    """Rank of this process, 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes, 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def all_gather_objects(item: Any) -> list[Any]:
    """Every rank's ``item``, in rank order, on every rank."""
    if world_size() == 1:
        return [item]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, item)
    return gathered


def broadcast_object(item: Any) -> Any:
    """Rank 0's ``item``, on every rank."""
    if world_size() == 1:
        return item
    items = [item]
    dist.broadcast_object_list(items, src=0, device=torch.device("cpu"))
    return items[0]


def barrier() -> None:
    """Waits for every rank."""
    if world_size() > 1:
        dist.barrier()
