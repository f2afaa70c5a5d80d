"""GRPO, Dr. GRPO, DAPO, GSPO and CISPO, the policy losses with which GMPO is compared.

Their clips bound a ratio to ``[1 - clip_low, 1 + clip_high]``, computed in log space (``log_interval``).
Where the advantage is 0, a loss is exactly 0.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from .tokens import (
    LossOutput,
    LossTokens,
    clip_events,
    clip_one_sided,
    exp,
    extremes,
    log_interval,
    means,
)


def grpo(tokens: LossTokens, *, clip_low: float, clip_high: float) -> LossOutput:
    """Return the loss of GRPO (arXiv 2402.03300), a SUM over sequences.

    The loss of a sequence is the mean of PPO's clipped objective over its tokens. The caller divides by the
    number of sequences of the optimizer step.
    """
    return _ppo(tokens, clip_low, clip_high, divisor=None)


def dr_grpo(
    tokens: LossTokens,
    *,
    clip_low: float,
    clip_high: float,
    length_normalizer: Annotated[float, Field(gt=0)] | None = None,
) -> LossOutput:
    """Return the loss of Dr. GRPO (arXiv 2503.20783), a SUM over sequences.

    The loss of a sequence is PPO's clipped objective, summed over its tokens and divided by a constant. The
    caller divides by the number of sequences of the optimizer step. As in the paper, advantages are not
    divided by the group's standard deviation: the registry sets ``default_advantage`` to ``mean``.

    Args:
        length_normalizer: the constant, in tokens. None means ``tokens.max_response_tokens``, as in the
            paper's code.
    """
    divisor = tokens.max_response_tokens if length_normalizer is None else length_normalizer
    assert divisor is not None, "dr_grpo needs length_normalizer or tokens.max_response_tokens"
    return _ppo(tokens, clip_low, clip_high, divisor=divisor)


def dapo(tokens: LossTokens, *, clip_low: float, clip_high: float) -> LossOutput:
    """Return the loss of DAPO (arXiv 2503.14476), a SUM over tokens.

    The loss of a token is PPO's clipped objective. The caller divides by the number of response tokens of the
    optimizer step.
    """
    return _ppo(tokens, clip_low, clip_high, divisor=1.0)


def gspo(tokens: LossTokens, *, clip_low: float, clip_high: float) -> LossOutput:
    """Return the loss of GSPO (arXiv 2507.18071), a SUM over sequences.

    The loss of a sequence is PPO's clipped objective of the ratio ``s_i = exp(mean_t delta_it)``. The clip
    acts on whole sequences, and clip fractions count sequences. The caller divides by the number of sequences
    of the optimizer step.
    """
    sums = tokens.sum_per_sequence({"log_ratio": tokens.log_ratio})
    nonempty = sums["tokens"] > 0
    log_ratio = sums["log_ratio"] / sums["tokens"].clamp(min=1)  # (S,)
    interval = log_interval(clip_low, clip_high)
    clipped = exp(clip_one_sided(log_ratio, tokens.advantages, *interval))
    metrics = means(clip_events(log_ratio, tokens.advantages, *interval), nonempty.sum())
    metrics |= extremes("ratio", log_ratio.exp(), nonempty) | extremes("sequence_ratio", clipped, nonempty)
    metrics |= extremes("token_ratio", tokens.log_ratio.exp(), tokens.policy_mask)
    objective = tokens.advantages * clipped
    return tokens.output(objective.where(tokens.advantages != 0, 0), sums, metrics)  # 0 * inf is nan


def cispo(tokens: LossTokens, *, clip_low: float, clip_high: float) -> LossOutput:
    """Return the loss of CISPO (MiniMax-M1, arXiv 2506.13585), a SUM over tokens.

    The loss of a token is ``- stop_gradient(clip(ratio)) A logprob``, so every token has a gradient. The clip
    is two-sided for both signs of the advantage, and the clip fractions count both sides. The caller divides
    by the number of response tokens of the optimizer step.
    """
    ratio = torch.exp(tokens.log_ratio.detach())  # (T,)
    low, high = 1 - clip_low, 1 + clip_high
    clipped = ratio.clamp(low, high)
    objective = clipped * tokens.token_advantages * tokens.logprobs
    events = {"clip_fraction_high": ratio > high, "clip_fraction_low": ratio < low}
    return _token_loss(tokens, objective, ratio, clipped, events, divisor=1.0)


def _ppo(tokens: LossTokens, clip_low: float, clip_high: float, divisor: float | None) -> LossOutput:
    interval = log_interval(clip_low, clip_high)
    clipped = exp(clip_one_sided(tokens.log_ratio, tokens.token_advantages, *interval))  # (T,)
    events = clip_events(tokens.log_ratio, tokens.token_advantages, *interval)
    ratio = tokens.log_ratio.detach().exp()
    return _token_loss(tokens, tokens.token_advantages * clipped, ratio, clipped, events, divisor)


def _token_loss(
    tokens: LossTokens,
    objective: Tensor,
    ratio: Tensor,
    clipped: Tensor,
    events: dict[str, Tensor],
    divisor: float | None,
) -> LossOutput:
    """Return the loss of a (T,) objective, summed over each sequence and divided by ``divisor``.

    A divisor of None means the sequence's number of tokens. ``ratio`` and ``clipped`` hold the ratios before
    and after the clip and are used for metrics only.
    """
    weighs = tokens.policy_mask & (tokens.token_advantages != 0)
    if tokens.token_weights is None:
        objective = torch.where(weighs, objective, 0)  # 0 * inf is nan
    else:
        weights = tokens.token_weights
        objective = torch.where(weighs & (weights != 0), objective, 0) * weights
    sums = tokens.sum_per_sequence({"objective": objective, "clipped": clipped.detach(), **events})
    length = sums["tokens"].clamp(min=1)
    per = length if divisor is None else divisor
    metrics = means({name: sums[name] for name in events}, sums["tokens"].sum())
    metrics |= extremes("ratio", ratio, tokens.policy_mask)
    metrics |= extremes("token_ratio", clipped, tokens.policy_mask)
    metrics |= extremes("sequence_ratio", sums["clipped"] / length, sums["tokens"] > 0)
    return tokens.output(sums["objective"] / per, sums, metrics, penalty_divisor=per)
