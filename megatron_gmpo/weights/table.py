"""The table of a model's parameters: names in both formats, shapes, and places in a Megatron checkpoint."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError, one_line
from ..models import FAMILIES
from ..models.description import architecture_of, auto_class, read_hf_config, vision_of
from ..models.family import language_config
from ..models.hub import hub_names, stacked_name
from ..models.mapping import TOWER, Row, expand, is_expert
from ..models.operations import Operation, padded_vocab_size
from .torch_dist import Place, place_of


@dataclass(frozen=True)
class Entry:
    """One Megatron parameter and the Hugging Face tensors that form it.

    Attributes:
        name: canonical Megatron name, with global layer and expert numbers.
        hf: names of the tensors on the hub.
        hf_shapes: shapes of the tensors on the hub.
        shape: shape of the complete Megatron parameter.
        operation: operation that forms the parameter from the tensors.
        keys: the parameter's keys in a torch_dist checkpoint, see ``models.mapping.Row``.
        stack: name of the tensor on the hub that holds this expert and all others, see
            ``models.hub.stacked_name``; "" if the hub has the tensors ``hf`` themselves.
    """

    name: str
    hf: tuple[str, ...]
    hf_shapes: tuple[tuple[int, ...], ...]
    shape: tuple[int, ...]
    operation: Operation
    keys: tuple[str, ...]
    stack: str

    @property
    def numel(self) -> int:
        return sum(map(math.prod, self.hf_shapes))


class ConversionTable:
    """The table of every parameter of a model.

    transformers determines the tensors and their shapes: it builds the model of config.json on the meta
    device. The family's table gives their Megatron names.

    Args:
        folder: folder with a config.json.

    Raises:
        InputError: the folder has no config.json, or the family has no table.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.whole = read_hf_config(str(folder))
        self.hf = language_config(self.whole)
        family = FAMILIES[self.whole.model_type]
        self._architecture = architecture_of(self.whole)
        self.num_experts: int = self._architecture.get("num_moe_experts") or 0
        self._stacked = isinstance(self._architecture.get("moe_layer_freq", 1), int)
        shapes = _hub_shapes(self.whole)
        vision = vision_of(self.whole)
        rows = family.rows(self.hf, padded_vocab_size(self.hf.vocab_size))
        tower = vision.parameters() if vision else ()
        rows = expand(rows, self.hf.num_hidden_layers, self.num_experts, tower)
        rows = [row for row in rows if shapes.keys() >= set(row.hf)]
        moe_layers = {_layer(row.megatron) for row in rows if is_expert(row.megatron)}
        self.entries = [
            _entry(row, shapes, _layer(row.megatron) in moe_layers, self.whole.model_type) for row in rows
        ]
        self.entries.sort(key=lambda entry: _natural(entry.hf[0]))
        missing = shapes.keys() - set(self.hf_names)
        assert not missing, f"the table of {self.whole.model_type} lacks {sorted(missing)[:3]}"

    @property
    def hf_names(self) -> Iterator[str]:
        return (name for entry in self.entries for name in entry.hf)

    @property
    def numel(self) -> int:
        """Return the number of parameters."""
        return sum(entry.numel for entry in self.entries)

    @property
    def active_numel(self) -> int:
        """Return the number of parameters that process one token of text.

        These are all without the experts that are not chosen and the vision tower.
        """
        routed = sum(entry.numel for entry in self.entries if is_expert(entry.name))
        tower = sum(entry.numel for entry in self.entries if entry.name.startswith(TOWER))
        chosen = routed * self._architecture["moe_router_topk"] // self.num_experts if routed else 0
        return self.numel - tower - routed + chosen

    def places(self, entry: Entry, *, stacked: bool | None = None) -> tuple[Place, ...]:
        """Return the places where Megatron's layer specs look for a parameter, Transformer Engine's first.

        Args:
            stacked: whether the layers are stacked along an axis; None means Megatron's choice for the model.
        """
        return tuple(
            place_of(
                key,
                num_layers=self.hf.num_hidden_layers,
                num_experts=self.num_experts,
                stacked=self._stacked if stacked is None else stacked,
            )
            for key in entry.keys
        )

    def extra_states(self) -> list[Place]:
        """Return the places where Megatron's layer specs look for the ``_extra_state`` of a module."""
        states: dict[Place, None] = {}
        for entry in self.entries:
            place = self.places(entry)[0]
            module, _, tensor = place.key.rpartition(".")
            has_state = module.startswith("decoder.") and not module.endswith(".router")
            if has_state and tensor in ("weight", "layer_norm_weight"):
                states[Place(f"{module}._extra_state", place.index, place.axes)] = None
            if module.endswith(".linear_proj"):
                attention = module.replace("linear_proj", "core_attention")
                states[Place(f"{attention}._extra_state", place.index, place.axes)] = None
        return list(states)


def _hub_shapes(whole: Any) -> dict[str, tuple[int, ...]]:
    """Return name on the hub -> shape of every tensor that transformers would save for this config."""
    try:
        with torch.device("meta"):
            model = auto_class(whole).from_config(whole, trust_remote_code=False, attn_implementation="sdpa")
    except Exception as error:  # an odd type or value raises anything
        raise InputError(
            f"transformers cannot build a model of this config.json ({one_line(error)}): correct it"
        ) from None
    shapes: dict[str, tuple[int, ...]] = {}
    for own_name, tensor in model.state_dict().items():
        names, shape = hub_names(own_name, whole.model_type), tuple(tensor.shape)
        if "{e}" in names[0]:  # stacked experts
            experts, rows, columns = shape
            part = (rows // len(names), columns)
            shapes |= {name.format(e=e): part for e in range(experts) for name in names}
        elif not (whole.tie_word_embeddings and names[0] == "lm_head.weight"):
            shapes[names[0]] = shape
    return shapes


def _entry(row: Row, shapes: dict[str, tuple[int, ...]], in_moe_layer: bool, model_type: str) -> Entry:
    hf_shapes = tuple(shapes[name] for name in row.hf)
    keys = (row.moe_keys if in_moe_layer else row.dense_keys) or (row.megatron,)
    return Entry(
        row.megatron,
        row.hf,
        hf_shapes,
        _joined_shape(row.operation, hf_shapes),
        row.operation,
        keys,
        stacked_name(row.hf[0], model_type) if is_expert(row.megatron) else "",
    )


@cache  # thousands of parameters have a few shapes
def _joined_shape(operation: Operation, shapes: tuple[tuple[int, ...], ...]) -> tuple[int, ...]:
    return tuple(operation.join([torch.empty(shape, device="meta") for shape in shapes]).shape)


def _layer(name: str) -> str | None:
    found = re.match(r"decoder\.layers\.\d+\.", name)
    return found and found[0]


def _natural(name: str) -> list[str]:
    """Return a sort key that puts layer 2 before layer 10."""
    return [part.zfill(6) if part.isdigit() else part for part in name.split(".")]
