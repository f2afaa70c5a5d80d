"""Layer specs: Transformer Engine's on a GPU, plain torch elsewhere. The model above them is the same."""

from __future__ import annotations

from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from .attention import PackedAttention, RMSNorm


def decoder_spec(config: TransformerConfig, *, use_transformer_engine: bool, vp_stage: int | None) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage (and virtual stage)."""
    spec: Any = get_gpt_decoder_block_spec(
        config, use_transformer_engine=use_transformer_engine, normalization=config.normalization, vp_stage=vp_stage
    )
    if use_transformer_engine:
        return spec
    spec.layer_norm = RMSNorm
    for layer in spec.layer_specs or []:
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
        if layer.submodules.mlp.module is MoELayer:
            # a dense layer's norm is stored as part of linear_fc1, which a MoE layer does not have: the key of Transformer Engine's spec
            layer.submodules.sharded_state_dict_keys_map = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
        attention = layer.submodules.self_attention.submodules
        attention.core_attention = PackedAttention
        if config.qk_layernorm:
            attention.q_layernorm = attention.k_layernorm = RMSNorm
    return spec
