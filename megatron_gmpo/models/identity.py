"""The fields of config.json that must be equal in a checkpoint and in the run that resumes from it."""

from __future__ import annotations

from typing import Any

from .family import language_config

_IDENTITY = [
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "n_routed_experts",
    "n_shared_experts",
    "first_k_dense_replace",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "tie_word_embeddings",
]


_VISION_IDENTITY = [
    "depth",
    "hidden_size",
    "intermediate_size",
    "num_heads",
    "patch_size",
    "spatial_merge_size",
    "temporal_patch_size",
    "num_position_embeddings",
    "deepstack_visual_indexes",
]


def model_identity(whole: Any, dtype: str) -> dict[str, Any]:
    """Return the fields of a Hugging Face config that determine the weights' shapes, and the dtype."""
    hf, vision = language_config(whole), getattr(whole, "vision_config", None)
    fields = {field: getattr(hf, field, None) for field in _IDENTITY}
    tower = {f"vision.{field}": getattr(vision, field, None) for field in _VISION_IDENTITY if vision}
    return {**fields, **tower, "dtype": dtype}
