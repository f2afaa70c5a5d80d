"""Metrics, importance weights and masks for the mismatch between rollout and policy probabilities."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..batch.columns import TrainBatch
from ..config import AlgorithmConfig
from ..metrics.figures import Metric, weights_metric
from .tokens import K3_BOUND, k3

FAR = 0.1
"""Difference of log probabilities above which a token counts as far off.

Rounding in a bf16 engine causes much smaller differences."""


def rollout_mismatch(*batches: TrainBatch) -> dict[str, Metric]:
    """Compare the log probabilities of the policy and of the rollout engine over a replica's response tokens.

    The policy's values are ``old_logprobs``, and the engine's values are ``rollout_logprobs``.

    Returns:
        ``rollout/logprob_diff_mean`` and ``rollout/logprob_diff_max``: absolute differences;
        ``rollout/logprob_diff_far``: share of tokens whose difference exceeds FAR;
        ``rollout/k3_kl``: k3 estimate of KL(rollout || policy);
        ``rollout/k3_kl_bounded``: share of tokens whose log ratio exceeds the bound of ``k3``;
        ``rollout/effective_sample_size``: effective sample size of the tokens' ratios old / rollout, as a
        share of their number. Nothing if no response token is trained: with ``old_logprobs = "rollout"`` the
        first minibatch, the only one with ``old_logprobs``, may have no sequence with an advantage.
    """
    log_ratio = torch.cat([torch.zeros(0), *(_log_ratio(batch)[batch.response_mask] for batch in batches)])
    difference = log_ratio.abs()
    count = log_ratio.numel()
    if count == 0:
        return {}
    return {
        "rollout/logprob_diff_mean": Metric(float(difference.sum()), count),
        "rollout/logprob_diff_max": Metric(float(difference.max()), op="max"),
        "rollout/logprob_diff_far": Metric(float((difference > FAR).sum()), count),
        "rollout/k3_kl": Metric(float(k3(log_ratio).sum()), count),
        "rollout/k3_kl_bounded": Metric(float((log_ratio > K3_BOUND).sum()), count),
        "rollout/effective_sample_size": weights_metric(log_ratio),
    }


def importance_weights(
    batch: TrainBatch, level: Literal["token", "sequence", "geometric"], cap: float
) -> tuple[Tensor, dict[str, Metric]]:
    """Return truncated importance weights ``min(pi_old / pi_rollout, cap)`` and their metrics.

    ``token`` uses each token's ratio (arXiv 2508.21016 and others). ``sequence`` uses the product over a
    unit's response tokens, which is unbiased before truncation if the unit is a whole sequence. ``geometric``
    uses the n-th root of the product over n tokens, as the ratios of GMPO and GSPO do; its variance does not
    grow with n.

    Returns:
        (L,) weights for ``token``, 1 outside the mask. (U,) weights for the other levels, 1 for a unit
        without response tokens. The metrics are the share of truncated weights, the mean, and the effective
        sample size as a share of the number of weights.
    """
    log_ratio, counted = _log_ratio(batch), batch.response_mask
    if level != "token":
        log_ratio, lengths = _unit_log_ratio(batch, mean=level == "geometric")
        counted = lengths > 0
    weights = log_ratio.exp().clamp(max=cap).float()
    count = int(counted.sum())
    used = weights[counted]
    sums = torch.stack([torch.zeros(()).double(), used.double().sum(), (used.double() ** 2).sum()])
    return weights, {
        "rollout/weight_mean": Metric(float(used.sum()), count),
        "rollout/weight_truncated": Metric(float((used >= cap).sum()), count),
        "rollout/weight_effective_sample_size": Metric(sums, count, "weights"),  # capped: they need no scale
    }


def kept_tokens(batch: TrainBatch, mask: Literal["icepop", "geometric"], low: float, high: float) -> Tensor:
    """Return (L,) bool: tokens whose ratio pi_old / pi_rollout lies in [low, high].

    ``icepop`` tests each token. ``geometric`` tests the geometric mean over a unit's response tokens, so it
    keeps or rejects whole units, independent of their length.
    """
    log_ratio = _log_ratio(batch).double()
    if mask == "geometric":
        log_ratio = _unit_log_ratio(batch, mean=True)[0][batch.unit_ids]
    ratio = log_ratio.exp()
    return (ratio >= low) & (ratio <= high)


def correct(batch: TrainBatch, cfg: AlgorithmConfig) -> dict[str, Metric]:
    """Set the importance weights and the mask of ``cfg`` on a replica's batch, and return its metrics.

    Off-policy masking depends on the current policy, so the loss applies it.
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


def _log_ratio(batch: TrainBatch) -> Tensor:
    """Return (L,) fp32 log pi_old - log pi_rollout, 0 outside ``response_mask``."""
    assert batch.old_logprobs is not None
    return torch.where(batch.response_mask, batch.old_logprobs - batch.rollout_logprobs, 0)


def _unit_log_ratio(batch: TrainBatch, mean: bool) -> tuple[Tensor, Tensor]:
    """Return the sum of each unit's log ratios, or their mean, (U,) float64, and its response tokens (U,)."""
    zeros, units = torch.zeros(int(batch.units.sum()), dtype=torch.float64), batch.unit_ids
    lengths = zeros.index_add(0, units, batch.response_mask.double())
    sums = zeros.index_add(0, units, _log_ratio(batch).double())
    return sums / lengths.clamp(min=1) if mean else sums, lengths
