"""Studies and statistics of the lab, with t quantiles from printed tables."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import tomli_w
from matplotlib.text import Text
from rich.console import Console

from megatron_gmpo.errors import InputError
from megatron_gmpo.lab import trials
from megatron_gmpo.lab.figures import Panel, draw
from megatron_gmpo.lab.results import POINTS, Curve, Measure, curve
from megatron_gmpo.lab.statistics import estimate, paired_difference, t_quantile
from megatron_gmpo.lab.study import Study, flatten, load_study
from megatron_gmpo.lab.trials import Record, _Board, check_folders, unfinished
from megatron_gmpo.metrics.plots import verbatim

ROOT = Path(__file__).parents[2]
HOUSEHOLD = ROOT / "examples/agents/household.toml"
STUDIES = sorted([*(ROOT / "examples/moe/stability").glob("*.toml"), HOUSEHOLD])
PUBLISHED = sorted((ROOT / "docs/studies").glob("*/numbers.json"))

FILE = {
    "title": "Two losses",
    "base": str(ROOT / "examples/moe/tiny_cpu.toml"),
    "seeds": [3, 4],
    "baseline": "grpo",
    "overrides": {"train.minibatches_per_step": 2},
    "arms": {"gmpo": {"label": "GMPO", "algorithm.loss": "gmpo"}, "grpo": {"algorithm": {"loss": "grpo"}}},
    "grid": {"lr": {"small": {"optimizer.lr": 1e-4}, "large": {"optimizer.lr": 1e-3}}},
}


def study(folder: Path, **changes: object) -> Study:
    path = folder / "two_losses.toml"
    path.write_text(tomli_w.dumps(FILE | changes))
    return load_study(path)


@pytest.mark.parametrize(
    ("degrees", "expected"), [(1, 12.706), (2, 4.303), (4, 2.776), (9, 2.262), (30, 2.042), (1000, 1.962)]
)
def test_t_quantile(degrees: int, expected: float) -> None:
    assert t_quantile(degrees) == pytest.approx(expected, abs=6e-4)


def test_estimate() -> None:
    found = estimate([1.0, 2.0, 3.0, 4.0])
    assert found
    assert (found.mean, found.n) == (2.5, 4)
    assert found.half == pytest.approx(3.18245 * math.sqrt(5 / 3) / 2, rel=1e-4)
    assert found.sign == 1
    one = estimate([7.0])
    assert one
    assert one.half == math.inf
    assert one.sign == 0
    assert estimate([]) is None


def test_paired_difference_drops_what_the_seeds_share() -> None:
    baseline = {0: 0.1, 1: 0.9, 2: 0.5, 9: 100.0}
    found = paired_difference({0: 0.2, 1: 1.0, 2: 0.61}, baseline)
    assert found
    assert found.n == 3
    assert found.mean == pytest.approx(0.31 / 3)
    # The values themselves vary far more than their differences.
    assert found.sign == 1


def test_curve_is_the_mean_over_seeds_in_each_share_of_the_steps() -> None:
    steps = np.arange(1.0, 101.0)
    runs = [{"x": (steps, np.sin(steps) + shift)} for shift in (0.0, 1.0)]
    found = curve(runs, "x")
    assert found
    assert len(found.steps) == POINTS
    first = np.array_split(steps, POINTS)[0]
    assert found.steps[0] == first.mean()
    assert found.mean[0] == pytest.approx(np.sin(first).mean() + 0.5)
    assert found.high[0] - found.mean[0] == pytest.approx(12.706 * math.sqrt(0.5) / math.sqrt(2), rel=1e-4)
    assert curve(runs, "y") is None


def test_a_run_that_ended_early_counts_in_the_steps_it_has() -> None:
    found = curve([{"x": (np.arange(3.0), np.ones(3))}, {"x": (np.arange(2.0), np.zeros(2))}], "x")
    assert found
    assert found.mean.tolist() == [0.5, 0.5, 1.0]
    assert np.isnan(found.high[2])


def test_measures() -> None:
    series = {"x": (np.arange(20.0), np.concatenate([[50.0], np.arange(1.0, 20.0)]))}
    assert {kind: Measure("", "x", kind).of(series) for kind in ("last", "best", "mean", "tail")} == {
        "last": 19.0,
        "best": 50.0,
        "mean": 12.0,
        "tail": 14.5,
    }
    assert Measure("", "y", "last").of(series) is None


def test_the_grid_has_every_combination(tmp_path: Path) -> None:
    found = study(tmp_path)
    assert [(arm.name, arm.label, arm.baseline) for arm in found.arms] == [
        ("gmpo-small", "GMPO, small", "grpo-small"),
        ("gmpo-large", "GMPO, large", "grpo-large"),
        ("grpo-small", "grpo, small", "grpo-small"),
        ("grpo-large", "grpo, large", "grpo-large"),
    ]
    assert len(found.trials) == 8
    last = found.trials[-1]
    assert (last.arm.name, last.seed) == ("grpo-large", 4)
    assert (
        last.cfg.algorithm.loss,
        last.cfg.optimizer.lr,
        last.cfg.seed,
        last.cfg.train.minibatches_per_step,
    ) == ("grpo", 1e-3, 4, 2)
    assert last.cfg.run_dir == "runs/studies/two_losses/grpo-large/seed_4"
    nothing = study(tmp_path, overrides={"eval": {"sets": {}}})
    assert nothing.trials[0].cfg.eval.sets == {}
    assert [trial.arm.name for trial in found.choose(["gmpo-small"], [4])] == ["gmpo-small"]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"baselin": "grpo"}, "unknown config key 'baselin': did you mean 'baseline'?"),
        ({"baseline": "gspo"}, "baseline = 'gspo' is not an arm: choose one of ['gmpo', 'grpo']"),
        ({"seeds": [1, 1]}, "seeds = [1, 1] names a seed twice"),
        ({"overrides": {"seed": 3}}, "arm 'gmpo-small': seed is set by the lab: leave it out"),
        (
            {"overrides": {"optimizer.lrr": 3}},
            "arm 'gmpo-small': unknown config key 'optimizer.lrr': did you mean 'optimizer.lr'?",
        ),
        (
            {"grid": {"n": {"a": {}, "b": {"train.num_steps": 7}}}},
            "arm 'gmpo-b': train.num_steps = 7, but 'gmpo-a' has 150: arms are",
        ),
        ({"arms": {"grpo": {}, "g/h": {}}}, "'g/h' becomes part of a folder's name"),
    ],
)
def test_a_wrong_study_is_refused(changes: dict[str, object], line: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        study(tmp_path, **changes)
    assert line in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["a b", "$HOME", "[red]", "..", ".hidden", "a;b", "a\nb", "a'b"])
def test_a_study_whose_name_cannot_be_a_folder_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / f"{name}.toml"
    path.write_text(tomli_w.dumps(FILE))
    with pytest.raises(
        InputError, match=r"becomes a folder's name: use only letters, digits and _ \. \+ = -"
    ):
        load_study(path)


def test_names_that_leave_the_folder_are_refused(tmp_path: Path) -> None:
    for arm in ("..", ".", ".x"):
        with pytest.raises(InputError, match="becomes part of a folder's name"):
            study(tmp_path, arms={"grpo": {}, arm: {}})


def test_dollars_and_brackets_in_a_label_are_drawn(tmp_path: Path) -> None:
    """matplotlib reads text between two dollars as mathematics, and fails on ``\\frac``."""
    labels = {"a": r"$5 and \frac $", "b": "$x_1$ [red] <b>", "c": "100 % $"}
    curves = {"reward/mean": {arm: Curve(*np.ones((4, 3))) for arm in labels}}
    panel = Panel("Reward", {"reward/mean": ""})
    draw(panel, curves, labels, tmp_path / "a.png")
    draw(panel, curves, {arm: label.replace("$", "S") for arm, label in labels.items()}, tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()
    assert Text(text=verbatim(labels["b"]))._preprocess_math(verbatim(labels["b"])) == (labels["b"], False)


def test_unknown_arms_and_seeds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such arm, did you mean 'gmpo-small'"):
        study(tmp_path).choose(["gmpo-smal"], [])
    with pytest.raises(InputError, match=r"--seeds 5: the study's seeds are \[3, 4\]"):
        study(tmp_path).choose([], [5])


def test_only_what_is_missing_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = study(tmp_path)
    for trial, outcome in zip(found.trials, ("finished", "stopped", "failed"), strict=False):
        trial.folder.mkdir(parents=True)
        (trial.folder / "config.toml").write_text(
            tomli_w.dumps(trial.cfg.model_dump(mode="json", exclude_none=True))
        )
        record = Record.model_validate(
            {"outcome": outcome, "seconds": 1, "started": "", "machine": "", "versions": {}}
        )
        (trial.folder / "trial.json").write_text(record.model_dump_json())
    assert unfinished(found.trials) == list(found.trials[2:])
    other = study(tmp_path, overrides={"train.minibatches_per_step": 4})
    check_folders(found.trials)
    with pytest.raises(
        InputError, match=r"was run with train\.minibatches_per_step = 2, but the study says 4: remove"
    ):
        check_folders(other.trials)


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_the_studies_are_valid(path: Path) -> None:
    assert load_study(path).trials


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.parent.name)
def test_published_results_are_those_of_the_study(path: Path) -> None:
    numbers = json.loads(path.read_text())
    (file,) = (ROOT / "examples").rglob(f"{path.parent.name}.toml")
    study = load_study(file)
    assert numbers["about"]["overrides"] == flatten(study.file.overrides)
    assert {name: arm["overrides"] for name, arm in numbers["arms"].items()} == {
        arm.name: arm.overrides for arm in study.arms
    }
    trials = [(trial["arm"], trial["seed"]) for trial in numbers["trials"]]
    assert sorted(trials) == sorted((trial.arm.name, trial.seed) for trial in study.trials)


def test_the_time_left_is_that_of_trials_side_by_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shown = io.StringIO()
    process = cast(Any, SimpleNamespace(trial=study(tmp_path).trials[0], task=None))
    with _Board(4, 2, Console(file=shown, width=100)) as board:
        for seconds in (60, 120):
            board.started(process)
            board.ended(
                process, Record(outcome="finished", seconds=seconds, started="", machine="", versions={})
            )
    first, second = shown.getvalue().splitlines()
    assert first.endswith("finished after 60 s; 0:01:30 left")  # 3 trials of 60 s, 2 at a time
    assert second.endswith("finished after 120 s; 0:01:30 left")  # 2 trials of 90 s


def test_half_a_line_of_a_run_that_died_is_passed_over(tmp_path: Path) -> None:
    events = tmp_path / "events.jsonl"
    assert not trials._ended_itself(events)
    events.write_text('{"event": "nonfi')
    assert not trials._ended_itself(events)
    events.write_text('{"event": "nonfinite"}\n{"event": "chec')
    assert trials._ended_itself(events)
    events.write_text('{"event": "collapse", "action": "warn"}\n')
    assert not trials._ended_itself(events)
