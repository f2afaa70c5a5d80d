"""Fused kernels that are on by default with Transformer Engine. Not run on a GPU yet.

Without the first and the last, the host waits for the device several times in every layer: the plain rotary
embedding of packed sequences reads their lengths, and the plain permutation of tokens to experts reads how
many each expert gets (rope_utils.py and moe_utils.py in Megatron).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FUSIONS = ("apply_rope_fusion", "bias_activation_fusion", "moe_permute_fusion")
"""Fields of TransformerConfig."""


def fusions_off(fields: Mapping[str, Any]) -> dict[str, str]:
    """Return each of ``FUSIONS`` that cannot be used, with the reason.

    Args:
        fields: fields of TransformerConfig; a missing one has Megatron's default.
    """
    reasons = {
        "apply_rope_fusion": {
            "the kernel of latent attention is experimental": fields.get("multi_latent_attention"),
            # fused_apply_rotary_pos_emb_thd in extensions/transformer_engine.py has no such argument
            "the kernel numbers the tokens of a sequence, and mRoPE has other positions": fields.get(
                "mrope_section"
            ),
            "Megatron passes rotary_interleaved to no kernel for packed sequences": fields.get(
                "rotary_interleaved"
            ),
        },
        "bias_activation_fusion": {
            "use_te_activation_func fuses it otherwise": fields.get("use_te_activation_func"),
        },
        "moe_permute_fusion": {
            "the model has no experts": not fields.get("num_moe_experts"),
        },
    }
    return {name: reason for name in FUSIONS for reason, forbidden in reasons[name].items() if forbidden}


def describe_fusions(fields: Mapping[str, Any]) -> str:
    """Return one phrase that says which of ``FUSIONS`` are on, and why the others are off."""
    off = fusions_off(fields)
    states = {name: "on" if fields[name] else f"off ({off.get(name, 'in the config')})" for name in FUSIONS}
    return ", ".join(f"{name} {state}" for name, state in states.items())
