"""Tiny random models as Hugging Face folders: config.json, safetensors in the hub's layout, tokenizer.

The folder of a vision-language model has preprocessor_config.json too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from ..errors import InputError
from . import AnyFamily, VisionFamily
from .tiny_tokenizers import IMAGE, VIDEO, VISION_END, VISION_START, arithmetic_tokenizer, vision_tokenizer


def make_tiny_model(
    out: Path,
    *,
    family: AnyFamily = "qwen3_moe",
    tokenizer: PreTrainedTokenizerFast | None = None,
    num_layers: int = 4,
    hidden_size: int = 64,
    ffn_hidden_size: int = 64,
    head_dim: int = 32,
    num_experts: int = 8,
    tie_word_embeddings: bool = False,
    initializer_range: float = 0.05,
    randomize_norms: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    vision: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """Write the folder ``out`` and return its model with 4 attention heads, 2 key-value heads, top-2 experts.

    Args:
        tokenizer: tokenizer to save in the folder; its length is the vocabulary size. None means
            ``arithmetic_tokenizer()``, or ``vision_tokenizer()`` for a vision-language model.
        ffn_hidden_size: width of the MLP; in a MoE, width of each expert.
        head_dim: width of a head in the Qwen3 families and GLM. DeepSeek's heads have ``head_dim // 2``
            rotary channels in addition. The other families split ``hidden_size`` over the heads.
        num_experts: experts per layer of a MoE.
        initializer_range: standard deviation of the weights. With the usual 0.02, a model of this width has
            near-uniform logits and near-equal router scores, and learns slowly.
        randomize_norms: draw norm weights and biases at random instead of ones and zeros, so that a
            comparison of logits detects errors in them.
        seed: seed of the weights. Torch's global generator keeps its state.
        vision: fields of ``vision_config`` that differ from those of ``_vision_config``.

    Raises:
        InputError: a vision-language model's tokenizer has no image token.
    """
    with_images = family in get_args(VisionFamily)
    tokenizer = tokenizer or (vision_tokenizer() if with_images else arithmetic_tokenizer())
    shape: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden_size,
        "intermediate_size": ffn_hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
        "initializer_range": initializer_range,
        "tie_word_embeddings": tie_word_embeddings,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    shape |= _of_family(family, hidden_size, ffn_hidden_size, head_dim, num_experts)
    if with_images:
        shape = _with_vision(family, shape, tokenizer, vision or {})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _random_model(family, shape, randomize_norms)
    for parameter in model.parameters():  # buffers, e.g. a router's bias, stay fp32
        parameter.data = parameter.data.to(dtype)
    model.generation_config = GenerationConfig(
        do_sample=True, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    if with_images:
        _write_image_processor(out, family, model.config.vision_config)
    if family == "qwen3_vl_moe":
        _transpose_experts(out / "model.safetensors")
    return model


def _of_family(
    family: AnyFamily, hidden_size: int, ffn_hidden_size: int, head_dim: int, num_experts: int
) -> dict[str, Any]:
    """Return the config.json fields that only some families have."""
    experts = {"num_experts_per_tok": 2, "moe_intermediate_size": ffn_hidden_size}
    grouped = experts | {
        "n_routed_experts": num_experts,
        "n_group": 2,
        "topk_group": 1,
        "n_shared_experts": 1,
        "routed_scaling_factor": 2.5,
        "first_k_dense_replace": 1,
        "num_nextn_predict_layers": 0,
    }
    moe = experts | {"head_dim": head_dim, "num_experts": num_experts}
    fields: dict[AnyFamily, dict[str, Any]] = {
        "qwen3": {"head_dim": head_dim},
        "qwen3_moe": moe | {"norm_topk_prob": True},
        "qwen2_5_vl": _mrope(hidden_size // 4),
        "qwen3_vl": {"head_dim": head_dim} | _mrope(head_dim, interleaved=True),
        # another width than the model's, or the experts' tensors are square: see ``models.qwen_vl``
        "qwen3_vl_moe": moe
        | {"moe_intermediate_size": ffn_hidden_size * 3 // 4}
        | _mrope(head_dim, interleaved=True),
        "qwen2_moe": experts
        | {"num_experts": num_experts, "shared_expert_intermediate_size": 2 * ffn_hidden_size},
        "mixtral": {"num_local_experts": num_experts, "num_experts_per_tok": 2},
        "glm4_moe": grouped | {"head_dim": head_dim, "attention_bias": True, "use_qk_norm": True},
        "deepseek_v3": grouped
        | {
            "num_key_value_heads": 4,
            "q_lora_rank": hidden_size * 3 // 4,
            "kv_lora_rank": hidden_size // 2,
            "qk_nope_head_dim": head_dim,
            "qk_rope_head_dim": head_dim // 2,
            "v_head_dim": head_dim,
        },
    }
    return fields.get(family, {})


def _mrope(head_dim: int, *, interleaved: bool = False) -> dict[str, Any]:
    """Return rotary fields with the proportions of Qwen2.5-VL-7B, or of Qwen3-VL if ``interleaved``."""
    pairs = head_dim // 2
    side = pairs * (20 if interleaved else 24) // 64
    rope: dict[str, Any] = {"mrope_section": [pairs - 2 * side, side, side]}
    if interleaved:
        rope["mrope_interleaved"] = True
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6} | rope}


def _with_vision(
    family: AnyFamily,
    text: dict[str, Any],
    tokenizer: PreTrainedTokenizerFast,
    changes: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the fields of a vision-language model's config.json around those of its language model."""
    names = {"image": IMAGE, "video": VIDEO, "vision_start": VISION_START, "vision_end": VISION_END}
    vocabulary = tokenizer.get_vocab()
    if absent := [token for token in names.values() if token not in vocabulary]:
        raise InputError(
            f"family = {family!r}: the tokenizer lacks {absent[0]!r}: choose tokenizer = 'vision'"
        )
    del text["rope_theta"]
    return {
        "text_config": text,
        "vision_config": _vision_config(family, text) | dict(changes),
        "tie_word_embeddings": text["tie_word_embeddings"],
        "pad_token_id": text["pad_token_id"],
        "initializer_range": text["initializer_range"],
        **{f"{name}_token_id": vocabulary[token] for name, token in names.items()},
    }


def _vision_config(family: AnyFamily, text: dict[str, Any]) -> dict[str, Any]:
    """Return a tower with 3 layers of 2 heads; Qwen3-VL's gives features to the first two language layers."""
    common = {
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "out_hidden_size": text["hidden_size"],
        "initializer_range": text["initializer_range"],
    }
    if family == "qwen2_5_vl":
        return common | {"patch_size": 14, "window_size": 56, "fullatt_block_indexes": [1]}
    return common | {"patch_size": 16, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}


def _write_image_processor(out: Path, family: AnyFamily, vision: Any) -> None:
    """Write preprocessor_config.json as Qwen's folders on the hub have it. Images have at most 64 tokens."""
    side = vision.patch_size * vision.spatial_merge_size
    processor = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor" if family == "qwen2_5_vl" else "Qwen3VLProcessor",
        "size": {"shortest_edge": 4 * side**2, "longest_edge": 64 * side**2},
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "merge_size": vision.spatial_merge_size,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    (out / "preprocessor_config.json").write_text(json.dumps(processor, indent=2))


def _transpose_experts(path: Path) -> None:
    """Store the experts as the hub does, (E, in, out). transformers holds and saves them as (E, out, in)."""
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if ".mlp.experts." in name:
            tensors[name] = tensor.transpose(1, 2).contiguous()
    save_file(tensors, path, {"format": "pt"})


@torch.no_grad()
def _random_model(family: AnyFamily, shape: dict[str, Any], randomize_norms: bool) -> PreTrainedModel:
    auto = AutoModelForImageTextToText if "vision_config" in shape else AutoModelForCausalLM
    model = auto.from_config(AutoConfig.for_model(family, **shape), dtype=torch.float32)
    # transformers zeroes the padding token's embedding. If that token is sampled, the norm's gradient there
    # is 1 / sqrt(eps).
    embedding = model.get_input_embeddings().weight[shape["pad_token_id"]]
    embedding.normal_(std=shape["initializer_range"])
    if randomize_norms:
        for tensor in model.state_dict().values():
            if tensor.ndim == 1:
                tensor.add_(0.1 * torch.randn_like(tensor))
    return model
