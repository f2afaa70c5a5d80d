"""Find where the host would wait for the device, on a machine that has no device.

Tensors are marked as the device's: the weights, the microbatches after ``Microbatch.to``, and everything that
is computed from them. A stop is an operation that would make the host wait for a marked tensor's values.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_gmpo.batch.columns import Microbatch
from megatron_gmpo.metrics import across_ranks
from megatron_gmpo.policy.policy import Policy

OPERATIONS = {
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::masked_select",
    "aten::equal",
    "aten::_unique2",
    "aten::repeat_interleave",
}
"""Operators whose result, or the size of it, the host needs."""
COPIES = {Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.__array__}
"""Functions that copy to the host. On a CPU they call no operator."""
OBJECTS = ("all_gather_object", "broadcast_object_list", "gather_object", "scatter_object_list")
# platform/cpu.py has the CPU's versions of Megatron's functions: their callers in Megatron stop
LIBRARIES = ("/torch/", "/support/stops.py", "/megatron_gmpo/platform/cpu.py")


class Stops:
    """The stops in a block.

    Attributes:
        places: ``file:function`` of every stop, the innermost one outside ``LIBRARIES``.
        fetches: number of calls of ``across_ranks.fetch``, whose results are not marked.
        objects: calls of each collective for Python objects.
    """

    def __init__(self) -> None:
        self.places: list[str] = []
        self.fetches = 0
        self.objects: Counter[str] = Counter()
        # the storages are kept, so that no other storage gets the address of a marked one
        self._marked: dict[int, Any] = {}

    def mark(self, tensors: Iterable[Any]) -> None:
        for tensor in tensors:
            if isinstance(tensor, Tensor) and tensor.dim() + 1 and not tensor.is_meta:
                storage = tensor.untyped_storage()
                self._marked[storage._cdata] = storage

    def is_marked(self, tensor: Any) -> bool:
        return isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata in self._marked

    def note(self) -> None:
        frame: Any = sys._getframe(1)
        while any(part in frame.f_code.co_filename for part in LIBRARIES):
            frame = frame.f_back
        package = "megatron" if "/megatron/core/" in frame.f_code.co_filename else "ours"
        self.places.append(f"{package} {Path(frame.f_code.co_filename).name}:{frame.f_code.co_name}")

    @contextmanager
    def watching(self) -> Iterator[None]:
        with _Functions(self), _Operations(self):
            yield


class _Operations(TorchDispatchMode):
    def __init__(self, stops: Stops) -> None:
        super().__init__()
        self._stops = stops

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = tree_leaves((args, kwargs))
        marked = any(self._stops.is_marked(x) for x in inputs)
        if marked and (func._schema.name in OPERATIONS or _by_mask(func, args)):
            self._stops.note()
        result = func(*args, **kwargs)
        if marked:
            self._stops.mark(tree_leaves(result))
            if func._schema.is_mutable:
                self._stops.mark(args[:1])
        return result


def _by_mask(func: Any, args: Any) -> bool:
    """Return whether the operator selects by a mask, so that the mask's values give a size."""
    if func._schema.name not in ("aten::index", "aten::index_put", "aten::index_put_"):
        return False
    return any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])


class _Functions(TorchFunctionMode):
    def __init__(self, stops: Stops) -> None:
        super().__init__()
        self._stops = stops

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        copies = func in COPIES or (func is Tensor.to and "cpu" in args[1:])
        if copies and self._stops.is_marked(args[0]):
            self._stops.note()
        return func(*args, **(kwargs or {}))


@contextmanager
def watched(policy: Policy) -> Iterator[Stops]:
    """Yield the stops of the block, in which ``policy`` trains."""
    stops = Stops()
    stops.mark(tensor for chunk in policy.chunks for tensor in (*chunk.parameters(), *chunk.buffers))
    for chunk in policy.chunks:
        buffers: Any = chunk
        stops.mark(b.grad_data for b in (*buffers.buffers, *buffers.expert_parallel_buffers))

    def to(microbatch: Microbatch, device: torch.device) -> Microbatch:
        copy = microbatch.mapped(Tensor.clone)
        stops.mark(tree_leaves(vars(copy)))
        return copy

    def fetch(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        stops.fetches += 1
        with torch._C._DisableTorchDispatch():
            return {name: tensor.clone() for name, tensor in tensors.items()}

    with pytest.MonkeyPatch.context() as patch, stops.watching():
        patch.setattr(Microbatch, "to", to)
        patch.setattr(across_ranks, "fetch", fetch)
        stops.objects = count_objects(patch)
        yield stops


def count_objects(patch: pytest.MonkeyPatch) -> Counter[str]:
    """Return a counter of the calls of torch's collectives for Python objects."""
    calls: Counter[str] = Counter()

    def counted(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return function(*args, **kwargs)

        return call

    for name in OBJECTS:
        patch.setattr(dist, name, counted(name, getattr(dist, name)))
    return calls
