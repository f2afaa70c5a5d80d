"""Advantages relative to a prompt's group."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..batch.samples import SampleGroup


def group_advantages(
    groups: list[SampleGroup], kind: Literal["normalized", "mean", "leave_one_out"] = "normalized"
) -> Tensor:
    """One advantage per sample, from the rewards of its group.

    Args:
        groups: G groups of any size.
        kind: ``normalized`` is (r - mean) / (std + 1e-8) with the unbiased std, as in the official GMPO code (TRL: the same std,
            epsilon 1e-4); ``mean`` is r - mean (Dr. GRPO); ``leave_one_out`` is r minus the mean of the OTHER samples (RLOO).

    Returns:
        (S,) fp32 in the order of the samples in ``groups``. A group whose rewards are all equal, or of one sample, gives exactly 0.
    """
    per_group = [_advantages(torch.tensor(group.rewards, dtype=torch.float64), kind) for group in groups]
    return torch.cat([torch.empty(0, dtype=torch.float64), *per_group]).float()


def _advantages(rewards: Tensor, kind: str) -> Tensor:
    if (rewards == rewards[:1]).all():
        # Rounding of the mean over 1e-8 would not be 0.
        return torch.zeros_like(rewards)
    centered = rewards - rewards.mean()
    if kind == "normalized":
        return centered / (rewards.std() + 1e-8)
    if kind == "leave_one_out":
        return centered * len(rewards) / (len(rewards) - 1)
    return centered
