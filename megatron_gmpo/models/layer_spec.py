"""Layer specs of the decoder: Transformer Engine's spec, or the plain torch spec."""

from __future__ import annotations

from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.post_training.modelopt.layers import Linear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from .attention import LatentAttention, PackedAttention, RMSNorm


def decoder_spec(
    config: TransformerConfig, *, use_transformer_engine: bool, vp_stage: int | None
) -> TransformerBlockSubmodules:
    """Return the layers of this pipeline stage, or of its virtual stage ``vp_stage``."""
    spec: Any = get_gpt_decoder_block_spec(
        config,
        use_transformer_engine=use_transformer_engine,
        normalization=config.normalization,
        vp_stage=vp_stage,
    )
    layers = spec.layer_specs or []
    if config.multi_latent_attention:
        for layer in layers:
            layer.submodules.self_attention.module = LatentAttention
    if use_transformer_engine:
        return spec
    spec.layer_norm = RMSNorm
    for layer in layers:
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
        mlp = layer.submodules.mlp
        # a ModuleSpec in 0.16, a functools.partial since 0.18
        is_moe = getattr(mlp, "func", getattr(mlp, "module", None)) is MoELayer
        if is_moe:
            # Megatron's plain spec stores the norm before the MLP as part of linear_fc1, which a MoE layer
            # does not have; use the keys of Transformer Engine's spec
            layer.submodules.sharded_state_dict_keys_map = {
                "input_layernorm.": "self_attention.linear_qkv.layer_norm_"
            }
        attention = layer.submodules.self_attention.submodules
        attention.core_attention = PackedAttention
        if config.multi_latent_attention:
            attention.q_layernorm = attention.kv_layernorm = RMSNorm
            # Keep these projections complete on every tensor-parallel rank. With split projections,
            # Megatron's gradient of the shared rotary key lacks the contributions of other ranks' heads
            # (multi_latent_attention.py:get_query_key_value_tensors).
            attention.linear_q_down_proj = attention.linear_kv_down_proj = Linear
            layer.submodules.sharded_state_dict_keys_map = _latent_attention_keys(is_moe)
        elif config.qk_layernorm:
            attention.q_layernorm = attention.k_layernorm = RMSNorm
    return spec


def _latent_attention_keys(is_moe: bool) -> dict[str, str]:
    """Return norm -> checkpoint key of Transformer Engine's spec, which fuses norms into linear layers."""
    fused = {
        f"self_attention.{x}_layernorm.": f"self_attention.linear_{x}_up_proj.layer_norm_"
        for x in ("q", "kv")
    }
    return fused if is_moe else fused | {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}
