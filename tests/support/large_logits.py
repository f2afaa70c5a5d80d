"""A bf16 model with logits around 40, which bf16 rounds to multiples of 0.25, as in trained models."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from megatron_gmpo.testing.tiny_models import make_tiny_model
from megatron_gmpo.testing.tiny_tokenizers import text_tokenizer

FAR = 0.05
"""Error, in nats, of a log probability that counts as far off."""


def make(folder: Path) -> Path:
    """Write a Qwen3 with two layers; channel 0 of its hidden states adds the same to every logit."""
    model = make_tiny_model(
        folder, family="qwen3", tokenizer=text_tokenizer(), num_layers=2, dtype=torch.bfloat16
    )
    model.get_input_embeddings().weight.data[:, 0] = 0.4
    model.get_output_embeddings().weight.data[:] *= 4
    model.get_output_embeddings().weight.data[:, 0] = 16.0
    model.save_pretrained(folder)
    return folder


def share_far(logprobs: Tensor, exact: Tensor) -> float:
    """Return the share of log probabilities that are more than FAR from the exact ones."""
    return float(((logprobs.double() - exact).abs() > FAR).double().mean())
