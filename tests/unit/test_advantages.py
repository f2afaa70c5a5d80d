"""Group-relative advantages equal their definitions, those of TRL and RLOO."""

from __future__ import annotations

import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_gmpo.losses.advantages import group_advantages

from ..support.groups import index_of, rewarded

KINDS = ["normalized", "mean", "leave_one_out"]


def definition(rewards: list[float], kind: str) -> list[float]:
    if len(set(rewards)) == 1:
        return [0.0] * len(rewards)
    if kind == "leave_one_out":
        return [r - statistics.fmean(rewards[:i] + rewards[i + 1 :]) for i, r in enumerate(rewards)]
    scale = statistics.stdev(rewards) + 1e-8 if kind == "normalized" else 1.0
    return [(r - statistics.fmean(rewards)) / scale for r in rewards]


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, derandomize=True)
@given(
    rewards=st.lists(
        st.lists(st.sampled_from([0.0, 1.0, 0.1, -0.5, 0.7]), min_size=1, max_size=8), min_size=1, max_size=4
    )
)
def test_matches_the_definition_in_group_order(kind: str, rewards: list[list[float]]):
    advantages = group_advantages(index_of(rewarded(rewards)), kind)
    assert advantages.dtype == torch.float32
    assert advantages.tolist() == pytest.approx(
        [a for row in rewards for a in definition(row, kind)], rel=1e-6, abs=1e-7
    )


def test_normalized_uses_trl_std():
    from trl.trainer.utils import nanstd

    rewards = torch.tensor([0.0, 1.0, 1.0, 0.3])
    expected = (rewards - rewards.mean()) / (nanstd(rewards) + 1e-8)
    torch.testing.assert_close(
        group_advantages(index_of(rewarded([rewards.tolist()])), "normalized"), expected
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rewards", [[0.1] * 7, [1e8 / 3] * 3, [0.7]])
def test_without_variance_exactly_zero(kind: str, rewards: list[float]):
    assert group_advantages(index_of(rewarded([rewards])), kind).tolist() == [0.0] * len(rewards)


def test_no_groups():
    assert group_advantages(index_of([]), "mean").shape == (0,)
