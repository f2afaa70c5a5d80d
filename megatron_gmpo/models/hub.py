"""Map the tensor names of transformers 5 to names on the hub, with transformers' own conversion rules.

On the hub each routed expert has its own tensors. transformers stacks them into ``experts.gate_up_proj``
(E, 2F, H) and ``experts.down_proj`` (E, H, F), and renames the modules of some families
(transformers/conversion_mapping.py).

Qwen3-VL-MoE's folders on the hub hold stacked experts too, with the last two axes exchanged. Here each expert
has the names of Qwen3-MoE's on the hub, which SGLang accepts for both.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, apply_renamings

_RULES = {"qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration", "qwen3_vl_moe": "qwen3_moe"}
"""``model_type`` -> key of its rules in transformers, if it is another."""
_STACKED = {"qwen3_vl_moe"}
"""Each ``model_type`` with stacked experts on the hub."""


def hub_names(name: str, model_type: str) -> tuple[str, ...]:
    """Return the hub's names of the tensor that transformers calls ``name``.

    A name that is already a hub name is returned unchanged. Several names, or a name with ``{e}``, mean a
    fused tensor: its first axis has the experts, and its second axis has equal parts in the order of the
    names.

    Example: ``model.layers.0.mlp.experts.gate_up_proj`` of a mixtral model ->
    ``model.layers.0.block_sparse_moe.experts.{e}.w1.weight`` and ``...{e}.w3.weight``.
    """
    converters, renamings = _rules(model_type)
    names = (name,)
    for converter in converters:
        (fused,) = converter.target_patterns
        if name.endswith(fused):
            names = tuple(
                name.removesuffix(fused) + part.replace("*", "{e}") for part in converter.source_patterns
            )
    return tuple(apply_renamings(name, renamings) for name in names)


def stacks_experts(model_type: str) -> bool:
    """Return whether folders on the hub hold stacked experts."""
    return model_type in _STACKED


def stacked_name(name: str, model_type: str) -> str:
    """Return the name of the tensor on the hub in which an expert's tensor is stacked, or "".

    Such a tensor is (E, columns, rows): its last two axes are exchanged. The parts that ``hub_names`` returns
    are next to each other along its last axis.
    """
    if model_type in _STACKED:
        for converter in _rules(model_type)[0]:
            for part in converter.source_patterns:
                if found := re.search(re.escape(part).replace(r"\*", r"\d+") + "$", name):
                    return name[: found.start()] + converter.target_patterns[0]
    return ""


def embedding_name(config: dict[str, Any]) -> str:
    """Return the hub's name of the embedding, for the content of a config.json."""
    part = "model.language_model." if "vision_config" in config else "model."
    return hub_names(part + "embed_tokens.weight", config["model_type"])[0]


@cache
def _rules(model_type: str) -> tuple[list[WeightConverter], list[WeightRenaming]]:
    """Return the rules that join tensors on loading, and the rules that rename tensors on saving."""
    rules = get_checkpoint_conversion_mapping(_RULES.get(model_type, model_type)) or []
    reverses = [rule.reverse_transform() for rule in reversed(rules)]
    return [rule for rule in rules if isinstance(rule, WeightConverter)], [
        rule for rule in reverses if isinstance(rule, WeightRenaming)
    ]
