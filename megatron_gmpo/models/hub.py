"""Map the tensor names of transformers 5 to names on the hub, with transformers' own conversion rules.

On the hub each routed expert has its own tensors. transformers stacks them into ``experts.gate_up_proj``
(E, 2F, H) and ``experts.down_proj`` (E, H, F), and renames the modules of some families
(transformers/conversion_mapping.py).
"""

from __future__ import annotations

from functools import cache

from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, apply_renamings


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


@cache
def _rules(model_type: str) -> tuple[list[WeightConverter], list[WeightRenaming]]:
    """Return the rules that join tensors on loading, and the rules that rename tensors on saving."""
    rules = get_checkpoint_conversion_mapping(model_type) or []
    reverses = [rule.reverse_transform() for rule in reversed(rules)]
    return [rule for rule in rules if isinstance(rule, WeightConverter)], [
        rule for rule in reverses if isinstance(rule, WeightRenaming)
    ]
