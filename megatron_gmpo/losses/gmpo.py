"""GMPO: Geometric-Mean Policy Optimization (arXiv 2507.20673)."""

from __future__ import annotations

import math
from typing import Annotated, Literal

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


def gmpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    mask: Tensor,
    sequence_ids: Tensor,
    advantages: Tensor,
    *,
    clip_low: float = 0.4,
    clip_high: float = 0.4,
    cp_group: dist.ProcessGroup | None = None,
    sequence_weights: Tensor | None = None,
    policy_mask: PolicyMask | None = None,
    penalty: TokenPenalty | None = None,
    clip_mode: Literal["token", "sequence", "none"] = "token",
    length_normalize: bool = True,
    dual_clip: Annotated[float, Field(gt=0)] | None = None,
) -> LossOutput:
    """Minus the advantage times the geometric mean of each sequence's token ratios, clipped one-sidedly in log space.

    For sequence i with response tokens t, n_i of them, and delta = logprobs - old_logprobs::

        c_it = min(delta_it, clip_high)  if A_i > 0  else  max(delta_it, -clip_low)
        rho_i = exp(sum_t c_it / n_i)
        loss = - sum_i A_i rho_i                          the caller divides by the N sequences of the optimizer step
        d loss / d logprobs_it = - A_i rho_i [not clipped] / n_i

    Clipped tokens stay in n_i. A sequence without response tokens contributes exactly 0. T tokens are packed in any order; under
    context parallelism they are this rank's, and loss and metrics (all but the log-ratio extremes) are equal on all ranks.

    Args:
        logprobs: (T,) log probabilities under the current policy, any floating dtype; the arithmetic is fp32 (float64 for float64).
        old_logprobs: (T,) under the policy that fixed the clip interval.
        mask: (T,) bool, True for response tokens. Values elsewhere are ignored, nan and inf included.
        sequence_ids: (T,) int64 in 0..S-1, the sequence of each token.
        advantages: (S,), one per sequence.
        clip_low, clip_high: half-widths of the interval of a log ratio, so the ratio lies in [exp(-clip_low), exp(clip_high)].
        cp_group: ranks among which a sequence's tokens are split; one all-reduce of (S, C) sums.
        sequence_weights: (S,) importance weights that multiply each sequence's policy term.
        policy_mask: tokens and sequences left out of the policy term.
        penalty: KL and entropy terms; their mean over a sequence's tokens is added.
        clip_mode: ``token`` clips each delta; ``sequence`` clips the exponent of rho_i once; ``none`` does not clip
            (the last two are the paper's ablations).
        length_normalize: False leaves out 1/n_i (the paper's ablation).
        dual_clip: caps the log ratio from above where A < 0. The one-sided clip leaves A < 0 with delta >> 0 unbounded; this bounds
            it (dual-clip PPO, arXiv 1912.09729, in log space). It acts where ``clip_mode`` does, on tokens for ``none``.

    Returns:
        The SUM over sequences, and metrics of this microbatch; ratio extremes are those of rho_i.
    """
    tokens = PackedTokens(
        logprobs, old_logprobs, mask, sequence_ids, advantages, sequence_weights, policy_mask, penalty
    )
    return geometric_mean_loss(
        tokens,
        tokens.log_ratio,
        clip_low=clip_low,
        clip_high=clip_high,
        cp_group=cp_group,
        clip_mode=clip_mode,
        length_normalize=length_normalize,
        dual_clip=dual_clip,
    )


def geometric_mean_loss(
    tokens: PackedTokens,
    log_ratio: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    cp_group: dist.ProcessGroup | None,
    clip_mode: Literal["token", "sequence", "none"] = "token",
    length_normalize: bool = True,
    dual_clip: float | None = None,
    observed: dict[str, Tensor] | None = None,
) -> LossOutput:
    """What gmpo and rspo share: ``- sum_i A_i exp(mean_t clip(log_ratio_it))``, keywords as in ``gmpo_loss``.

    Args:
        log_ratio: (T,) with gradient, 0 where a token is not kept.
        observed: (T,) values whose mean over all tokens becomes the metric ``policy/{name}``.
    """
    if clip_mode == "none":
        clip_low = clip_high = math.inf

    def clip(x: Tensor, advantages: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        events = clip_events(x, advantages, -clip_low, clip_high)
        clipped = clip_one_sided(x, advantages, -clip_low, clip_high)
        if dual_clip is not None:
            events["clip_fraction_dual"] = (advantages < 0) & (x > dual_clip)
            clipped = torch.where(advantages < 0, clipped.clamp(max=dual_clip), clipped)
        return clipped, events

    events: dict[str, Tensor] = {}
    observed = observed or {}
    if clip_mode != "sequence":
        log_ratio, events = clip(log_ratio, tokens.token_advantages)
    sums = tokens.sum_per_sequence(cp_group, {"log_ratio": log_ratio, **events, **observed})
    length = sums["tokens"].clamp(min=1)
    nonempty = sums["tokens"] > 0
    exponent = sums["log_ratio"] / length if length_normalize else sums["log_ratio"]
    if clip_mode == "sequence":
        exponent, events = clip(exponent, tokens.advantages)
        metrics = fractions(events, nonempty.sum())
    else:
        metrics = fractions({name: sums[name] for name in events}, sums["tokens"].sum())
    metrics |= fractions({name: sums[name] for name in observed}, sums["tokens"].sum())
    ratio = torch.exp(exponent.detach())  # (S,)
    metrics |= extremes("ratio", ratio, nonempty) | extremes("sequence_ratio", ratio, nonempty)
    metrics |= extremes("token_ratio", torch.exp(log_ratio.detach()), tokens.kept)
    weighs = tokens.kept_sequences(sums) & (tokens.advantages != 0)
    if tokens.sequence_weights is not None:
        weighs &= tokens.sequence_weights != 0
    # without 1/n the ratio may overflow, and 0 * inf is nan
    objective = tokens.advantages * torch.exp(exponent.where(weighs, 0)).where(weighs, 0)
    return tokens.output(objective, length, sums, metrics)
