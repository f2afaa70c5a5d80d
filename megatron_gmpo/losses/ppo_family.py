"""The policy losses GMPO is compared with. Arguments not described here are those of ``gmpo_loss``.

Their clip intervals are in ratio space: a ratio is clipped to ``[1 - clip_low, 1 + clip_high]``. Losses that are sums over tokens also
take ``token_weights``, (T,) importance weights that multiply each token's term.
"""

from __future__ import annotations

from typing import Annotated

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor

from .tokens import (
    LossOutput,
    PackedTokens,
    PolicyMask,
    TokenPenalty,
    clip_events,
    clip_one_sided,
    extremes,
    fractions,
)


def grpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    mask: Tensor,
    sequence_ids: Tensor,
    advantages: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    cp_group: dist.ProcessGroup | None = None,
    sequence_weights: Tensor | None = None,
    policy_mask: PolicyMask | None = None,
    token_weights: Tensor | None = None,
    penalty: TokenPenalty | None = None,
) -> LossOutput:
    """GRPO (arXiv 2402.03300): PPO's clipped objective, its mean over each sequence's tokens.

    Returns:
        The SUM over sequences; the caller divides by the sequences of the optimizer step.
    """
    tokens = PackedTokens(
        logprobs, old_logprobs, mask, sequence_ids, advantages, sequence_weights, policy_mask, penalty
    )
    return _ppo(tokens, clip_low, clip_high, cp_group, token_weights, divisor=None)


def dr_grpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    mask: Tensor,
    sequence_ids: Tensor,
    advantages: Tensor,
    *,
    length_normalizer: Annotated[float, Field(gt=0)],
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    cp_group: dist.ProcessGroup | None = None,
    sequence_weights: Tensor | None = None,
    policy_mask: PolicyMask | None = None,
    token_weights: Tensor | None = None,
    penalty: TokenPenalty | None = None,
) -> LossOutput:
    """Dr. GRPO (arXiv 2503.20783): PPO's clipped objective, summed over each sequence's tokens and divided by a constant.

    The paper's advantages are not divided by the group's standard deviation (advantage kind ``mean``).

    Args:
        length_normalizer: the constant, in tokens; the token limit of a response in the paper's code.

    Returns:
        The SUM over sequences; the caller divides by the sequences of the optimizer step.
    """
    tokens = PackedTokens(
        logprobs, old_logprobs, mask, sequence_ids, advantages, sequence_weights, policy_mask, penalty
    )
    return _ppo(tokens, clip_low, clip_high, cp_group, token_weights, divisor=length_normalizer)


def dapo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    mask: Tensor,
    sequence_ids: Tensor,
    advantages: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    cp_group: dist.ProcessGroup | None = None,
    sequence_weights: Tensor | None = None,
    policy_mask: PolicyMask | None = None,
    token_weights: Tensor | None = None,
    penalty: TokenPenalty | None = None,
) -> LossOutput:
    """DAPO (arXiv 2503.14476): PPO's objective with a higher upper clip, its mean over all tokens of the optimizer step.

    Returns:
        The SUM over tokens; the caller divides by the response tokens of the optimizer step.
    """
    tokens = PackedTokens(
        logprobs, old_logprobs, mask, sequence_ids, advantages, sequence_weights, policy_mask, penalty
    )
    return _ppo(tokens, clip_low, clip_high, cp_group, token_weights, divisor=1.0)


def gspo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    mask: Tensor,
    sequence_ids: Tensor,
    advantages: Tensor,
    *,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
    cp_group: dist.ProcessGroup | None = None,
    sequence_weights: Tensor | None = None,
    policy_mask: PolicyMask | None = None,
    penalty: TokenPenalty | None = None,
) -> LossOutput:
    """GSPO (arXiv 2507.18071): PPO's clipped objective on the sequence ratio ``s_i = exp(mean_t delta_it)``; clips whole sequences.

    Returns:
        The SUM over sequences; the caller divides by the sequences of the optimizer step. Clip fractions count sequences.
    """
    tokens = PackedTokens(
        logprobs, old_logprobs, mask, sequence_ids, advantages, sequence_weights, policy_mask, penalty
    )
    sums = tokens.sum_per_sequence(cp_group, {"log_ratio": tokens.log_ratio})
    length = sums["tokens"].clamp(min=1)
    nonempty = sums["tokens"] > 0
    ratio = torch.exp(sums["log_ratio"] / length)  # (S,)
    interval = 1 - clip_low, 1 + clip_high
    clipped = clip_one_sided(ratio, tokens.advantages, *interval)
    metrics = fractions(clip_events(ratio, tokens.advantages, *interval), nonempty.sum()) | extremes(
        "ratio", ratio, nonempty
    )
    metrics |= extremes("token_ratio", torch.exp(tokens.log_ratio), tokens.kept) | extremes(
        "sequence_ratio", clipped, nonempty
    )
    return tokens.output(tokens.advantages * clipped, length, sums, metrics)


def cispo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    mask: Tensor,
    sequence_ids: Tensor,
    advantages: Tensor,
    *,
    clip_low: float = 1.0,
    clip_high: float = 4.0,
    cp_group: dist.ProcessGroup | None = None,
    sequence_weights: Tensor | None = None,
    policy_mask: PolicyMask | None = None,
    token_weights: Tensor | None = None,
    penalty: TokenPenalty | None = None,
) -> LossOutput:
    """CISPO (MiniMax-M1, arXiv 2506.13585): ``- stop_gradient(clip(ratio)) A logprob``; no token loses its gradient.

    The default interval is [0, 5]: MiniMax-M1 sets no lower bound and names no upper one; 5 is ScaleRL's (arXiv 2510.13786).
    The clip is two-sided whatever the advantage's sign, and so are the clip fractions.

    Returns:
        The SUM over tokens; the caller divides by the response tokens of the optimizer step.
    """
    tokens = PackedTokens(
        logprobs, old_logprobs, mask, sequence_ids, advantages, sequence_weights, policy_mask, penalty
    )
    ratio = torch.exp(tokens.log_ratio.detach())  # (T,)
    low, high = 1 - clip_low, 1 + clip_high
    clipped = ratio.clamp(low, high)
    objective = clipped * tokens.token_advantages * tokens.logprobs
    events = {"clip_fraction_high": ratio > high, "clip_fraction_low": ratio < low}
    return _token_loss(tokens, objective, ratio, clipped, events, cp_group, token_weights, divisor=1.0)


def _ppo(
    tokens: PackedTokens,
    clip_low: float,
    clip_high: float,
    cp_group: dist.ProcessGroup | None,
    token_weights: Tensor | None,
    divisor: float | None,
) -> LossOutput:
    ratio = torch.exp(tokens.log_ratio)  # (T,)
    interval = 1 - clip_low, 1 + clip_high
    clipped = clip_one_sided(ratio, tokens.token_advantages, *interval)
    events = clip_events(ratio, tokens.token_advantages, *interval)
    return _token_loss(
        tokens, tokens.token_advantages * clipped, ratio, clipped, events, cp_group, token_weights, divisor
    )


def _token_loss(
    tokens: PackedTokens,
    objective: Tensor,
    ratio: Tensor,
    clipped: Tensor,
    events: dict[str, Tensor],
    cp_group: dist.ProcessGroup | None,
    token_weights: Tensor | None,
    divisor: float | None,
) -> LossOutput:
    """Sums a (T,) objective over each sequence and divides by ``divisor``, None meaning the sequence's number of tokens.

    ``clipped`` are the ratios in the objective, for the metrics.
    """
    objective = torch.where(tokens.kept, objective, 0)
    if token_weights is not None:
        objective = objective * tokens.masked(token_weights)
    sums = tokens.sum_per_sequence(cp_group, {"objective": objective, "clipped": clipped.detach(), **events})
    length = sums["tokens"].clamp(min=1)
    per = length if divisor is None else divisor
    metrics = fractions({name: sums[name] for name in events}, sums["tokens"].sum()) | extremes(
        "ratio", ratio, tokens.kept
    )
    metrics |= extremes("token_ratio", clipped, tokens.kept) | extremes(
        "sequence_ratio", sums["clipped"] / length, sums["tokens"] > 0
    )
    return tokens.output(sums["objective"] / per, per, sums, metrics)
