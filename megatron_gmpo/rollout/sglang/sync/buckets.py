"""Tensors on their way, many in one piece of memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor


class Bucket:
    """Tensors end to end in a buffer of bytes, each aligned to its dtype."""

    def __init__(self, buffer: Tensor) -> None:
        self._buffer = buffer
        self.contents: list[tuple[str, torch.dtype, torch.Size, int]] = []  # name, dtype, shape, first byte
        self.nbytes = 0

    def takes(self, tensors: Iterable[Tensor]) -> bool:
        """Whether there is room for all of them, in this order."""
        end = self.nbytes
        for tensor in tensors:
            if (
                end % tensor.itemsize
            ):  # the servers expect no gaps; where dtypes change at an odd length, a new bucket begins
                return False
            end += tensor.nbytes
        return end <= len(self._buffer)

    def add(self, name: str, tensor: Tensor) -> None:
        self.contents.append((name, tensor.dtype, tensor.shape, self.nbytes))
        self._buffer[self.nbytes : self.nbytes + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(
            tensor
        )
        self.nbytes += tensor.nbytes

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, dtype, shape, start in self.contents:
            yield (
                name,
                self._buffer[start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(shape),
            )

    @property
    def data(self) -> Tensor:
        """(nbytes,) uint8"""
        return self._buffer[: self.nbytes]
