"""Mixtral (arXiv 2401.04088)."""

from __future__ import annotations

from typing import Any

from .decoder import (
    HF_LAYER,
    LAYER,
    attention,
    decoder_architecture,
    embedding_and_head,
    mlp_norm,
)
from .family import Family, HFConfig
from .mapping import Row
from .operations import GateUp, Replicated, Split

_OURS, _THEIRS = LAYER + "mlp.", HF_LAYER + "block_sparse_moe."


def _rows(hf: HFConfig, padded_vocab_size: int) -> list[Row]:
    expert, hf_expert = _OURS + "experts.local_experts.{e}.", _THEIRS + "experts.{e}."
    return [
        *embedding_and_head(hf, padded_vocab_size),
        *attention(hf, bias=False, qk_norm=False),
        mlp_norm(),
        Row(_OURS + "router.weight", (_THEIRS + "gate.weight",), Replicated()),
        Row(expert + "linear_fc1.weight", (hf_expert + "w1.weight", hf_expert + "w3.weight"), GateUp()),
        Row(expert + "linear_fc2.weight", (hf_expert + "w2.weight",), Split(1)),
    ]


def _architecture(hf: HFConfig) -> dict[str, Any]:
    return {
        **decoder_architecture(hf),
        "num_moe_experts": hf.num_local_experts,
        "moe_router_topk": hf.num_experts_per_tok,
        "moe_ffn_hidden_size": hf.intermediate_size,
        # the softmax of the chosen logits equals the softmax of all, renormalized over the chosen
        "moe_router_pre_softmax": False,
    }


MIXTRAL = Family(_rows, _architecture)
