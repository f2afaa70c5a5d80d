"""RSPO: Router-Shift Policy Optimization (arXiv 2510.23027).

It extends GMPO to mixtures of experts whose routing changes between updates.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from .gmpo import geometric_mean
from .tokens import LossOutput, LossTokens


def log_router_shift(scores: Tensor, old_scores: Tensor) -> Tensor:
    """Return the log router shift of each token in one layer: 0 if the scores are unchanged, else negative.

    The paper's router scores are a router's log probabilities over all experts, before top-k.

    Args:
        scores: (T, topk) log router scores under the current policy, of the experts that the OLD policy
            chose.
        old_scores: (T, topk) the same scores under the old policy.

    Returns:
        (T,) fp32 without gradient: minus the mean over experts of |scores - old_scores|. A token's gamma is
        the exponential of its mean over MoE layers.
    """
    return -(scores.detach().float() - old_scores.float()).abs().mean(1)


def rspo(
    tokens: LossTokens,
    *,
    clip_low: float,
    clip_high: float,
    min_router_shift: Annotated[float, Field(gt=0, le=1)] = 0.8,
) -> LossOutput:
    """Return GMPO's loss with each token's ratio multiplied by the token's router shift before clipping.

    ``delta_it`` of ``gmpo`` becomes ``delta_it + log max(gamma_it, min_router_shift)``. gamma is the column
    ``router_shift``, (T,) without gradient (see ``log_router_shift``). If a token's router scores changed,
    its factor in rho_i is smaller where A > 0, and it reaches the lower clip sooner where A < 0.

    Args:
        min_router_shift: lower bound of gamma; 1 gives GMPO.

    Returns:
        The SUM over sequences; the log-ratio metrics are those of the ratios before rescaling.
    """
    gamma = tokens.masked(tokens.columns["router_shift"].detach())
    floored = gamma.clamp(min=min_router_shift)
    return geometric_mean(
        tokens,
        torch.where(tokens.policy_mask, tokens.log_ratio + floored.log(), 0),
        clip_low=clip_low,
        clip_high=clip_high,
        observed={"router_shift": gamma, "router_shift_floored": gamma < min_router_shift},
    )
