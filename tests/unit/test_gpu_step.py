"""The FLOPs that benchmarks/gpu_step.py assumes equal torch's count for transformers' model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from benchmarks.gpu_step import forward_flops


def test_flops_are_those_that_torch_counts(tiny_model: Callable[..., Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        tiny_model("qwen3_moe"),
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    length = 96
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        model(torch.randint(3, 16, (1, length), generator=torch.Generator().manual_seed(0)))
    assert forward_flops(model.config, [length], causal=False) == pytest.approx(
        counted.get_total_flops(), rel=0.01
    )
