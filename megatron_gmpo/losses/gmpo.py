"""GMPO: Geometric-Mean Policy Optimization (arXiv 2507.20673)."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from .tokens import LossOutput, LossTokens, clip_events, clip_one_sided, exp, extremes, means


def gmpo(
    tokens: LossTokens,
    *,
    clip_low: float,
    clip_high: float,
    clip_mode: Literal["token", "sequence", "none"] = "token",
    length_normalize: bool = True,
    dual_clip: Annotated[float, Field(gt=0)] | None = None,
) -> LossOutput:
    """Return the loss of GMPO, a SUM over sequences.

    The loss of a sequence is minus its advantage times the geometric mean of its clipped token ratios. The
    clip is one-sided, per token, in log space. For sequence i with n_i response tokens t::

        delta_it = logprobs_it - old_logprobs_it
        c_it     = min(delta_it, clip_high)   if A_i > 0
                   max(delta_it, -clip_low)   if A_i <= 0
        rho_i    = exp(sum_t c_it / n_i)
        loss     = - sum_i A_i rho_i

        d loss / d logprobs_it = - A_i rho_i / n_i   if token t is not clipped
                                 0                   if it is

    The caller divides the loss by the number of sequences of the optimizer step. Clipped tokens count in n_i.
    A sequence without response tokens contributes exactly 0. Under context parallelism, loss and metrics are
    equal on all ranks. Only the extremes and the histogram of the log ratio cover this rank's tokens.

    Args:
        clip_low, clip_high: half-widths of the interval of a log ratio. They bound the ratio to
            [exp(-clip_low), exp(clip_high)].
        clip_mode: ``token`` clips each delta_it. ``sequence`` clips the exponent of rho_i. ``none`` does not
            clip. The last two are ablations of the paper.
        length_normalize: False omits 1/n_i (an ablation of the paper).
        dual_clip: upper bound of the log ratio where A < 0, which the one-sided clip leaves unbounded
            (dual-clip PPO, arXiv 1912.09729, in log space). It bounds tokens for ``clip_mode`` ``token`` and
            ``none``, and the exponent of rho_i for ``sequence``.

    Returns:
        The SUM over sequences and the metrics of this microbatch. ``ratio_max`` and ``ratio_min`` are the
        extremes of rho_i.
    """
    return geometric_mean(
        tokens,
        tokens.log_ratio,
        clip_low=clip_low,
        clip_high=clip_high,
        clip_mode=clip_mode,
        length_normalize=length_normalize,
        dual_clip=dual_clip,
    )


def geometric_mean(
    tokens: LossTokens,
    log_ratio: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    clip_mode: Literal["token", "sequence", "none"] = "token",
    length_normalize: bool = True,
    dual_clip: float | None = None,
    observed: dict[str, Tensor] | None = None,
) -> LossOutput:
    """Return ``- sum_i A_i exp(mean_t clip(log_ratio_it))``, the common part of gmpo and rspo.

    ``gmpo`` describes the other arguments.

    Args:
        log_ratio: (T,) with gradient, 0 outside ``tokens.policy_mask``.
        observed: (T,) values whose mean over all response tokens becomes the metric ``policy/{name}``.
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
    sums = tokens.sum_per_sequence({"log_ratio": log_ratio, **events, **observed})
    nonempty = sums["tokens"] > 0
    exponent = sums["log_ratio"] / sums["tokens"].clamp(min=1) if length_normalize else sums["log_ratio"]
    if clip_mode == "sequence":
        exponent, events = clip(exponent, tokens.advantages)
        metrics = means(events, nonempty.sum())
    else:
        metrics = means({name: sums[name] for name in events}, sums["tokens"].sum())
    metrics |= means({name: sums[name] for name in observed}, sums["tokens"].sum())
    ratio = torch.exp(exponent.detach())  # (S,)
    metrics |= extremes("ratio", ratio, nonempty) | extremes("sequence_ratio", ratio, nonempty)
    metrics |= extremes("token_ratio", torch.exp(log_ratio.detach()), tokens.policy_mask)
    objective = tokens.advantages * exp(exponent)
    return tokens.output(objective.where(tokens.advantages != 0, 0), sums, metrics)  # 0 * inf is nan
