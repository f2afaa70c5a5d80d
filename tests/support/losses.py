"""Losses for tests, given as ``module:name``."""

from __future__ import annotations

from megatron_gmpo.losses import Loss, LossOutput, LossTokens, gmpo


def scaled(
    tokens: LossTokens, *, clip_low: float = 0.2, clip_high: float = 0.2, scale: float = 1.0
) -> LossOutput:
    output = gmpo(tokens, clip_low=clip_low, clip_high=clip_high)
    return LossOutput(scale * output.loss, output.metrics)


needs_a_column_that_nothing_makes = Loss(scaled, needs=("temperature",))
