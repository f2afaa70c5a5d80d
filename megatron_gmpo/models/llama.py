"""Llama 2 and 3."""

from __future__ import annotations

from typing import Any

from .decoder import (
    attention,
    decoder_architecture,
    dense_mlp,
    embedding_and_head,
    mlp_norm,
    no_attention_bias,
)
from .family import Family, HFConfig, refuse


def _architecture(hf: HFConfig) -> dict[str, Any]:
    no_attention_bias(hf)
    refuse(hf, "mlp_bias", getattr(hf, "mlp_bias", False), "biases in the MLP are not supported")
    return decoder_architecture(hf)


LLAMA = Family(
    lambda hf, vocab: [
        *embedding_and_head(hf, vocab),
        *attention(hf, bias=False, qk_norm=False),
        mlp_norm(),
        *dense_mlp(),
    ],
    _architecture,
)
