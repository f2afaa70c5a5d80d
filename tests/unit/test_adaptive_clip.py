"""The adaptive clip on simulated policies with drifting log ratios, measured by the real losses."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_gmpo.config import AlgorithmConfig
from megatron_gmpo.errors import InputError
from megatron_gmpo.losses import LossTokens
from megatron_gmpo.losses.adaptive_clip import AdaptiveClip, ClipState, make_adaptive_clip
from megatron_gmpo.losses.objective import make_objective
from megatron_gmpo.losses.registry import LOSSES
from megatron_gmpo.metrics.figures import Metric, reduce_metrics
from megatron_gmpo.metrics.histogram import BINS, quantile

SEQUENCES, TOKENS = 256, 16


def controller(**fields) -> AdaptiveClip:
    """Return the controller of the config with clip = "adaptive"."""
    cfg = AlgorithmConfig(clip="adaptive", **fields)
    clip = make_adaptive_clip(cfg, make_objective(cfg, is_moe=True, max_new_tokens=64))
    assert clip is not None
    return clip


def step(loss: str, clip: AdaptiveClip, scale: float, g: torch.Generator) -> dict[str, Metric]:
    """Return the metrics of the loss over two minibatches.

    The log ratios are 0 in the first minibatch and heavy-tailed with standard deviation proportional to
    ``scale`` in the second.
    """
    ids = torch.repeat_interleave(torch.arange(SEQUENCES), TOKENS)
    advantages = torch.where(torch.arange(SEQUENCES) % 2 == 0, 1.0, -1.0)

    def minibatch(scale: float) -> dict[str, Metric]:
        # The kurtosis of this distribution is 18.
        tails = torch.empty(len(ids)).exponential_(generator=g) * torch.randn(len(ids), generator=g)
        new = torch.full((len(ids),), -2.0)
        mask = torch.ones(len(ids), dtype=torch.bool)
        tokens = LossTokens(
            new,
            new - scale * tails,
            mask,
            ids,
            advantages,
            columns={"router_shift": torch.ones(len(ids))},
        )
        clips = {"clip_low": clip.clips["low"], "clip_high": clip.clips["high"]}
        return LOSSES[loss].function(tokens, **clips).metrics

    return reduce_metrics([minibatch(0.0), minibatch(scale)])


def fraction(metrics: list[dict[str, Metric]], side: str) -> float:
    merged = reduce_metrics(metrics)[f"policy/clip_fraction_{side}"]
    return float(merged.total / merged.count)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss", "target", "gain"),
    [("gmpo", 0.01, 0.1), ("gmpo", 0.002, 0.1), ("rspo", 0.01, 0.1), ("grpo", 0.01, 0.1), ("gspo", 0.1, 0.3)],
)
def test_the_clip_fraction_reaches_its_target_while_the_ratios_drift(
    loss: str, target: float, gain: float
) -> None:
    """The scale grows fourfold over 120 steps, then stays.

    While it grows, the controller lags by the drift of a step over its gain.
    """
    largest = 4.0 if loss in ("gmpo", "rspo") else 1.0
    clip = controller(loss=loss, clip_target=target, clip_gain=gain, clip_bounds=(1e-6, largest))
    g = torch.Generator().manual_seed(0)
    history = [step_and_move(loss, clip, 0.05 * 4 ** min(i / 120, 1), g) for i in range(160)]
    for side in ("low", "high"):
        assert fraction(history[80:120], side) == pytest.approx(target, rel=0.2)
        assert fraction(history[130:], side) == pytest.approx(target, rel=0.1)
        assert fraction([step(loss, controller(loss=loss), 0.2, g)], side) != pytest.approx(target, rel=0.2)


def step_and_move(loss: str, clip: AdaptiveClip, scale: float, g: torch.Generator) -> dict[str, Metric]:
    metrics = step(loss, clip, scale, g)
    clip.update(metrics)
    return metrics


def test_the_tail_reaches_its_target_where_the_policy_answers_the_clip() -> None:
    """A wider clip makes this policy drift further, at a rate that doubles over 80 steps and then stays."""
    clip = controller(clip_signal="tail", clip_target=0.2, clip_bounds=(1e-3, 1.0))
    g = torch.Generator().manual_seed(0)
    history = [
        step_and_move("gmpo", clip, 0.3 * (1 + min(i / 80, 1)) * math.sqrt(clip.clips["high"]), g)
        for i in range(140)
    ]
    for q in (0.001, 0.999):
        assert abs(quantile(history[0]["policy/log_ratio"].total, q)) > 0.4
        assert abs(quantile(reduce_metrics(history[-20:])["policy/log_ratio"].total, q)) == pytest.approx(
            0.2, rel=0.2
        )


metrics_of_a_step = st.tuples(st.integers(0, 50), st.integers(0, 50), st.integers(0, 50))


@settings(deadline=None)
@given(
    st.lists(metrics_of_a_step, max_size=200),
    st.sampled_from(["fraction", "tail"]),
    st.sampled_from(["gmpo", "grpo", "cispo"]),
)
def test_clips_never_leave_their_bounds(steps: list[tuple[int, int, int]], signal: str, loss: str) -> None:
    clip = controller(
        loss=loss,
        clip_signal=signal,
        clip_target=0.2,
        clip_gain=1.0,
        clip_low=0.3,
        clip_high=0.3,
        clip_bounds=(0.1, 2.0),
    )
    for low, high, count in steps:
        counts = torch.zeros(BINS)
        counts[low], counts[-1 - high] = count, count
        clip.update(
            {
                "policy/clip_fraction_low": Metric(min(low, count), count),
                "policy/clip_fraction_high": Metric(min(high, count), count),
                "policy/log_ratio": Metric(counts, op="histogram"),
            }
        )
        assert 0.1 <= clip.clips["low"] <= (2.0 if loss == "gmpo" else 1.0)  # 1 - clip_low is a ratio
        assert 0.1 <= clip.clips["high"] <= 2.0


def test_it_moves_each_side_by_the_rule_and_goes_on_from_its_state() -> None:
    clip = controller(clip_low=0.3, clip_high=0.4, clip_target=0.01, clip_gain=0.2)
    moved = {"policy/clip_fraction_low": Metric(15.0, 1000), "policy/clip_fraction_high": Metric(0.0, 1000)}
    clip.update(moved)
    assert clip.clips == {
        "low": pytest.approx(0.3 * math.exp(0.2 * 0.5)),
        "high": pytest.approx(0.4 * math.exp(-0.2)),
    }
    before = dict(clip.clips)
    clip.update({name: Metric(0.0, 0) for name in moved})  # no response tokens
    assert clip.clips == before

    resumed = controller(clip_low=0.3, clip_high=0.4, clip_target=0.01, clip_gain=0.2)
    resumed.load_state_dict(ClipState.model_validate(json.loads(json.dumps(clip.state_dict()))))
    for either in (clip, resumed):
        either.update(moved)
    assert resumed.clips == clip.clips
    narrow = controller(clip_low=0.3, clip_high=0.4, clip_bounds=(0.29, 0.41))
    narrow.load_state_dict(ClipState.model_validate(clip.state_dict()))
    assert narrow.clips == {"low": pytest.approx(min(max(clip.clips["low"], 0.29), 0.41)), "high": 0.29}


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, {"low": 0.33, "high": 0.37}),
        ({"clip_gain": 0.5, "clip_target": 0.02}, {"low": 0.33, "high": 0.37}),
        ({"clip_low": 0.25}, {"low": 0.25, "high": 0.37}),  # the config asks for another clip
        ({"clip_high": 0.5}, {"low": 0.33, "high": 0.5}),
        ({"clip_low": 0.25, "clip_high": 0.5}, {"low": 0.25, "high": 0.5}),
        ({"loss": "grpo"}, {"low": 0.3, "high": 0.4}),  # equal numbers, in another space
        ({"loss": "gspo", "clip_low": None, "clip_high": None}, {"low": 3e-4, "high": 4e-4}),
    ],
)
def test_a_clip_that_the_config_changes_starts_again(changed: dict, expected: dict[str, float]) -> None:
    fields = {"clip_low": 0.3, "clip_high": 0.4}
    state = {**controller(**fields).state_dict(), "low": 0.33, "high": 0.37}
    resumed = controller(**fields | changed)
    resumed.update({f"policy/clip_fraction_{side}": Metric(1.0, 2) for side in ("low", "high")})
    resumed.load_state_dict(ClipState.model_validate(json.loads(json.dumps(state))))
    assert resumed.clips == expected


def test_the_objective_takes_the_clips() -> None:
    cfg = AlgorithmConfig(clip="adaptive")
    objective = make_objective(cfg, is_moe=False, max_new_tokens=8)
    clip = make_adaptive_clip(cfg, objective)
    assert clip is not None
    clip.load_state_dict(ClipState(low=0.11, high=0.22))
    assert (clip.applied_to(objective).clip_low, clip.applied_to(objective).clip_high) == (0.11, 0.22)
    assert (objective.clip_low, objective.clip_high) == (0.4, 0.4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"options": {"clip_mode": "none"}}, r"clip_mode = 'none' clips nothing"),
        ({"clip_signal": "tail"}, r"clip_signal = 'tail' needs algorithm\.clip_target"),
        ({"clip_low": 0.0}, r"algorithm\.clip_low = 0 cannot adapt"),
        (
            {"clip_high": 3.0, "clip_bounds": (0.1, 2.0)},
            r"algorithm\.clip_high = 3 cannot adapt: start within \[0\.1, 2\]",
        ),
        (
            {"loss": "grpo", "clip_low": 1.5},
            r"algorithm\.clip_low = 1\.5 cannot adapt: start within \[0\.1875, 1\]",
        ),
    ],
)
def test_what_cannot_adapt_is_refused(fields: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        controller(**fields)


def test_fixed_is_the_default() -> None:
    assert (
        make_adaptive_clip(
            AlgorithmConfig(), make_objective(AlgorithmConfig(), is_moe=False, max_new_tokens=8)
        )
        is None
    )
