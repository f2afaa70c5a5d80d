"""Tensor names, Hugging Face <-> Megatron: one table of rows per family, read in both directions.

Megatron names are canonical: the names of the plain torch layer spec, with global layer and expert numbers.
Transformer Engine fuses a norm into the linear layer that follows it and groups experts, which changes names
only. ``canonical_name`` reverts these changes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from .operations import Operation

ROUTER_BIAS = "mlp.router.expert_bias"
"""End of the canonical name of a router's bias, which is an fp32 buffer in every Megatron model."""

TOWER = "visual."
"""Beginning of the canonical names of a vision tower's parameters."""

_FUSED_NORMS = {
    ".input_layernorm.": ".self_attention.linear_qkv.layer_norm_",
    ".pre_mlp_layernorm.": ".mlp.linear_fc1.layer_norm_",
    ".q_layernorm.": ".linear_q_up_proj.layer_norm_",
    ".kv_layernorm.": ".linear_kv_up_proj.layer_norm_",
}
"""Name of a norm -> its name if Transformer Engine fuses it into the linear layer that follows it."""


@dataclass(frozen=True)
class Row:
    """One row of a table.

    ``{l}`` is the global layer number, ``{e}`` the global expert number, and ``{n}`` the name of a parameter
    of the vision tower.

    Attributes:
        megatron: canonical name of the Megatron parameter.
        hf: names on the hub of the tensors that form the parameter.
        operation: operation that forms the parameter from these tensors.
        dense_keys: the parameter's keys in a torch_dist checkpoint. Megatron's layer specs may use different
            keys (gpt_layer_specs.py); Transformer Engine's comes first. Empty if the only key is the name.
        moe_keys: the keys in a layer with routed experts; empty if the only key is the name.
    """

    megatron: str
    hf: tuple[str, ...]
    operation: Operation
    dense_keys: tuple[str, ...] = ()
    moe_keys: tuple[str, ...] = ()

    def numbered(self, **numbers: Any) -> Row:
        """Return the row with ``l``, ``e`` and ``n`` filled in."""
        hf, dense_keys, moe_keys = (
            tuple(name.format(**numbers) for name in names)
            for names in (self.hf, self.dense_keys, self.moe_keys)
        )
        return Row(self.megatron.format(**numbers), hf, self.operation, dense_keys, moe_keys)


class Mapping:
    """A family's table for one model.

    Args:
        rows: the table.
        tied: whether the output layer shares the embedding's weight, which Hugging Face then stores once.
        left_out: prefixes of Hugging Face names that a folder may contain but the model does not have.
    """

    def __init__(self, rows: list[Row], tied: bool, left_out: tuple[str, ...] = ()) -> None:
        self.tied, self.left_out = tied, left_out
        self._rows = [(_pattern(row.megatron), row) for row in rows]

    def find(self, name: str) -> Row:
        """Return the row of a canonical Megatron name, with the numbers filled in.

        Raises:
            KeyError: the table has no such row; the message names the parameter.
        """
        for pattern, row in self._rows:
            if found := pattern.fullmatch(name):
                return row.numbered(**found.groupdict())
        raise KeyError(f"no conversion rule for Megatron parameter {name!r}")


def canonical_name(name: str) -> str:
    """Return the plain torch name of a parameter of either layer spec.

    Example: ``decoder.layers.0.mlp.experts.linear_fc1.weight3`` ->
    ``decoder.layers.0.mlp.experts.local_experts.3.linear_fc1.weight``.
    """
    for norm, fused in _FUSED_NORMS.items():
        name = name.replace(fused, norm)
    return re.sub(r"\.experts\.(linear_fc[12])\.weight(\d+)$", r".experts.local_experts.\2.\1.weight", name)


def fused_name(name: str) -> str:
    """Return the name of a norm if Transformer Engine fuses it; the inverse of ``canonical_name``."""
    for norm, fused in _FUSED_NORMS.items():
        name = name.replace(norm, fused)
    return name


def is_expert(name: str) -> bool:
    """Return whether a canonical name belongs to a routed expert."""
    return ".mlp.experts.local_experts." in name


def with_global_numbers(name: str, layer_numbers: dict[int, int], first_expert: int) -> str:
    """Replace this rank's layer and expert numbers in a canonical name by the global numbers.

    Args:
        layer_numbers: local layer number -> global layer number.
        first_expert: global number of this rank's first expert.
    """
    name = re.sub(r"^decoder\.layers\.(\d+)\.", lambda m: f"decoder.layers.{layer_numbers[int(m[1])]}.", name)
    return re.sub(r"\.local_experts\.(\d+)\.", lambda m: f".local_experts.{int(m[1]) + first_expert}.", name)


def expand(rows: list[Row], num_layers: int, num_experts: int, tower: Iterable[str] = ()) -> Iterator[Row]:
    """Yield every row for every layer and expert, including combinations that the model does not have.

    Args:
        tower: names of the vision tower's parameters.
    """
    for row in rows:
        for layer in range(num_layers) if "{l}" in row.megatron else [0]:
            for expert in range(num_experts) if "{e}" in row.megatron else [0]:
                for name in tower if "{n}" in row.megatron else [""]:
                    yield row.numbered(l=layer, e=expert, n=name)


def _pattern(megatron: str) -> re.Pattern[str]:
    pattern = re.escape(megatron)
    for group, content in (("l", r"\d+"), ("e", r"\d+"), ("n", r".+")):
        pattern = pattern.replace(rf"\{{{group}\}}", f"(?P<{group}>{content})")
    return re.compile(pattern)
