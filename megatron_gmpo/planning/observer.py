"""Count the memory, FLOPs and collectives of code that runs on the meta device."""

from __future__ import annotations

import dataclasses
import weakref
from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from .rank_plan import Traffic, Work

_OPERATIONS = {
    "allreduce_": "all_reduce",
    "allgather_": "all_gather",
    "_allgather_base_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "alltoall_base_": "all_to_all",
    "broadcast_": "broadcast",
}
"""Operator in torch's c10d namespace -> collective."""


class Observer(TorchDispatchMode):
    """Track which meta tensors are alive, and count FLOPs and collectives.

    Attributes:
        resident: storages that existed before the observed code. They are not counted.
        live: bytes of the storages that are allocated now.
        peak: largest value of ``live`` since ``start``.
        flops: FLOPs since ``start``. Stand-ins for fused kernels add their own.
    """

    def __init__(self, groups: ProcessGroupCollection) -> None:
        super().__init__()
        self.resident: set[int] = set()
        self._names: dict[str, str] = {}
        # reversed, so that tp, cp, ... take precedence over combined groups with the same ranks
        for field in reversed(dataclasses.fields(groups)):
            group = getattr(groups, field.name, None)
            if isinstance(group, dist.ProcessGroup):
                self._names[group.group_name] = field.name
        self.start()

    def start(self) -> None:
        """Set all counts to zero."""
        self.live = self.peak = self.flops = 0
        self._alive: dict[int, weakref.ref[Any]] = {}
        self._saved: dict[int, int] = {}
        self._sent: Counter[tuple[str, str, tuple[int, ...]]] = Counter()

    def work(self) -> Work:
        """Return the FLOPs and collectives since ``start``."""
        return Work(self.flops, tuple(Traffic(*key, sent) for key, sent in self._sent.items()))

    def note_saved(self, tensor: Tensor) -> Tensor:
        """Count a tensor that autograd saves for a backward pass, and return it."""
        storage = tensor.untyped_storage()
        if tensor.is_meta and storage._cdata not in self.resident:
            self._saved[storage._cdata] = storage.nbytes()
        return tensor

    @property
    def saved(self) -> int:
        """Return the bytes that autograd saved, each storage counted once."""
        return sum(self._saved.values())

    def gradient_sync(self, buffers: list[Any]) -> list[Traffic]:
        """Return the collectives that follow the backward passes of an optimizer step.

        Gradients are summed over the data-parallel ranks; with a distributed optimizer the updated weights
        are gathered.

        Args:
            buffers: Megatron's gradient buffers (param_and_grad_buffer.py).
        """
        sent: Counter[tuple[str, str, tuple[int, ...]]] = Counter()
        for buffer in buffers:
            group = buffer.data_parallel_group
            collectives = [("all_reduce", buffer.grad_data)]
            if buffer.param_data is not None:
                collectives = [("reduce_scatter", buffer.grad_data), ("all_gather", buffer.param_data)]
            for operation, data in collectives:
                sent[self._key(operation, group)] += _wire_bytes(operation, data.nbytes, group.size())
        return [Traffic(*key, count) for key, count in sent.items() if count]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.namespace == "c10d":
            self._note_collective(func, args)
        elif (count := flop_registry.get(func._overloadpacket)) is not None:
            self.flops += count(*args, **kwargs, out_val=out)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.is_meta:
                self._note_storage(tensor.untyped_storage())
        return out

    def _note_storage(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive or key in self.resident:
            return
        alive = self._alive

        def gone(_: Any) -> None:
            del alive[key]
            if alive is self._alive:
                self.live -= size

        alive[key] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)

    def _note_collective(self, func: Any, args: tuple[Any, ...]) -> None:
        operation = _OPERATIONS.get(func._overloadpacket._qualified_op_name.removeprefix("c10d::"))
        assert operation, f"the dry run does not know the collective {func}"
        boxed = next(arg for arg in args if isinstance(arg, torch.ScriptObject) and _is_group(arg))
        group = dist.ProcessGroup.unbox(boxed)
        # the largest argument is the whole tensor, the other arguments are one rank's share
        size = max(sum(t.nbytes for t in tree_leaves(arg) if isinstance(t, Tensor)) for arg in args)
        if group.size() > 1:
            self._sent[self._key(operation, group)] += _wire_bytes(operation, size, group.size())

    def _key(self, operation: str, group: dist.ProcessGroup) -> tuple[str, str, tuple[int, ...]]:
        name = self._names.get(group.group_name, group.group_name)
        return operation, name, tuple(dist.get_process_group_ranks(group))


def _wire_bytes(operation: str, size: int, ranks: int) -> int:
    if operation == "broadcast":
        return size
    return size * (ranks - 1) // ranks * (2 if operation == "all_reduce" else 1)


def _is_group(value: torch.ScriptObject) -> bool:
    return "ProcessGroup" in str(value._type())  # pyright: ignore[reportAttributeAccessIssue]
