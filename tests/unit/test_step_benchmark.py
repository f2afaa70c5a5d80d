"""benchmarks/step.py runs, and the FLOPs that it says a step needs are those of transformers' model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from benchmarks.step_work import (
    HEAD_WIDTH,
    HEADS,
    VOCABULARY,
    Step,
    counted_flops,
    needed_flops,
    realistic_shape,
)
from megatron_gmpo.testing.tiny_tokenizers import character_tokenizer

from ..support.commands import run_module

SMALLEST = Step(
    layers=2,
    hidden=32,
    equal_prompts=1,
    realistic_prompts=3,
    shrink=16,
    samples=2,
    updates=2,
    trl_sequences=1,
    equal_steps=2,
    steps=1,
)


def test_needed_flops_are_those_that_torch_counts(tiny_model: Callable[..., Path]) -> None:
    """Torch counts all pairs of eager attention; half of them, without the diagonal, are not needed."""
    path = tiny_model(
        "qwen3",
        num_layers=SMALLEST.layers,
        hidden_size=SMALLEST.hidden,
        ffn_hidden_size=3 * SMALLEST.hidden,
        head_dim=HEAD_WIDTH,
        tokenizer=character_tokenizer("".join(map(chr, range(0x4E00, 0x4E00 + VOCABULARY - 2)))),
    )
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
    shape = realistic_shape(SMALLEST)
    assert shape.given
    first, needed = 3, 0  # of 6 sequences in 2 updates
    for number, sample in enumerate(sample for group in shape.given for sample in group.samples):
        rewards = {other.reward for other in shape.given[number // 2].samples}
        if len(rewards) == 1:
            continue
        inputs, responses = torch.from_numpy(sample.tokens[:-1]).long()[None], int(sample.response_mask.sum())
        for backward in (True, False) if number >= first else (True,):
            with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
                logits = model(inputs, logits_to_keep=responses).logits
                if backward:
                    logits.sum().backward()
            pairs = inputs.numel() * (inputs.numel() - 1) // 2
            above = SMALLEST.layers * 2 * 2 * HEADS * HEAD_WIDTH * pairs * (3 if backward else 1)
            needed += counter.get_total_flops() - above
    assert needed_flops(shape, SMALLEST) == pytest.approx(needed, rel=0.01)


@pytest.mark.parametrize("causal", [True, False])
def test_attention_is_counted(causal: bool) -> None:
    """Two products of (50, 64) and (64, 50) forward, five backward, for each of 4 heads."""
    heads, tokens, width = 4, 50, 64
    query, key, value = (torch.randn(1, n, tokens, width, requires_grad=True) for n in (heads, 2, 2))
    pairs = tokens * (tokens + 1) // 2 if causal else tokens**2

    def attend() -> None:
        torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=causal, enable_gqa=True
        ).sum().backward()

    assert counted_flops(attend) == 7 * 2 * heads * width * pairs


@pytest.mark.slow
def test_the_last_line_is_json() -> None:
    chosen = SMALLEST.model_dump()
    result = run_module("benchmarks.step", *(str(a) for k, v in chosen.items() for a in (f"--{k}", v)))
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert {"ratio_equal", "ratio_realistic", "flops_over_needed"} <= found.keys()
    assert found["max_difference"] < 1e-5
    assert 1 <= found["flops_over_needed"] < 1.2
