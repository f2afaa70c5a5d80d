"""Tensor names and layouts, Hugging Face <-> Megatron: one table per family, read in both directions.

A row of a table is ``(Megatron name, Hugging Face name or names, operation)``. An operation knows how one or more Hugging Face tensors
make one full Megatron tensor, how that is cut over tensor-parallel ranks, and the inverse of both.

Megatron names are canonical: those of the plain torch layer spec, with global layer and expert numbers. Transformer Engine fuses a norm
into the linear layer behind it and groups experts, which changes names only; ``canonical_name`` undoes that.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

ROUTER_BIAS = "mlp.router.expert_bias"
"""How the canonical name of a router's bias ends. Megatron has it as a buffer, in fp32 whatever the model's dtype."""


class Operation(Protocol):
    """An invertible step between full Hugging Face tensors and the shards of one Megatron parameter."""

    def join(self, tensors: list[Tensor]) -> Tensor:
        """Hugging Face tensors -> the full Megatron tensor."""
        ...

    def separate(self, tensor: Tensor) -> list[Tensor]:
        """Inverse of ``join``."""
        ...

    def shard(self, tensor: Tensor, rank: int, size: int) -> Tensor:
        """The part of the full tensor that tensor-parallel rank ``rank`` of ``size`` holds."""
        ...

    def unshard(self, shards: list[Tensor]) -> Tensor:
        """Inverse of ``shard``, from all ranks' parts in rank order."""
        ...


@dataclass(frozen=True)
class Replicated:
    """The same on every tensor-parallel rank."""

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
    """Cut along ``dim``: 0 for the output of a column-parallel layer, 1 for the input of a row-parallel one."""

    dim: int

    def shard(self, tensor: Tensor, rank: int, size: int) -> Tensor:
        return tensor.chunk(size, self.dim)[rank]

    def unshard(self, shards: list[Tensor]) -> Tensor:
        return torch.cat(shards, self.dim)


@dataclass(frozen=True)
class Vocabulary(Split):
    """An embedding or output matrix (vocabulary, hidden), padded with zero rows to ``padded_size`` so that every rank's part is equal."""

    size: int
    padded_size: int

    def join(self, tensors: list[Tensor]) -> Tensor:
        if self.padded_size == self.size:  # the largest tensor of a model need not be copied
            return tensors[0]
        return torch.nn.functional.pad(tensors[0], (0, 0, 0, self.padded_size - self.size))

    def separate(self, tensor: Tensor) -> list[Tensor]:
        return [tensor[: self.size]]


@dataclass(frozen=True)
class QueryKeyValue(Split):
    """Query, key and value projections interleaved by query group: for each key/value head its queries, its key, its value."""

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


@dataclass(frozen=True)
class Row:
    """One line of a table. ``{l}`` stands for the layer's number, ``{e}`` for the expert's, both global and from 0."""

    megatron: str
    hf: tuple[str, ...]
    operation: Operation


class Mapping:
    """A family's table for one model.

    Args:
        rows: the table.
        tied: the output layer shares the embedding's weight, and Hugging Face stores it once.
        left_out: beginnings of Hugging Face names that a folder may have and the model does not.
    """

    def __init__(self, rows: list[Row], tied: bool, left_out: tuple[str, ...] = ()) -> None:
        self.tied, self.left_out = tied, left_out
        self._rows = [(_pattern(row.megatron), row) for row in rows]

    def find(self, name: str) -> Row:
        """The row of a canonical Megatron name, with the numbers filled in.

        Raises:
            KeyError: the table has no such row; the message names the parameter.
        """
        for pattern, row in self._rows:
            if found := pattern.fullmatch(name):
                numbers = found.groupdict()
                return Row(name, tuple(hf.format(**numbers) for hf in row.hf), row.operation)
        raise KeyError(f"no conversion rule for Megatron parameter {name!r}")


def canonical_name(name: str) -> str:
    """The plain-torch name of a parameter of either layer spec.

    Example: ``decoder.layers.0.mlp.experts.linear_fc1.weight3`` -> ``decoder.layers.0.mlp.experts.local_experts.3.linear_fc1.weight``.
    """
    name = name.replace(".self_attention.linear_qkv.layer_norm_weight", ".input_layernorm.weight")
    name = re.sub(r"\.linear_(q|kv)_up_proj\.layer_norm_weight$", r".\1_layernorm.weight", name)
    name = name.replace(".mlp.linear_fc1.layer_norm_weight", ".pre_mlp_layernorm.weight")
    return re.sub(r"\.experts\.(linear_fc[12])\.weight(\d+)$", r".experts.local_experts.\2.\1.weight", name)


def is_expert(name: str) -> bool:
    """Whether a canonical name belongs to a routed expert, which expert parallelism spreads over ranks."""
    return ".mlp.experts.local_experts." in name


def with_global_numbers(name: str, layer_numbers: dict[int, int], first_expert: int) -> str:
    """Replaces this rank's layer and expert numbers in a canonical name by global ones."""
    name = re.sub(r"^decoder\.layers\.(\d+)\.", lambda m: f"decoder.layers.{layer_numbers[int(m[1])]}.", name)
    return re.sub(r"\.local_experts\.(\d+)\.", lambda m: f".local_experts.{int(m[1]) + first_expert}.", name)


def expand(rows: list[Row], num_layers: int, num_experts: int) -> Iterator[Row]:
    """Every row for every layer and expert. Rows of layers a model does not have in that form are included too."""
    for row in rows:
        layers = range(num_layers) if "{l}" in row.megatron else [0]
        experts = range(num_experts) if "{e}" in row.megatron else [0]
        for layer in layers:
            for expert in experts:
                yield Row(
                    row.megatron.format(l=layer, e=expert),
                    tuple(hf.format(l=layer, e=expert) for hf in row.hf),
                    row.operation,
                )


def _pattern(megatron: str) -> re.Pattern[str]:
    return re.compile(re.escape(megatron).replace(r"\{l\}", r"(?P<l>\d+)").replace(r"\{e\}", r"(?P<e>\d+)"))
