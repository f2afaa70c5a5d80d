"""The parameters of a parallel Megatron model on this rank, by canonical global name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from ..models.mapping import ROUTER_BIAS, canonical_name, is_expert, with_global_numbers


@dataclass(frozen=True)
class LocalParameter:
    """A parameter, or a router's bias, on this rank.

    Attributes:
        name: canonical name, with global layer and expert numbers.
        tensor: this rank's shard.
        is_expert: whether it belongs to a routed expert.
    """

    name: str
    tensor: Tensor
    is_expert: bool


def unwrapped(chunk: Any) -> Any:
    """Return the model inside Megatron's wrappers for data parallelism and precision."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk


def local_parameters(
    chunks: list[torch.nn.Module], groups: ProcessGroupCollection
) -> Iterator[LocalParameter]:
    """Yield this rank's parameters, chunk by chunk (one chunk per virtual pipeline stage)."""
    for chunk in chunks:
        model = unwrapped(chunk)
        layer_numbers = {i: layer.layer_number - 1 for i, layer in enumerate(model.decoder.layers)}
        first_expert = groups.ep.rank() * ((model.config.num_moe_experts or 0) // groups.ep.size())
        biases = ((name, buffer) for name, buffer in model.named_buffers() if name.endswith(ROUTER_BIAS))
        for name, parameter in chain(model.named_parameters(), biases):
            name = with_global_numbers(canonical_name(name), layer_numbers, first_expert)
            yield LocalParameter(name, parameter, is_expert(name))
