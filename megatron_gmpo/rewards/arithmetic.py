"""The reward of the arithmetic demo."""

from __future__ import annotations

from ..batch.samples import Prompt


def arithmetic_reward(prompt: Prompt, response: str) -> float:
    """Return 1.0 if the response equals the answer, ignoring surrounding white space, else 0.0."""
    return float(response.strip() == prompt.answer.strip())
