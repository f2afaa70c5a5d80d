"""Tiny random models as Hugging Face folders: config.json, safetensors in the hub's layout, tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from . import Family
from .tiny_tokenizers import arithmetic_tokenizer


def make_tiny_model(
    out: Path,
    *,
    family: Family = "qwen3_moe",
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
) -> PreTrainedModel:
    """Write the folder ``out`` and return its model with 4 attention heads, 2 key-value heads, top-2 experts.

    Args:
        tokenizer: tokenizer to save in the folder; its length is the vocabulary size. None means
            ``arithmetic_tokenizer()``.
        ffn_hidden_size: width of the MLP; in a MoE, width of each expert.
        head_dim: width of a head in the Qwen3 families and GLM. DeepSeek's heads have ``head_dim // 2``
            rotary channels in addition. The other families split ``hidden_size`` over the heads.
        num_experts: experts per layer of a MoE.
        initializer_range: standard deviation of the weights. With the usual 0.02, a model of this width has
            near-uniform logits and near-equal router scores, and learns slowly.
        randomize_norms: draw norm weights and biases at random instead of ones and zeros, so that a
            comparison of logits detects errors in them.
        seed: seed of the weights. Torch's global generator keeps its state.
    """
    tokenizer = tokenizer or arithmetic_tokenizer()
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
    return model


def _of_family(
    family: Family, hidden_size: int, ffn_hidden_size: int, head_dim: int, num_experts: int
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
    fields: dict[Family, dict[str, Any]] = {
        "qwen3": {"head_dim": head_dim},
        "qwen3_moe": experts | {"head_dim": head_dim, "num_experts": num_experts, "norm_topk_prob": True},
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


@torch.no_grad()
def _random_model(family: Family, shape: dict[str, Any], randomize_norms: bool) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shape), dtype=torch.float32)
    # transformers zeroes the padding token's embedding. If that token is sampled, the norm's gradient there
    # is 1 / sqrt(eps).
    embedding = model.get_input_embeddings().weight[shape["pad_token_id"]]
    embedding.normal_(std=shape["initializer_range"])
    if randomize_norms:
        for tensor in model.state_dict().values():
            if tensor.ndim == 1:
                tensor.add_(0.1 * torch.randn_like(tensor))
    return model
