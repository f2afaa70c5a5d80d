"""The data of the steps that benchmarks/step.py takes, their model, and the FLOPs that they need and take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import model_validator
from torch.utils.flop_counter import FlopCounterMode

from megatron_gmpo.batch.plan import minibatch_bounds
from megatron_gmpo.batch.samples import Prompt, Sample, SampleGroup
from megatron_gmpo.command_line import Options
from megatron_gmpo.config import Positive
from megatron_gmpo.testing.tiny_models import make_tiny_model
from megatron_gmpo.testing.tiny_tokenizers import character_tokenizer

VOCABULARY = 512
HEADS, KV_HEADS, HEAD_WIDTH = 4, 2, 64
EQUAL_PROMPT, EQUAL_RESPONSE = 16, 64


class Step(Options):
    """Measure a training step against TRL's GMPOTrainer on one CPU thread."""

    layers: Positive = 4
    """Decoder layers."""
    hidden: Positive = 256
    """Width of the residual stream; the MLP has three times this width."""
    equal_prompts: Positive = 16
    """Prompts of a step of equal lengths."""
    realistic_prompts: Positive = 5
    """Prompts of a realistic step."""
    shrink: Positive = 1
    """Divisor of the realistic lengths."""
    samples: Positive = 8
    """Responses to a prompt."""
    updates: Positive = 4
    """Optimizer steps of a step."""
    trl_sequences: Positive = 5
    """Sequences in TRL's microbatches of the realistic shape; our microbatches hold at most 8,192 tokens."""
    equal_steps: Positive = 8
    """Measured steps of equal lengths, in which both sides take turns."""
    steps: Positive = 2
    """Measured realistic steps of each side."""
    warm_up: Positive = 1
    """Steps before the measured ones."""

    @model_validator(mode="after")
    def _whole_microbatches(self) -> Step:
        for name, sequences in (("equal_prompts", 1), ("realistic_prompts", self.trl_sequences)):
            prompts, parts = getattr(self, name), self.updates * sequences
            if prompts * self.samples % parts:
                raise ValueError(
                    f"{name} = {prompts} with samples = {self.samples}: their product must be a multiple of "
                    f"{parts}, which is updates times the sequences of a microbatch"
                )
        return self


def make_model(folder: Path, layers: int, hidden: int) -> None:
    """Write a Qwen3 with random weights, whose MLP has three times the width of its residual stream."""
    make_tiny_model(
        folder,
        family="qwen3",
        tokenizer=character_tokenizer("".join(map(chr, range(0x4E00, 0x4E00 + VOCABULARY - 2)))),
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=3 * hidden,
        head_dim=HEAD_WIDTH,
    )


@dataclass(frozen=True)
class Shape:
    """The data of a step.

    Attributes:
        prompts: the prompts, as token ids.
        max_new_tokens: token limit of a response.
        given: the responses with their rewards; None means that each side samples them.
    """

    prompts: list[list[int]]
    max_new_tokens: int
    given: list[SampleGroup] | None = None


def equal_shape(options: Step) -> Shape:
    draw = torch.Generator().manual_seed(0)
    return Shape(
        [_tokens(EQUAL_PROMPT, draw) for _ in range(options.equal_prompts)],
        max(2, EQUAL_RESPONSE // options.shrink),
    )


def realistic_shape(options: Step) -> Shape:
    draw = torch.Generator().manual_seed(0)
    count, shrink = options.realistic_prompts, options.shrink
    widths = torch.randint(100 // shrink, 400 // shrink + 1, (count,), generator=draw).tolist()
    without_variance = set(torch.randperm(count, generator=draw)[: round(0.4 * count)].tolist())
    groups = []
    for number, width in enumerate(widths):
        prompt = _tokens(width, draw)
        normal = torch.randn(options.samples, generator=draw)
        lengths = (torch.exp(0.9 * normal) * 150 / shrink).clamp(1, 768 // shrink).long().tolist()
        rewards = torch.rand(options.samples, generator=draw).tolist()
        samples = [
            _sample(prompt, _tokens(length, draw), 1.0 if number in without_variance else reward)
            for length, reward in zip(lengths, rewards, strict=True)
        ]
        groups.append(SampleGroup(Prompt(str(number), "", input_ids=prompt), samples))
    return Shape([group.prompt.input_ids for group in groups], 768 // shrink, groups)


def reward_of(response: list[int]) -> float:
    """Return the reward of a sampled response, which differs between almost all responses."""
    return float(sum(response) % 101)


def _tokens(length: int, draw: torch.Generator) -> list[int]:
    return torch.randint(2, VOCABULARY, (length,), generator=draw).tolist()  # without padding and end token


def _sample(prompt: list[int], response: list[int], reward: float) -> Sample:
    tokens: Any = [*prompt, *response]
    mask: Any = [False] * len(prompt) + [True] * len(response)
    return Sample(tokens, mask, [0.0] * len(tokens), "", "length", 0, reward)  # pyright: ignore[reportArgumentType]


def needed_flops(shape: Shape, options: Step) -> int:
    """Return the lower bound of a step's FLOPs, see the module docstring."""
    width = HEADS * HEAD_WIDTH
    attention = options.hidden * (2 * width + 2 * KV_HEADS * HEAD_WIDTH)
    layer = attention + 3 * options.hidden * 3 * options.hidden
    assert shape.given
    samples = [sample for group in shape.given for sample in group.samples]
    trained = [len({s.reward for s in group.samples}) > 1 for group in shape.given for _ in group.samples]
    first = minibatch_bounds(len(samples), options.updates)[0][1]
    total = 0
    for number, (sample, counts) in enumerate(zip(samples, trained, strict=True)):
        inputs, responses = len(sample.tokens) - 1, int(sample.response_mask.sum())
        pairs = inputs * (inputs + 1) // 2
        per_layer = 2 * layer * inputs + 2 * 2 * width * pairs  # two products of attention
        forward = options.layers * per_layer + 2 * options.hidden * VOCABULARY * responses
        total += counts * forward * (3 if number < first else 4)
    return total


def _attention(query: Sequence[int], key: Sequence[int], value: Sequence[int], causal: bool) -> int:
    """Return the FLOPs of the two products of attention from the shapes (batch, heads, tokens, width)."""
    batch, heads, queries, width = query
    pairs = queries * (queries + 1) // 2 if causal else queries * key[2]
    return 2 * batch * heads * pairs * (width + value[3])


def _attention_forward(q: Any, k: Any, v: Any, dropout: float = 0, causal: bool = False, **_: Any) -> int:
    return _attention(q, k, v, causal)


def _attention_backward(
    grad: Any, q: Any, k: Any, v: Any, out: Any, log_z: Any, dropout: float, causal: bool, **_: Any
) -> int:
    return _attention(q, k, v, causal) * 5 // 2  # the scores again, and the gradients of four factors


COUNTED = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_forward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def counted_flops(work: Callable[[], object]) -> int:
    with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
        work()
    return counter.get_total_flops()
