"""A reward for tests, given as ``module:function``: a random model's responses differ in it."""

from __future__ import annotations

import os

from megatron_gmpo.types import Prompt


def share_of_digits(prompt: Prompt, response: str) -> float:
    return sum(character.isdigit() for character in response) / max(1, len(response))


def broken_on_rank_1(prompt: Prompt, response: str) -> float | None:
    return None if os.environ["RANK"] == "1" else 0.0
