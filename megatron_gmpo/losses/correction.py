"""Rollout against training: how far the rollout engine's probabilities are from the policy's own, and weights and masks against it."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..batch.columns import TrainBatch
from ..config import AlgorithmConfig
from ..metrics.figures import Metric
from .tokens import k3

FAR = 0.1
"""A token whose two log probabilities differ by more is counted as far off: a bf16 engine's rounding stays well below."""


def rollout_mismatch(batch: TrainBatch) -> dict[str, Metric]:
    """Old log probabilities (recomputed by the policy) against those the rollout engine reported, over all response tokens.

    ``rollout/logprob_diff_mean`` and ``_max`` are absolute differences, ``_far`` the share of tokens beyond FAR, ``rollout/k3_kl`` is
    the k3 estimate of KL(rollout || policy), and ``rollout/effective_sample_size`` that of the ratios old / rollout of tokens, as a share
    of their number.
    """
    log_ratio = _log_ratio(batch)[batch.response_mask]
    difference = log_ratio.abs()
    count = log_ratio.numel()
    return {
        "rollout/logprob_diff_mean": Metric(float(difference.sum()), count),
        "rollout/logprob_diff_max": Metric(float(difference.max()) if count else 0.0, op="max"),
        "rollout/logprob_diff_far": Metric(float((difference > FAR).sum()), count),
        "rollout/k3_kl": Metric(float(k3(log_ratio).sum()), count),
        "rollout/effective_sample_size": _effective_sample_size(log_ratio.double().exp()),
    }


def importance_weights(
    batch: TrainBatch, level: Literal["token", "sequence", "geometric"], cap: float
) -> tuple[Tensor, dict[str, Metric]]:
    """Truncated importance weights ``min(pi_old / pi_rollout, cap)``, without gradient.

    ``token`` takes each token's ratio (arXiv 2508.21016 and others), ``sequence`` the product over a sequence's response tokens, which is
    unbiased before truncation, ``geometric`` the product's n-th root for n tokens: the form of GMPO's and GSPO's own ratios, whose
    variance does not grow with n.

    Returns:
        (L,) weights for ``token``, 1 outside the mask, else (S,), 1 for a sequence without response tokens; and how many were truncated,
        their mean, and their effective sample size as a share of their number.
    """
    log_ratio, counted = _log_ratio(batch), batch.response_mask
    if level != "token":
        log_ratio, counted = _sequence_log_ratio(batch, mean=level == "geometric"), batch.response_lengths > 0
    weights = log_ratio.exp().clamp(max=cap).float()
    count = int(counted.sum())
    return weights, {
        "rollout/weight_mean": Metric(float(weights[counted].sum()), count),
        "rollout/weight_truncated": Metric(float((weights[counted] >= cap).sum()), count),
        "rollout/weight_effective_sample_size": _effective_sample_size(weights[counted]),
    }


def kept_tokens(batch: TrainBatch, mask: Literal["icepop", "geometric"], low: float, high: float) -> Tensor:
    """(L,) bool: tokens whose ratio pi_old / pi_rollout lies in [low, high].

    ``icepop`` looks at each token; ``geometric`` at the geometric mean over a sequence's response tokens, and so keeps or rejects whole
    sequences whatever their length.
    """
    log_ratio = _log_ratio(batch).double()
    if mask == "geometric":
        log_ratio = torch.repeat_interleave(_sequence_log_ratio(batch, mean=True), batch.lengths)
    ratio = log_ratio.exp()
    return (ratio >= low) & (ratio <= high)


def correct(batch: TrainBatch, cfg: AlgorithmConfig) -> dict[str, Metric]:
    """Gives the batch the importance weights and the mask that ``cfg`` asks for; their metrics.

    Off-policy masking depends on the current policy and happens in the loss.
    """
    metrics: dict[str, Metric] = {}
    if cfg.correction != "none":
        weights, metrics = importance_weights(batch, cfg.correction, cfg.correction_cap)
        if cfg.correction == "token":
            batch.token_weights = weights
        else:
            batch.sequence_weights = weights
    if cfg.mask == "icepop" or cfg.mask == "geometric":
        batch.kept_tokens = kept_tokens(batch, cfg.mask, *cfg.mask_band)
    return metrics


def _effective_sample_size(weights: Tensor) -> Metric:
    """Kish's, as a share of the number of weights."""
    weights = weights.double()
    return Metric(float(weights.sum() ** 2), float(len(weights) * (weights**2).sum()))


def _log_ratio(batch: TrainBatch) -> Tensor:
    """(L,) fp32 log pi_old - log pi_rollout, 0 outside the mask."""
    assert batch.old_logprobs is not None
    return torch.where(batch.response_mask, batch.old_logprobs - batch.rollout_logprobs, 0)


def _sequence_log_ratio(batch: TrainBatch, mean: bool) -> Tensor:
    """(S,) float64: sum of each sequence's log ratios, or their mean over its response tokens."""
    sequences = torch.repeat_interleave(torch.arange(len(batch)), batch.lengths)
    sums = torch.zeros(len(batch), dtype=torch.float64).index_add(0, sequences, _log_ratio(batch).double())
    return sums / batch.response_lengths.clamp(min=1) if mean else sums
