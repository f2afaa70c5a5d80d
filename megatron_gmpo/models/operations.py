"""Invertible steps between Hugging Face tensors and the tensor-parallel shards of a Megatron parameter."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Operation(Protocol):
    """Conversion between Hugging Face tensors, a full Megatron tensor, and its tensor-parallel shards."""

    def join(self, tensors: list[Tensor]) -> Tensor:
        """Return the full Megatron tensor made of the Hugging Face tensors."""
        ...

    def separate(self, tensor: Tensor) -> list[Tensor]:
        """Return the Hugging Face tensors; the inverse of ``join``."""
        ...

    def shard(self, tensor: Tensor, rank: int, size: int) -> Tensor:
        """Return the part of the full tensor that tensor-parallel rank ``rank`` of ``size`` holds."""
        ...

    def unshard(self, shards: list[Tensor]) -> Tensor:
        """Return the full tensor from all shards in rank order; the inverse of ``shard``."""
        ...


@dataclass(frozen=True)
class Replicated:
    """One Hugging Face tensor, identical on every tensor-parallel rank."""

    def join(self, tensors: list[Tensor]) -> Tensor:
        return tensors[0]

    def separate(self, tensor: Tensor) -> list[Tensor]:
        return [tensor]

    def shard(self, tensor: Tensor, rank: int, size: int) -> Tensor:
        return tensor

    def unshard(self, shards: list[Tensor]) -> Tensor:
        return shards[0]


@dataclass(frozen=True)
class Split(Replicated):
    """One tensor split along ``dim``: 0 for a column-parallel layer, 1 for a row-parallel layer."""

    dim: int

    def shard(self, tensor: Tensor, rank: int, size: int) -> Tensor:
        return tensor.chunk(size, self.dim)[rank]

    def unshard(self, shards: list[Tensor]) -> Tensor:
        return torch.cat(shards, self.dim)


def padded_vocab_size(vocab_size: int, tensor_parallel_size: int = 1) -> int:
    """Return ``vocab_size`` rounded up to a multiple of 128 and of the tensor-parallel size."""
    multiple = math.lcm(128, tensor_parallel_size)
    return math.ceil(vocab_size / multiple) * multiple


@dataclass(frozen=True)
class Vocabulary(Split):
    """An embedding or output matrix (vocabulary, hidden), padded with zero rows to ``padded_size`` rows."""

    size: int
    padded_size: int

    def join(self, tensors: list[Tensor]) -> Tensor:
        if self.padded_size == self.size:  # avoid a copy of the model's largest tensor
            return tensors[0]
        return torch.nn.functional.pad(tensors[0], (0, 0, 0, self.padded_size - self.size))

    def separate(self, tensor: Tensor) -> list[Tensor]:
        return [tensor[: self.size]]


@dataclass(frozen=True)
class QueryKeyValue(Split):
    """Query, key and value projections, interleaved by query group.

    The rows of each key-value head are contiguous: first its queries, then its key, then its value.
    """

    groups: int
    queries_per_group: int
    head_dim: int

    def join(self, tensors: list[Tensor]) -> Tensor:
        rest = tensors[0].shape[1:]
        return torch.cat([t.reshape(self.groups, -1, *rest) for t in tensors], 1).reshape(-1, *rest)

    def separate(self, tensor: Tensor) -> list[Tensor]:
        rest = tensor.shape[1:]
        sizes = [self.queries_per_group * self.head_dim, self.head_dim, self.head_dim]
        return [t.reshape(-1, *rest) for t in tensor.reshape(self.groups, -1, *rest).split(sizes, 1)]


@dataclass(frozen=True)
class GateUp(Replicated):
    """Gate and up projections stacked along dim 0; every rank holds its part of both."""

    def join(self, tensors: list[Tensor]) -> Tensor:
        return torch.cat(tensors, 0)

    def separate(self, tensor: Tensor) -> list[Tensor]:
        return list(tensor.chunk(2, 0))

    def shard(self, tensor: Tensor, rank: int, size: int) -> Tensor:
        return torch.cat([half.chunk(size, 0)[rank] for half in tensor.chunk(2, 0)], 0)

    def unshard(self, shards: list[Tensor]) -> Tensor:
        gates, ups = zip(*(shard.chunk(2, 0) for shard in shards), strict=True)
        return torch.cat([*gates, *ups], 0)
