"""DeepSeek-V3, DeepSeek-R1 and models with the same ``model_type`` such as Moonlight (arXiv 2412.19437)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .decoder import (
    HF_LAYER,
    LAYER,
    biased_router,
    decoder_architecture,
    dense_mlp,
    embedding_and_head,
    mlp_norm,
    no_attention_bias,
    routed_experts,
    shared_experts,
    sigmoid_routing,
)
from .family import Family, HFConfig, refuse
from .mapping import Row, fused_name
from .operations import Replicated, Split


def _latent_attention() -> list[Row]:
    """Return the rows of multi-head latent attention and of the norm before it.

    A model has either ``q_proj`` or, if ``q_lora_rank`` is set, ``q_a_proj``, its norm and ``q_b_proj``. The
    norm before the attention is never fused, because several linear layers follow it.
    """
    ours, theirs = LAYER + "self_attention.", HF_LAYER + "self_attn."
    return [
        Row(LAYER + "input_layernorm.weight", (HF_LAYER + "input_layernorm.weight",), Replicated()),
        Row(ours + "linear_q_proj.weight", (theirs + "q_proj.weight",), Split(0)),
        Row(ours + "linear_q_down_proj.weight", (theirs + "q_a_proj.weight",), Replicated()),
        _latent_norm(ours + "q_layernorm.weight", theirs + "q_a_layernorm.weight"),
        Row(ours + "linear_q_up_proj.weight", (theirs + "q_b_proj.weight",), Split(0)),
        Row(ours + "linear_kv_down_proj.weight", (theirs + "kv_a_proj_with_mqa.weight",), Replicated()),
        _latent_norm(ours + "kv_layernorm.weight", theirs + "kv_a_layernorm.weight"),
        Row(ours + "linear_kv_up_proj.weight", (theirs + "kv_b_proj.weight",), Split(0)),
        Row(ours + "linear_proj.weight", (theirs + "o_proj.weight",), Split(1)),
    ]


def _latent_norm(ours: str, theirs: str) -> Row:
    """Return the row of a latent's norm, which only Transformer Engine's layer spec fuses."""
    keys = (fused_name(ours), ours)
    return Row(ours, (theirs,), Replicated(), dense_keys=keys, moe_keys=keys)


def _mlp_norm() -> Row:
    """Return the row of the norm before the MLP. Only Transformer Engine fuses it, in dense layers."""
    row = mlp_norm()
    return replace(row, dense_keys=(fused_name(row.megatron), row.megatron), moe_keys=())


def _architecture(hf: HFConfig) -> dict[str, Any]:
    no_attention_bias(hf)
    halves = not hf.rope_interleave
    refuse(hf, "rope_interleave", halves, "latent attention supports interleaved rotary channels only")
    rotary = hf.qk_rope_head_dim
    refuse(hf, "head_dim", hf.head_dim != rotary, f"it must equal qk_rope_head_dim = {rotary}")
    grouped = hf.num_key_value_heads != hf.num_attention_heads
    refuse(hf, "num_key_value_heads", grouped, f"every one of the {hf.num_attention_heads} heads has its own")
    return {
        **decoder_architecture(hf),
        **sigmoid_routing(hf),
        **_rotary(hf),
        "multi_latent_attention": True,
        "qk_layernorm": True,
        "num_query_groups": hf.num_attention_heads,
        "q_lora_rank": hf.q_lora_rank,
        "kv_lora_rank": hf.kv_lora_rank,
        "qk_head_dim": hf.qk_nope_head_dim,
        "qk_pos_emb_head_dim": hf.qk_rope_head_dim,
        "v_head_dim": hf.v_head_dim,
    }


def _rotary(hf: HFConfig) -> dict[str, Any]:
    """Return MLATransformerConfig's rotary fields.

    Source of the YaRN fields: _compute_yarn_parameters in modeling_rope_utils.py of transformers.
    """
    rope = hf.rope_parameters
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return {"rope_type": "rope", "rotary_base": rope["rope_theta"], "rotary_scaling_factor": 1.0}
    mscale, mscale_all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
    for wrong, why in (
        (kind != "yarn", "latent attention supports default and yarn only"),
        (rope.get("attention_factor") is not None, "attention_factor is not supported"),
        (not rope.get("truncate", True), "truncate = false is not supported"),
        (mscale_all_dim and not mscale, "mscale_all_dim without mscale is not supported"),
    ):
        refuse(hf, "rope_parameters", wrong, why)
    return {
        "rope_type": "yarn",
        "rotary_base": rope["rope_theta"],
        "rotary_scaling_factor": rope["factor"],
        "original_max_position_embeddings": rope["original_max_position_embeddings"],
        "beta_fast": rope.get("beta_fast") or 32,
        "beta_slow": rope.get("beta_slow") or 1,
        "mscale": mscale if mscale_all_dim else 1.0,  # transformers ignores mscale without mscale_all_dim
        "mscale_all_dim": mscale_all_dim or 0.0,
    }


DEEPSEEK_V3 = Family(
    lambda hf, vocab: [
        *embedding_and_head(hf, vocab),
        *_latent_attention(),
        _mlp_norm(),
        *dense_mlp(),  # the first first_k_dense_replace layers
        *routed_experts(),
        *biased_router(),
        *shared_experts(),
    ],
    _architecture,
    code=frozenset({"configuration_deepseek", "modeling_deepseek"}),
)
