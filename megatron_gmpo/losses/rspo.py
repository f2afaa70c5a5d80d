"""RSPO: Router-Shift Policy Optimization (arXiv 2510.23027), GMPO for mixtures of experts whose routing moves."""

from __future__ import annotations

from typing import Annotated

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor

from .gmpo import geometric_mean_loss
from .tokens import LossOutput, PackedTokens, PolicyMask, TokenPenalty


def log_router_shift(scores: Tensor, old_scores: Tensor) -> Tensor:
    """How far one layer's routing of each token moved: 0 where it did not, negative where it did.

    The paper's router scores are the log probabilities of a router's distribution over all experts, before top-k.

    Args:
        scores: (T, topk) log router scores under the current policy, of the experts that the OLD policy chose.
        old_scores: the same under the old policy.

    Returns:
        (T,) - mean over experts of |scores - old_scores|, fp32 without gradient. A token's gamma is exp of the mean over MoE layers.
    """
    return -(scores.detach().float() - old_scores.float()).abs().mean(1)


def rspo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    mask: Tensor,
    sequence_ids: Tensor,
    advantages: Tensor,
    *,
    router_shift: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    cp_group: dist.ProcessGroup | None = None,
    sequence_weights: Tensor | None = None,
    policy_mask: PolicyMask | None = None,
    penalty: TokenPenalty | None = None,
    min_router_shift: Annotated[float, Field(gt=0, le=1)] = 0.8,
) -> LossOutput:
    """GMPO with each token's ratio multiplied, before clipping, by how little the token's routing moved.

    ``delta_it`` of ``gmpo_loss`` becomes ``delta_it + log max(gamma_it, min_router_shift)``; gamma carries no gradient. A token whose
    experts were rescored weighs less in rho_i where A > 0, and reaches the lower clip sooner where A < 0. Arguments not described here
    are those of ``gmpo_loss``; the default clip is GMPO's for MoE.

    Args:
        router_shift: (T,) gamma, see ``log_router_shift``; ignored outside the mask.
        min_router_shift: the floor of gamma; 1 gives GMPO.

    Returns:
        The SUM over sequences; the log-ratio metrics are of the ratios before rescaling.
    """
    tokens = PackedTokens(
        logprobs, old_logprobs, mask, sequence_ids, advantages, sequence_weights, policy_mask, penalty
    )
    gamma = tokens.masked(router_shift.detach())
    floored = gamma.clamp(min=min_router_shift)
    return geometric_mean_loss(
        tokens,
        torch.where(tokens.kept, tokens.log_ratio + floored.log(), 0),
        clip_low=clip_low,
        clip_high=clip_high,
        cp_group=cp_group,
        observed={"router_shift": gamma, "router_shift_floored": gamma < min_router_shift},
    )
