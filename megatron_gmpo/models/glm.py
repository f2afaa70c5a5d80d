"""GLM-4.5 and later GLM mixture-of-experts models (arXiv 2508.06471)."""

from __future__ import annotations

from typing import Any

from .decoder import (
    attention,
    biased_router,
    decoder_architecture,
    dense_mlp,
    embedding_and_head,
    mlp_norm,
    routed_experts,
    shared_experts,
    sigmoid_routing,
)
from .family import Family, HFConfig


def _architecture(hf: HFConfig) -> dict[str, Any]:
    return {
        **decoder_architecture(hf),
        **sigmoid_routing(hf),
        "add_qkv_bias": hf.attention_bias,
        "qk_layernorm": hf.use_qk_norm,
    }


GLM4_MOE = Family(
    lambda hf, vocab: [
        *embedding_and_head(hf, vocab),
        *attention(hf, bias=True, qk_norm=True),
        mlp_norm(),
        *dense_mlp(),  # the first first_k_dense_replace layers
        *routed_experts(),
        *biased_router(),
        *shared_experts(),
    ],
    _architecture,
    partial_rotary=True,
)
