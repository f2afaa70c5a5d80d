"""Qwen2 (also Qwen2.5 and DeepSeek-R1-Distill-Qwen), Qwen2-MoE (also Qwen1.5-MoE), Qwen3, Qwen3-MoE."""

from __future__ import annotations

from typing import Any

from .decoder import (
    HF_LAYER,
    LAYER,
    attention,
    decoder_architecture,
    dense_mlp,
    embedding_and_head,
    gated_mlp,
    mlp_norm,
    no_attention_bias,
    routed_experts,
)
from .family import Family, HFConfig
from .mapping import Row
from .operations import Replicated


def _qwen2_architecture(hf: HFConfig) -> dict[str, Any]:
    return decoder_architecture(hf) | {"add_qkv_bias": True}


def _qwen3_architecture(hf: HFConfig) -> dict[str, Any]:
    no_attention_bias(hf)
    return decoder_architecture(hf) | {"qk_layernorm": True}


def _routed_architecture(hf: HFConfig) -> dict[str, Any]:
    is_moe = [
        layer not in hf.mlp_only_layers and (layer + 1) % hf.decoder_sparse_step == 0
        for layer in range(hf.num_hidden_layers)
    ]
    return {
        "num_moe_experts": hf.num_experts,
        "moe_router_topk": hf.num_experts_per_tok,
        "moe_ffn_hidden_size": hf.moe_intermediate_size,
        "moe_layer_freq": 1 if all(is_moe) else [int(moe) for moe in is_moe],
        # the softmax of the chosen logits equals the softmax of all, renormalized over the chosen
        # (norm_topk_prob, which Qwen3-VL-MoE always does)
        "moe_router_pre_softmax": not getattr(hf, "norm_topk_prob", True),
    }


def _qwen2_moe_architecture(hf: HFConfig) -> dict[str, Any]:
    return (
        decoder_architecture(hf)
        | _routed_architecture(hf)
        | {
            "add_qkv_bias": hf.qkv_bias,
            "moe_shared_expert_intermediate_size": hf.shared_expert_intermediate_size,
            "moe_shared_expert_gate": True,
        }
    )


def _qwen3_moe_architecture(hf: HFConfig) -> dict[str, Any]:
    return _qwen3_architecture(hf) | _routed_architecture(hf)


def _shared_expert() -> list[Row]:
    """Return the rows of the MLP that processes every token, and of the score that gates it.

    Source: shared_experts.py of megatron-core, which multiplies the output by the score's sigmoid.
    """
    return [
        *gated_mlp(LAYER + "mlp.shared_experts.", HF_LAYER + "mlp.shared_expert."),
        Row(
            LAYER + "mlp.shared_experts.gate_weight",
            (HF_LAYER + "mlp.shared_expert_gate.weight",),
            Replicated(),
        ),
    ]


QWEN2 = Family(
    lambda hf, vocab: [
        *embedding_and_head(hf, vocab),
        *attention(hf, bias=True, qk_norm=False),
        mlp_norm(),
        *dense_mlp(),
    ],
    _qwen2_architecture,
)
QWEN2_MOE = Family(
    lambda hf, vocab: [
        *embedding_and_head(hf, vocab),
        *attention(hf, bias=hf.qkv_bias, qk_norm=False),
        mlp_norm(),
        *dense_mlp(),  # layers in mlp_only_layers or skipped by decoder_sparse_step
        *routed_experts(),
        *_shared_expert(),
    ],
    _qwen2_moe_architecture,
)
QWEN3 = Family(
    lambda hf, vocab: [
        *embedding_and_head(hf, vocab),
        *attention(hf, bias=False, qk_norm=True),
        mlp_norm(),
        *dense_mlp(),
    ],
    _qwen3_architecture,
)
QWEN3_MOE = Family(
    lambda hf, vocab: [
        *embedding_and_head(hf, vocab),
        *attention(hf, bias=False, qk_norm=True),
        mlp_norm(),
        *dense_mlp(),  # layers in mlp_only_layers or skipped by decoder_sparse_step
        *routed_experts(),
    ],
    _qwen3_moe_architecture,
)
