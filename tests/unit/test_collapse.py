"""The collapse detector on synthetic curves: healthy noisy runs and every kind of collapse."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from megatron_gmpo.checkpoint import go_back
from megatron_gmpo.config import CollapseConfig, Config
from megatron_gmpo.metrics.collapse import Collapse, CollapseDetector, CollapseState
from megatron_gmpo.weights.run_checkpoint import checkpoint_before, read_state, write_state
from megatron_gmpo.weights.torch_dist import LATEST

from ..support.run_states import newest, run_state

Curve = Callable[[int], dict[str, float]]
STEPS, AT = 120, 61
"""Number of steps in a run, and the first step of its collapse."""


def healthy(seed: int, *, answers: int = 256, final_entropy: float = 0.2, final_reward: float = 0.7) -> Curve:
    """Return the curve of a healthy run.

    The mean reward of ``answers`` graded answers starts at 0.2, entropy at 0.6. Gradient norms are log-normal
    with spikes of single steps.
    """
    rng = np.random.default_rng(seed)
    spikes = rng.choice(np.arange(0, 1000, 5), 20, replace=False)

    def figures(step: int) -> dict[str, float]:
        progress = min(1.0, step / 80)
        reward = rng.binomial(answers, 0.2 + (final_reward - 0.2) * progress) / answers
        entropy = 0.6 * (final_entropy / 0.6) ** progress * rng.lognormal(0, 0.1)
        spike = 40.0 if step in spikes else 1.0
        return {
            "policy/entropy": entropy,
            "grad_norm": 0.3 * spike * rng.lognormal(0, 0.5),
            "reward/mean": reward,
        }

    return figures


def collapsing(seed: int, name: str, factor: float) -> Curve:
    """Return a healthy curve with one figure multiplied by ``factor`` from step AT on."""
    before = healthy(seed)
    return lambda step: {n: x * (factor if n == name and step >= AT else 1) for n, x in before(step).items()}


def run(curve: Curve, steps: int = STEPS, **fields) -> list[tuple[int, Collapse]]:
    """Return (step, collapse) for every collapse found in a run that continues regardless."""
    detector = CollapseDetector(CollapseConfig(**fields))
    found = ((step, detector.update(step, curve(step))) for step in range(1, steps + 1))
    return [(step, collapse) for step, collapse in found if collapse]


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    answers=st.sampled_from([32, 256, 4096]),
    final_entropy=st.floats(0.06, 1.2),
    final_reward=st.floats(0.15, 1.0),
)
@example(seed=1, answers=32, final_entropy=1.0, final_reward=0.150390625)
def test_healthy_noisy_runs_do_not_fire(
    seed: int, answers: int, final_entropy: float, final_reward: float
) -> None:
    """Entropy may fall to a tenth or rise; the mean reward may stay flat or lose a quarter.

    The reward can fire by chance, so the claim is a rate. The run most at risk has 32 answers per step and a
    reward that falls from 0.2 to 0.15. Let s = sqrt(0.2 * 0.8 / 32 / 10) = 0.0224 be the standard error of a
    window mean (taken as known), and e and f the errors of the best and the current window in units of s. The
    detector fires when 0.15 + f s + 4 s < (0.2 + e s) / 2, i.e. e / 2 - f > 4 + 0.05 / s = 6.2. For disjoint
    windows e / 2 - f has standard deviation sqrt(1.25) = 1.118, so one pair of windows fires with probability
    1.4e-8, the normal tail beyond 6.2 / 1.118. The 200 * 200 / 2 pairs of a run give less than 3e-4.
    """
    curve = healthy(seed, answers=answers, final_entropy=final_entropy, final_reward=final_reward)
    assert run(curve, 200) == []


@pytest.mark.slow
def test_false_alarms_of_the_reward_are_rare() -> None:
    """None of 500 runs most at risk fires: the bound of 3e-4 per run allows 0.15 alarms.

    The rule "a loss of more than half and of more than 8 standard errors" fires in 0.7 % of such runs.
    """
    rng = np.random.default_rng(0)
    steps = np.arange(1, 201)
    steady = {"policy/entropy": 1.0, "grad_norm": 1.0}
    for _ in range(500):
        rewards = rng.binomial(32, 0.2 - 0.05 * np.minimum(1, steps / 80)) / 32
        assert run(lambda step, rewards=rewards: steady | {"reward/mean": rewards[step - 1]}, 200) == []


@pytest.mark.parametrize(("level", "fires"), [(0.34, False), (0.30, True)])
def test_the_limit_of_the_reward_includes_noise(level: float, fires: bool) -> None:
    """Rewards alternate around a level by 0.1, so that the mean over 10 steps equals the level.

    Successive values differ by 0.2. Half the mean squared difference is 0.02, and the standard error of a
    mean over 10 steps sqrt(0.002) = 0.0447. With a best mean of 1 the limit is 0.5 - 4 * 0.0447 = 0.321.
    """

    def rewards(step: int) -> dict[str, float]:
        mean = 1.0 if step < 3000 else level
        return {"policy/entropy": 1.0, "grad_norm": 1.0, "reward/mean": mean + 0.1 * (-1) ** step}

    assert len(run(rewards, 3100)) == fires


@settings(deadline=None, max_examples=40, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1), kind=st.sampled_from(["policy/entropy", "grad_norm", "reward/mean"]))
def test_every_collapse_fires_within_a_window_and_once(seed: int, kind: str) -> None:
    factor = {"policy/entropy": 0.02, "grad_norm": 200.0, "reward/mean": 0.1}[kind]
    ((step, collapse),) = run(collapsing(seed, kind, factor))
    cfg = CollapseConfig()
    assert kind in collapse.reason
    if kind == "reward/mean":
        assert AT + cfg.patience <= step <= AT + cfg.window  # most of the window must lie after AT
        assert AT - cfg.window < collapse.began <= AT
    else:
        # the streak may start one step early, with a spike of the gradient norm
        assert step in (AT + cfg.patience - 2, AT + cfg.patience - 1)
        assert collapse.began == step - cfg.patience + 1


def test_a_figure_that_recovers_may_collapse_again() -> None:
    base = healthy(0)
    fallen = {*range(40, 50), *range(70, 72), *range(90, 100)}  # the second dip is shorter than the patience
    found = run(lambda step: base(step) | ({"policy/entropy": 1e-4} if step in fallen else {}))
    assert [(step, collapse.began) for step, collapse in found] == [(42, 40), (92, 90)]


def test_exploded_gradient_norms_do_not_enter_the_median() -> None:
    detector = CollapseDetector(CollapseConfig(patience=30))
    curve = collapsing(1, "grad_norm", 200.0)
    found = {step: detector.update(step, curve(step)) for step in range(1, STEPS + 1)}
    assert [step for step, collapse in found.items() if collapse] == [AT + 29]


def test_two_figures_at_once_are_one_collapse() -> None:
    base = healthy(0)
    ((step, collapse),) = run(
        lambda step: base(step) | ({"policy/entropy": 0.0, "grad_norm": 1e3} if step >= AT else {})
    )
    assert (step, collapse.began) == (AT + 2, AT)
    assert "policy/entropy 0 is below" in collapse.reason
    assert "; grad_norm 1e+03 is above" in collapse.reason


def test_steps_without_data_are_skipped() -> None:
    """Without response tokens there is no entropy and no reward; without variance in a group no gradient."""
    base = healthy(0)
    silent = {"policy/entropy": math.nan, "grad_norm": 0.0, "reward/mean": math.nan}
    assert run(lambda step: silent if step % 3 else base(step), 300) == []
    assert run(lambda step: silent) == []
    found = run(
        lambda step: silent if step % 2 else base(step) | ({"policy/entropy": 1e-4} if step >= AT else {})
    )
    assert [step for step, _ in found] == [66]


def test_rewards_below_zero() -> None:
    noise = np.random.default_rng(0).normal(0, 0.02, 200)
    steady = [-0.5 + noise[step] for step in range(200)]
    assert run(lambda step: healthy(0)(step) | {"reward/mean": steady[step]}) == []
    found = run(lambda step: healthy(0)(step) | {"reward/mean": steady[step] - 0.4 * (step >= AT)})
    assert len(found) == 1


def test_limits_can_be_changed_and_disabled() -> None:
    for name, factor, lifted in [
        ("policy/entropy", 0.0, {"entropy_share": 0.0}),
        ("grad_norm", 1e6, {"grad_norm_factor": math.inf}),
        ("reward/mean", 0.0, {"reward_drop": math.inf}),
    ]:
        assert len(run(collapsing(2, name, factor))) == 1
        assert run(collapsing(2, name, factor), **lifted) == []
    all_wrong = {"policy/entropy": 1.0, "grad_norm": 1.0, "reward/mean": 0.0}
    assert run(lambda step: all_wrong, reward_drop=math.inf) == []
    assert len(run(collapsing(2, "policy/entropy", 0.2))) == 0
    assert len(run(collapsing(2, "policy/entropy", 0.2), entropy_floor=0.1)) == 1


@pytest.mark.parametrize("at", [5, 30, 62, 65])
def test_a_resumed_detector_finds_the_same_collapses(at: int) -> None:
    curve = collapsing(3, "reward/mean", 0.1)
    figures = [curve(step) for step in range(1, STEPS + 1)]
    whole, broken = CollapseDetector(CollapseConfig()), CollapseDetector(CollapseConfig())
    expected = [whole.update(step, f) for step, f in enumerate(figures, 1)]
    found = [broken.update(step, f) for step, f in islice(enumerate(figures, 1), at)]
    broken.rollbacks = 1
    state = CollapseState.model_validate(json.loads(json.dumps(broken.state_dict())))
    resumed = CollapseDetector(CollapseConfig())
    resumed.load_state_dict(state)
    assert resumed.rollbacks == 1
    assert (
        found + [resumed.update(step, f) for step, f in islice(enumerate(figures, 1), at, None)] == expected
    )
    assert any(expected)


@pytest.mark.parametrize("window", [5, 20])
def test_another_window_starts_the_detection_again(window: int) -> None:
    """Levels of another number of steps are no reference for this one."""
    state = CollapseDetector(CollapseConfig(window=10))
    level = {"policy/entropy": 1.0, "grad_norm": 1.0, "reward/mean": 1.0}
    for step in range(1, 16):
        assert state.update(step, level) is None
    state.rollbacks = 2
    cfg = CollapseConfig(window=window)
    resumed, fresh = CollapseDetector(cfg), CollapseDetector(cfg)
    resumed.update(1, level)  # a rollback loads the state into a detector that is in use
    resumed.load_state_dict(CollapseState.model_validate(json.loads(json.dumps(state.state_dict()))))
    assert resumed.rollbacks == 2
    lower = {"policy/entropy": 0.02, "grad_norm": 1.0, "reward/mean": 0.1}
    found = [resumed.update(step, lower) for step in range(16, 16 + 2 * window)]
    assert found == [fresh.update(step, lower) for step in range(16, 16 + 2 * window)]
    assert not any(found)


def test_a_rollback_needs_checkpoints() -> None:
    def tree(**checkpoint: int) -> dict:
        return {"collapse": {"action": "rollback", "window": 10, "patience": 3}, "checkpoint": checkpoint}

    with pytest.raises(ValidationError, match=r"checkpoint\.save_interval > 0"):
        Config.model_validate(tree())
    with pytest.raises(ValidationError, match=r"checkpoint\.keep_last >= 4"):
        Config.model_validate(tree(save_interval=5, keep_last=3))
    Config.model_validate(tree(save_interval=5, keep_last=4))
    Config.model_validate(tree(save_interval=20))


@pytest.mark.parametrize("killed", [False, True])
def test_going_back_survives_a_kill(killed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pointer and the older checkpoint's state are written before a later checkpoint is removed."""
    for step in (4, 5, 6):
        checkpoint = tmp_path / f"iter_000000{step}"
        (checkpoint / "weights").mkdir(parents=True)
        write_state(checkpoint, run_state(step))
    (tmp_path / LATEST).write_text("6")
    good = checkpoint_before(tmp_path, 5, False)
    assert good
    records = run_state(4)["collapse"] | {"rollbacks": 1}
    if killed:  # during the removal of the first folder
        monkeypatch.setattr(shutil, "rmtree", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt) if killed else nullcontext():
        go_back(good, {"collapse": records})
    assert newest(tmp_path) == good
    assert (read_state(good).step, read_state(good).updates, read_state(good).collapse.rollbacks) == (4, 4, 1)
    later = [folder for folder in (tmp_path / "iter_0000005", tmp_path / "iter_0000006") if folder.exists()]
    assert len(later) == (1 if killed else 0)  # the folder is renamed before it is removed
    if killed:
        assert checkpoint_before(tmp_path, 7, False) == later[0]
