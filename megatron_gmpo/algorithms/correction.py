"""Rollout against training: how far the probabilities of the rollout engine are from the policy's own."""

from __future__ import annotations

from ..types import Metric, TrainBatch
from .sequences import k3


def rollout_mismatch(batch: TrainBatch) -> dict[str, Metric]:
    """Old log probabilities (recomputed by the policy) against those the rollout engine reported, over all response tokens.

    ``rollout/logprob_diff_mean`` is the mean absolute difference, ``rollout/k3_kl`` the k3 estimate of KL(rollout || policy).
    """
    assert batch.old_logprobs is not None
    log_ratio = (batch.old_logprobs - batch.rollout_logprobs)[batch.response_mask]
    return {
        "rollout/logprob_diff_mean": Metric(float(log_ratio.abs().sum()), log_ratio.numel()),
        "rollout/k3_kl": Metric(float(k3(log_ratio).sum()), log_ratio.numel()),
    }
