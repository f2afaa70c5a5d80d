"""Prompts and sampled responses."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

FinishReason = Literal["stop", "length", "abort"]


@dataclass
class Prompt:
    """One problem.

    Attributes:
        id: stable name, unique in its data set, e.g. ``"gsm8k_train/17"``.
        answer: ground truth handed to the reward, as text.
        text: the prompt as plain text, or None when ``messages`` is given.
        messages: chat messages ``[{"role": "user", "content": ...}]``, or None.
        input_ids: token ids after template and tokenizer; what every engine generates from.
    """

    id: str
    answer: str
    text: str | None = None
    messages: list[dict[str, str]] | None = None
    input_ids: list[int] = field(default_factory=list)


@dataclass
class Sample:
    """One sampled response, with everything training needs to know about how it came to be.

    Attributes:
        tokens: prompt and response token ids, length L.
        response_mask: length L; True for tokens the policy generated.
        rollout_logprobs: length L; log probability of each token under the distribution it was sampled from, 0 on the prompt.
        text: the response, decoded without special tokens.
        finish_reason: ``stop`` (end token or stop string), ``length`` (token limit) or ``abort``.
        policy_version: the training step whose weights generated it, or its first token.
        reward: filled in by ``rollout.collect``.
        routed_experts: (L - 1, layers, topk) int16 expert ids of a MoE rollout, or None. Row t is of the input token t, which predicts
            t + 1, so the last token has none. All decoder layers count; what stands in those without experts means nothing.
        token_versions: length L; the training step behind each generated token, -1 on the prompt. None: ``policy_version`` for all.
    """

    tokens: list[int]
    response_mask: list[bool]
    rollout_logprobs: list[float]
    text: str
    finish_reason: FinishReason
    policy_version: int
    reward: float = 0.0
    routed_experts: np.ndarray | None = None
    token_versions: list[int] | None = None

    @property
    def response_length(self) -> int:
        """Number of generated tokens."""
        return sum(self.response_mask)


@dataclass
class SampleGroup:
    """The samples of one prompt; advantages are relative to this group."""

    prompt: Prompt
    samples: list[Sample]

    @property
    def rewards(self) -> list[float]:
        return [sample.reward for sample in self.samples]
