"""Pack tensors into buckets of bytes, the unit in which a weight sync sends them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from ....models import fp8_blocks

NamedTensor = tuple[str, Tensor]


class Bucket:
    """Tensors stored end to end in a buffer of bytes, each aligned to its dtype.

    Attributes:
        contents: name, dtype, shape and first byte of every tensor.
        nbytes: bytes used.
    """

    def __init__(self, buffer: Tensor) -> None:
        self._buffer = buffer
        self.contents: list[tuple[str, torch.dtype, torch.Size, int]] = []
        self.nbytes = 0

    def takes(self, tensors: Iterable[Tensor]) -> bool:
        """Return whether all tensors fit, in this order and without gaps.

        The servers expect no padding, so a tensor whose dtype would be misaligned starts a new bucket.
        """
        end = self.nbytes
        for tensor in tensors:
            if end % tensor.itemsize:
                return False
            end += tensor.nbytes
        return end <= len(self._buffer)

    def add(self, name: str, tensor: Tensor) -> None:
        """Copy a tensor to the end of the bucket."""
        self.contents.append((name, tensor.dtype, tensor.shape, self.nbytes))
        target = self._buffer[self.nbytes : self.nbytes + tensor.nbytes]
        target.view(tensor.dtype).view(tensor.shape).copy_(tensor)
        self.nbytes += tensor.nbytes

    def named_tensors(self) -> Iterator[NamedTensor]:
        """Yield the stored tensors as views of the buffer."""
        for name, dtype, shape, start in self.contents:
            end = start + math.prod(shape) * dtype.itemsize
            yield name, self._buffer[start:end].view(dtype).view(shape)

    @property
    def data(self) -> Tensor:
        """Return the used part of the buffer, (nbytes,) uint8."""
        return self._buffer[: self.nbytes]


class BucketPacker:
    """Pack a stream of tensors into buckets.

    Args:
        capacity: bytes of a bucket. A larger tensor gets a bucket of its own size.
        allocate: returns an uninitialized uint8 tensor of the given number of bytes.
        quantized: quantize linear weights to block-wise FP8 (``models.fp8_blocks``).
        reuse_buffers: alternate between two buffers that are kept across syncs; False allocates a buffer for
            every bucket.
    """

    def __init__(
        self,
        capacity: int,
        allocate: Callable[[int], Tensor],
        *,
        quantized: bool = False,
        reuse_buffers: bool = True,
    ) -> None:
        self._capacity, self._allocate = capacity, allocate
        self._quantized, self._reuse_buffers = quantized, reuse_buffers
        self._buffers: list[Tensor] = []

    def pack(self, tensors: Iterable[NamedTensor]) -> Iterator[tuple[Bucket, bool]]:
        """Yield full buckets, each with a flag that marks the last.

        With reused buffers, a bucket is valid until the second bucket after it is packed.

        Raises:
            NonFiniteError: a weight to be quantized is NaN or infinite.
        """
        bucket, count = None, 0
        for unit in _loaded_together(tensors):
            if self._quantized:
                # descending item size keeps every tensor of the unit aligned
                unit = sorted(fp8_blocks.quantize_all(unit), key=lambda named: -named[1].itemsize)
            if bucket is None or not bucket.takes(tensor for _, tensor in unit):
                if bucket:
                    yield bucket, False
                bucket = Bucket(self._buffer(count, sum(tensor.nbytes for _, tensor in unit)))
                count += 1
            for name, tensor in unit:
                bucket.add(name, tensor)
        if bucket:
            yield bucket, True

    def _buffer(self, index: int, nbytes: int) -> Tensor:
        """Return memory for the bucket of this index, whose first unit has ``nbytes`` bytes."""
        if nbytes > self._capacity or not self._reuse_buffers:
            return self._allocate(max(nbytes, self._capacity))
        while len(self._buffers) <= index % 2:  # an oversized bucket uses neither of the two
            self._buffers.append(self._allocate(self._capacity))
        return self._buffers[index % 2]


def _loaded_together(tensors: Iterable[NamedTensor]) -> Iterator[list[NamedTensor]]:
    """Yield the tensors one by one, except that q_a_proj and kv_a_proj_with_mqa of a layer form one unit.

    SGLang fuses these two projections of latent attention into one parameter. It skips either of them when a
    request does not contain both (models/deepseek_common/deepseek_weight_loader.py).
    """
    waiting: dict[str, list[NamedTensor]] = {}
    for name, tensor in tensors:
        layer, *halves = re.split(r"\.(?:q_a_proj|kv_a_proj_with_mqa)\.", name)
        unit = [*waiting.pop(layer, []), (name, tensor)]
        if halves and len(unit) == 1:
            waiting[layer] = unit
        else:
            yield unit
    yield from waiting.values()  # models without q_lora_rank have no q_a_proj
