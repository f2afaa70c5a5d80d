"""Rows of the name table and architecture fields that several decoder families share."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F

from .family import HFConfig, refuse
from .mapping import ROUTER_BIAS, Row, fused_name
from .operations import GateUp, QueryKeyValue, Replicated, Split, Vocabulary

LAYER = "decoder.layers.{l}."
HF_LAYER = "model.layers.{l}."


def head_dim(hf: HFConfig) -> int:
    """Return the number of channels of one attention head."""
    return getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads


def embedding_and_head(hf: HFConfig, padded_vocab_size: int) -> list[Row]:
    """Return the rows of the embedding, the final norm and the output layer."""
    vocabulary = Vocabulary(0, hf.vocab_size, padded_vocab_size)
    return [
        Row("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), vocabulary),
        Row("decoder.final_layernorm.weight", ("model.norm.weight",), Replicated()),
        Row("output_layer.weight", ("lm_head.weight",), vocabulary),
    ]


def attention(hf: HFConfig, *, bias: bool, qk_norm: bool) -> list[Row]:
    """Return the rows of grouped-query attention and of the norm before it."""
    groups = hf.num_key_value_heads
    qkv = QueryKeyValue(0, groups, hf.num_attention_heads // groups, head_dim(hf))
    norm, ours, theirs = LAYER + "input_layernorm.weight", LAYER + "self_attention.", HF_LAYER + "self_attn."
    fused = (fused_name(norm),)  # the key of both layer specs
    rows = [
        Row(norm, (HF_LAYER + "input_layernorm.weight",), Replicated(), dense_keys=fused, moe_keys=fused),
        Row(ours + "linear_qkv.weight", tuple(f"{theirs}{x}_proj.weight" for x in "qkv"), qkv),
        Row(ours + "linear_proj.weight", (theirs + "o_proj.weight",), Split(1)),
    ]
    if bias:
        rows.append(Row(ours + "linear_qkv.bias", tuple(f"{theirs}{x}_proj.bias" for x in "qkv"), qkv))
    if qk_norm:
        rows += [
            Row(f"{ours}{x}_layernorm.weight", (f"{theirs}{x}_norm.weight",), Replicated()) for x in "qk"
        ]
    return rows


def mlp_norm() -> Row:
    """Return the row of the norm between attention and MLP.

    Megatron's plain layer spec stores it fused in every layer, Transformer Engine's in dense layers only.
    """
    norm = LAYER + "pre_mlp_layernorm.weight"
    return Row(
        norm,
        (HF_LAYER + "post_attention_layernorm.weight",),
        Replicated(),
        dense_keys=(fused_name(norm),),
        moe_keys=(norm, fused_name(norm)),
    )


def gated_mlp(ours: str, theirs: str) -> list[Row]:
    """Return the rows of an MLP whose Megatron and Hugging Face names begin with ``ours`` and ``theirs``."""
    return [
        Row(ours + "linear_fc1.weight", (theirs + "gate_proj.weight", theirs + "up_proj.weight"), GateUp()),
        Row(ours + "linear_fc2.weight", (theirs + "down_proj.weight",), Split(1)),
    ]


def dense_mlp() -> list[Row]:
    """Return the rows of a dense layer's MLP."""
    return gated_mlp(LAYER + "mlp.", HF_LAYER + "mlp.")


def routed_experts() -> list[Row]:
    """Return the rows of a router and its experts."""
    return [
        Row(LAYER + "mlp.router.weight", (HF_LAYER + "mlp.gate.weight",), Replicated()),
        *gated_mlp(LAYER + "mlp.experts.local_experts.{e}.", HF_LAYER + "mlp.experts.{e}."),
    ]


def biased_router() -> list[Row]:
    """Return the row of the bias that is added to the scores to choose experts. It has no gradient."""
    return [Row(LAYER + ROUTER_BIAS, (HF_LAYER + "mlp.gate.e_score_correction_bias",), Replicated())]


def shared_experts() -> list[Row]:
    """Return the rows of the experts that process every token; both sides store them as one MLP."""
    return gated_mlp(LAYER + "mlp.shared_experts.", HF_LAYER + "mlp.shared_experts.")


def decoder_architecture(hf: HFConfig) -> dict[str, Any]:
    """Return the TransformerConfig fields of a pre-norm RMSNorm decoder with gated SiLU MLPs.

    Raises:
        InputError: the config requires a computation that the model code does not implement.
    """
    refuse(hf, "hidden_act", hf.hidden_act != "silu", "only silu is supported")
    # these fields also decide what transformers' cache keeps (cache_utils.py:get_layer_types_and_kwargs)
    for field in ("sliding_window", "attention_chunk_size", "kv_sharing_modes"):
        refuse(hf, field, getattr(hf, field, None), "attention to a part of the sequence is not supported")
    other_layers = set(getattr(hf, "layer_types", None) or []) - {"full_attention"}
    refuse(hf, "layer_types", other_layers, "only full_attention is supported")
    refuse(hf, "is_causal", not getattr(hf, "is_causal", True), "only causal attention is supported")
    refuse(hf, "per_layer_config", hf.is_heterogeneous, "all layers must have the same shape")
    heads = hf.num_attention_heads
    refuse(hf, "num_key_value_heads", heads % hf.num_key_value_heads, f"it must divide the {heads} heads")
    outside = (hf.pad_token_id or 0) >= hf.vocab_size
    refuse(hf, "pad_token_id", outside, f"the vocabulary has {hf.vocab_size} tokens")
    return {
        "num_layers": hf.num_hidden_layers,
        "hidden_size": hf.hidden_size,
        "ffn_hidden_size": hf.intermediate_size,
        "num_attention_heads": hf.num_attention_heads,
        "num_query_groups": hf.num_key_value_heads,
        "kv_channels": head_dim(hf),
        "layernorm_epsilon": hf.rms_norm_eps,
        "normalization": "RMSNorm",
        "activation_func": F.silu,
        "gated_linear_unit": True,
        "add_bias_linear": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
    }


def sigmoid_routing(hf: HFConfig) -> dict[str, Any]:
    """Return the TransformerConfig fields of grouped experts with sigmoid scores, a bias and shared experts.

    Source: arXiv 2412.19437, section 2.1.2.

    Raises:
        InputError: the config requires a computation that Megatron's router does not implement.
    """
    dense, layers, topk = hf.first_k_dense_replace, hf.num_hidden_layers, hf.num_experts_per_tok
    in_groups = (hf.n_group or 1) > (hf.topk_group or 1)  # if false, every group is chosen
    refuse(hf, "first_k_dense_replace", dense >= layers, "a model without experts is not supported")
    refuse(hf, "n_shared_experts", not hf.n_shared_experts, "a model without shared experts is not supported")
    refuse(
        hf,
        "norm_topk_prob",
        hf.norm_topk_prob != (topk > 1),
        "Megatron normalizes the scores over the chosen experts if there are several, and only then",
    )
    # a group's score is the sum of its best 2 in transformers and of its best topk // topk_group in Megatron
    # (moe_utils.py:group_limited_topk)
    refuse(
        hf,
        "topk_group",
        in_groups and topk // hf.topk_group != 2,
        f"only half of num_experts_per_tok = {topk} or all n_group = {hf.n_group} is supported",
    )
    return {
        "num_moe_experts": hf.n_routed_experts,
        "moe_ffn_hidden_size": hf.moe_intermediate_size,
        "moe_shared_expert_intermediate_size": hf.moe_intermediate_size * hf.n_shared_experts,
        "moe_layer_freq": [0] * dense + [1] * (layers - dense) if dense else 1,
        "moe_router_topk": topk,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_num_groups": hf.n_group if in_groups else None,
        "moe_router_group_topk": hf.topk_group if in_groups else None,
        "moe_router_topk_scaling_factor": hf.routed_scaling_factor,
    }


def prediction_layers(hf: HFConfig) -> tuple[str, ...]:
    """Return the name prefixes of multi-token prediction layers, which are not part of the model."""
    first, count = hf.num_hidden_layers, getattr(hf, "num_nextn_predict_layers", None) or 0
    return tuple(HF_LAYER.format(l=layer) for layer in range(first, first + count))


def no_attention_bias(hf: HFConfig) -> None:
    """Raise an InputError if the attention has biases."""
    bias = getattr(hf, "attention_bias", False)
    refuse(hf, "attention_bias", bias, "this family's table has no attention biases")
