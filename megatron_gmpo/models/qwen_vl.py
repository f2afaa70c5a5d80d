"""Qwen2.5-VL (arXiv 2502.13923), Qwen3-VL and Qwen3-VL-MoE (arXiv 2511.21631).

The language model is that of Qwen2, Qwen3 or Qwen3-MoE with positions in time, height and width (mRoPE).
The vision tower is transformers' own; ``{n}`` in its row stands for the name of any of its parameters.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .decoder import head_dim
from .family import Family, HFConfig, refuse
from .mapping import TOWER, Row
from .operations import Replicated
from .qwen import QWEN2, QWEN3, QWEN3_MOE

_TOWER = TOWER + "{n}"


def _qwen2_5_rows(hf: HFConfig, padded_vocab_size: int) -> list[Row]:
    return [*QWEN2.rows(hf, padded_vocab_size), Row(_TOWER, (_TOWER,), Replicated())]


def _qwen3_rows(language: list[Row]) -> list[Row]:
    """Return the rows of a language model inside ``model.language_model``, and that of the tower."""
    return [*map(_inside, language), Row(_TOWER, ("model." + _TOWER,), Replicated())]


def _inside(row: Row) -> Row:
    outer, inner = "model.", "model.language_model."
    hf = tuple(inner + name.removeprefix(outer) if name.startswith(outer) else name for name in row.hf)
    return replace(row, hf=hf)


def mrope_section(hf: HFConfig) -> list[int]:
    """Return the number of rotary channel pairs for the positions in time, height and width."""
    # the defaults of transformers' rotary embeddings
    return hf.rope_parameters.get(
        "mrope_section", [16, 24, 24] if hf.model_type == "qwen2_5_vl_text" else [24, 20, 20]
    )


def _qwen2_5_architecture(hf: HFConfig) -> dict[str, Any]:
    width = hf.hidden_size // hf.num_attention_heads
    other = head_dim(hf) != width
    refuse(
        hf, "head_dim", other, f"transformers' attention has heads of {width} channels, its rotation others"
    )
    return QWEN2.architecture(hf)


def _with_mrope(architecture: dict[str, Any], hf: HFConfig, *, interleaved: bool) -> dict[str, Any]:
    rope, section, pairs = hf.rope_parameters, mrope_section(hf), head_dim(hf) // 2
    other = rope.get("mrope_interleaved", interleaved) != interleaved
    kind = rope.get("rope_type", "default") != "default"
    fits = sum(section) == pairs and (not interleaved or 3 * max(section[1:]) <= pairs)
    refuse(hf, "rope_parameters", kind, "only the default frequencies are supported with mRoPE")
    refuse(hf, "rope_parameters", other, f"mrope_interleaved is {interleaved} in this family")
    refuse(hf, "rope_parameters", not fits, f"mrope_section does not divide the {pairs} pairs of a head")
    return architecture | {"mrope_section": section}


def _qwen3_moe_architecture(hf: HFConfig) -> dict[str, Any]:
    width = hf.moe_intermediate_size
    # transformers transposes the experts' tensors of a folder if their shape differs from its own
    # (conversion_mapping.py); SGLang always does (qwen3_vl_moe.py)
    square = hf.hidden_size in (width, 2 * width)
    refuse(hf, "moe_intermediate_size", square, "the orientation of the experts' tensors would be unclear")
    unscaled = not getattr(hf, "norm_topk_prob", True)
    refuse(hf, "norm_topk_prob", unscaled, "this family's router normalizes the chosen scores")
    return QWEN3_MOE.architecture(hf)


QWEN2_5_VL = Family(_qwen2_5_rows, lambda hf: _with_mrope(_qwen2_5_architecture(hf), hf, interleaved=False))
QWEN3_VL = Family(
    lambda hf, vocab: _qwen3_rows(QWEN3.rows(hf, vocab)),
    lambda hf: _with_mrope(QWEN3.architecture(hf), hf, interleaved=True),
)
QWEN3_VL_MOE = Family(
    lambda hf, vocab: _qwen3_rows(QWEN3_MOE.rows(hf, vocab)),
    lambda hf: _with_mrope(_qwen3_moe_architecture(hf), hf, interleaved=True),
)
