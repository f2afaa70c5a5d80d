"""Rollout against training: how far the probabilities of the rollout engine are from the policy's own, and weights that correct it."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..types import Metric, TrainBatch
from .sequences import k3

FAR = 0.1
"""A token whose two log probabilities differ by more is counted as far off: a bf16 engine's rounding stays well below."""


def rollout_mismatch(batch: TrainBatch) -> dict[str, Metric]:
    """Old log probabilities (recomputed by the policy) against those the rollout engine reported, over all response tokens.

    ``rollout/logprob_diff_mean`` and ``_max`` are absolute differences, ``_far`` the share of tokens beyond FAR, and ``rollout/k3_kl``
    is the k3 estimate of KL(rollout || policy).
    """
    log_ratio = _log_ratio(batch)[batch.response_mask]
    difference = log_ratio.abs()
    count = log_ratio.numel()
    return {
        "rollout/logprob_diff_mean": Metric(float(difference.sum()), count),
        "rollout/logprob_diff_max": Metric(float(difference.max()) if count else 0.0, op="max"),
        "rollout/logprob_diff_far": Metric(float((difference > FAR).sum()), count),
        "rollout/k3_kl": Metric(float(k3(log_ratio).sum()), count),
    }


def importance_weights(batch: TrainBatch, level: Literal["token", "sequence", "geometric"], cap: float) -> tuple[Tensor, dict[str, Metric]]:
    """Truncated importance weights ``min(pi_old / pi_rollout, cap)``, without gradient.

    ``token`` takes each token's ratio (arXiv 2508.21016 and others), ``sequence`` the product over a sequence's response tokens, which is
    unbiased before truncation, ``geometric`` the product's n-th root for n tokens: the form of GMPO's and GSPO's own ratios, whose
    variance does not grow with n.

    Returns:
        (L,) weights for ``token``, 1 outside the mask, else (S,), 1 for a sequence without response tokens; and how many were truncated,
        and their mean.
    """
    log_ratio = _log_ratio(batch)
    counted = batch.response_mask
    if level != "token":
        sequences = torch.repeat_interleave(torch.arange(len(batch)), batch.lengths)
        lengths = batch.response_lengths
        log_ratio = torch.zeros(len(batch), dtype=torch.float64).index_add(0, sequences, log_ratio.double())
        if level == "geometric":
            log_ratio = log_ratio / lengths.clamp(min=1)
        counted = lengths > 0
    weights = log_ratio.exp().clamp(max=cap).float()
    count = int(counted.sum())
    return weights, {
        "rollout/weight_mean": Metric(float(weights[counted].sum()), count),
        "rollout/weight_truncated": Metric(float((weights[counted] >= cap).sum()), count),
    }


def correct(batch: TrainBatch, level: Literal["token", "sequence", "geometric"], cap: float) -> dict[str, Metric]:
    """Gives the batch its ``importance_weights``, which multiply the policy terms of the loss; their metrics."""
    weights, metrics = importance_weights(batch, level, cap)
    if level == "token":
        batch.token_weights = weights
    else:
        batch.sequence_weights = weights
    return metrics


def _log_ratio(batch: TrainBatch) -> Tensor:
    """(L,) fp32 log pi_old - log pi_rollout, 0 outside the mask."""
    assert batch.old_logprobs is not None
    return torch.where(batch.response_mask, batch.old_logprobs - batch.rollout_logprobs, 0)
