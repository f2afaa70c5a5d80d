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
from .family import Family, HFConfig


def _architecture(hf: HFConfig) -> dict[str, Any]:
    no_attention_bias(hf)
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
