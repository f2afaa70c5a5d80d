"""Losses for tests: some that configs name as ``module:name``, and those in docs/losses.md."""

from __future__ import annotations

import os
import re

from megatron_gmpo.losses import Loss, LossOutput, LossTokens, gmpo

from .commands import ROOT


def documented_losses() -> list[str]:
    """Return the two Python blocks of docs/losses.md that define a loss: short, and with a column."""
    page = (ROOT / "docs/losses.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    short, with_column = (block for block in blocks if "-> LossOutput" in block)
    assert len(short.strip().splitlines()) <= 15
    return [short, with_column]


def scaled(tokens: LossTokens, *, clip_low: float, clip_high: float, scale: float = 1.0) -> LossOutput:
    output = gmpo(tokens, clip_low=clip_low, clip_high=clip_high)
    return LossOutput(scale * output.loss, output.metrics)


def crashes_on_rank_1(tokens: LossTokens, *, clip_low: float = 0.4, clip_high: float = 0.4) -> LossOutput:
    return scaled(tokens, clip_low=clip_low, clip_high=clip_high, scale=1 / (1 - int(os.environ["RANK"])))


def with_many_parameters(logprobs, old_logprobs, *, clip_low, clip_high): ...


unmade = Loss(scaled, needs=("temperature",))
needs_reference = Loss(scaled, needs=("ref_logprobs",))
