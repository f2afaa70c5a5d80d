"""The demo's reward."""

from __future__ import annotations

from ..batch.samples import Prompt


def arithmetic_reward(prompt: Prompt, response: str) -> float:
    """1.0 when the response is the answer, character by character but for white space around it; else 0.0."""
    return float(response.strip() == prompt.answer.strip())
