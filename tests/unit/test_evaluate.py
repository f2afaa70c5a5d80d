"""The figures of an evaluation compared with counting; intervals and paired tests."""

from __future__ import annotations

import io
import json
from itertools import combinations, product
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
from rich.console import Console

from megatron_gmpo.batch.samples import Episode, Prompt, SampleGroup
from megatron_gmpo.config import Config, EvalConfig
from megatron_gmpo.errors import InputError
from megatron_gmpo.evaluate import evaluate, sampling_of
from megatron_gmpo.metrics import progress
from megatron_gmpo.metrics.comparison import compare
from megatron_gmpo.metrics.evaluations import Evaluated, pass_at_k, report, table
from megatron_gmpo.metrics.intervals import interval, mcnemar, paired_bootstrap, wilson
from megatron_gmpo.metrics.progress import Progress
from megatron_gmpo.rewards.arithmetic import arithmetic_reward
from megatron_gmpo.rollout.engine import SamplingParams

from ..support.scripted import ScriptedEngine


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_is_the_share_of_choices_with_a_right_one(n: int) -> None:
    for c in range(n + 1):
        samples = [True] * c + [False] * (n - c)
        for k in range(1, n + 1):
            assert pass_at_k(n, c, k) == pytest.approx(
                fmean(any(choice) for choice in combinations(samples, k)), abs=1e-12
            )


def test_pass_at_k_of_many_samples() -> None:
    assert pass_at_k(1000, 1, 1) == pytest.approx(0.001)
    assert pass_at_k(2000, 1999, 2) == 1
    assert pass_at_k(10_000, 5, 10_000) == 1
    assert pass_at_k(10_000, 0, 100) == 0


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 1, 5), (4, 1, 0)])
def test_pass_at_k_of_impossible_counts(n: int, c: int, k: int) -> None:
    with pytest.raises(AssertionError):
        pass_at_k(n, c, k)


def benchmarks() -> tuple[ScriptedEngine, dict[str, list[Prompt]]]:
    """Return an engine and two prompt sets; "7" is correct.

    Of the four samples per prompt, 4, 1 and 0 are correct in the first set, and 2 in the second.
    """
    script = {
        "a": ["7"] * 4,
        "b": ["8", "7", "88", "99"],
        "c": ["1", "2", "3", "666"],
        "d": ["7", "1", "2", "7"],
    }
    prompts = [Prompt(name, answer="7", input_ids=[1, 2, 3]) for name in script]
    return ScriptedEngine(script), {"first": prompts[:3], "second": prompts[3:]}


def test_every_benchmark_has_its_figures() -> None:
    engine, sets = benchmarks()
    cfg = EvalConfig(samples_per_prompt=4, k=(1, 2, 4), temperature=0.6, top_p=0.95)
    records: dict[str, Evaluated] = {}
    results = evaluate(engine, sets, arithmetic_reward, cfg, max_new_tokens=9, stop=("\n",), records=records)
    assert {name: value for name, value in results.items() if "/ci_" not in name} == pytest.approx(
        {
            "eval/first/pass@1": (1 + 1 / 4 + 0) / 3,
            "eval/first/pass@2": (1 + 1 / 2 + 0) / 3,
            "eval/first/pass@4": 2 / 3,
            "eval/first/maj@2": 1 / 3,  # of "8" and "7" the first wins
            "eval/first/maj@4": 1 / 3,  # four different answers: the first wins
            "eval/first/reward": 5 / 12,
            "eval/first/response_length": (4 + 6 + 6) / 12,
            "eval/first/truncated_fraction": 0,
            "eval/first/timeouts": 0,
            "eval/first/problems": 3,
            "eval/second/pass@1": 1 / 2,
            "eval/second/pass@2": 1 - 1 / 6,
            "eval/second/pass@4": 1,
            "eval/second/maj@2": 1,
            "eval/second/maj@4": 1,
            "eval/second/reward": 1 / 2,
            "eval/second/response_length": 1,
            "eval/second/truncated_fraction": 0,
            "eval/second/timeouts": 0,
            "eval/second/problems": 1,
        }
    )
    for name in sets:
        for k in cfg.k:
            ends = (results[f"eval/{name}/{end}@{k}"] for end in ("ci_low", "ci_high"))
            low, high = ends
            assert 0 <= low <= results[f"eval/{name}/pass@{k}"] <= high <= 1
    sampling = SamplingParams(n=4, max_new_tokens=9, temperature=0.6, top_p=0.95, stop=("\n",))
    assert engine.calls == [(["a", "b", "c"], sampling), (["d"], sampling)]
    assert {name: [g.rewards for g in record.groups.values()] for name, record in records.items()} == {
        "first": [[1.0] * 4, [0.0, 1.0, 0.0, 0.0], [0.0] * 4],
        "second": [[1.0, 0.0, 0.0, 1.0]],
    }


def test_defaults_are_one_greedy_answer() -> None:
    engine, sets = benchmarks()
    results = evaluate(engine, sets, arithmetic_reward, EvalConfig(), max_new_tokens=9)
    figures = ("pass@1", "ci_low@1", "ci_high@1", "reward", "response_length", "truncated_fraction")
    assert set(results) == {
        f"eval/{name}/{figure}" for name in sets for figure in (*figures, "timeouts", "problems")
    }
    assert results["eval/first/pass@1"] == pytest.approx(1 / 3)
    # Wilson's interval of 1 of 3, from statsmodels' proportion_confint(1, 3, method="wilson")
    assert results["eval/first/ci_low@1"] == pytest.approx(0.0615, abs=1e-4)
    assert results["eval/first/ci_high@1"] == pytest.approx(0.7923, abs=1e-4)
    assert engine.calls[0][1] == SamplingParams(n=1, max_new_tokens=9, temperature=0.0)


class EpisodeEngine(ScriptedEngine):
    """Engine of episodes: "7" is a success, "8" fails, "666" says nothing of success."""

    def generate(self, prompts: list[Prompt], sampling: SamplingParams) -> dict[int, SampleGroup]:
        groups = super().generate(prompts, sampling)
        for sample in (sample for group in groups.values() for sample in group.samples):
            sample.episode = Episode(
                "error" if sample.text == "8" else "done",
                success=None if sample.text == "666" else sample.text in ("7", "8"),
            )
        return groups


def test_the_success_of_episodes_has_an_interval_over_problems() -> None:
    """A failed environment is no success, whatever it said before; nor is an episode without a word of it."""
    scripted, sets = benchmarks()
    cfg = EvalConfig(samples_per_prompt=4, temperature=1.0)
    results = evaluate(EpisodeEngine(scripted.script), sets, arithmetic_reward, cfg, max_new_tokens=9)
    shares = np.array([1, 1 / 4, 0])
    assert results["eval/first/success"] == pytest.approx(shares.mean())
    ends = results["eval/first/ci_low@success"], results["eval/first/ci_high@success"]
    assert ends == interval(shares)
    assert results["eval/first/environment_errors"] == 1
    assert results["eval/second/environment_errors"] == 0
    assert results["eval/second/success"] == 1 / 2


def test_its_own_token_limit_counts() -> None:
    engine, sets = benchmarks()
    cfg = EvalConfig(samples_per_prompt=4, temperature=1.0, max_new_tokens=1)
    results = evaluate(engine, sets, arithmetic_reward, cfg, max_new_tokens=9)
    assert engine.calls[0][1].max_new_tokens == 1
    assert results["eval/first/response_length"] == 1
    assert results["eval/first/truncated_fraction"] == pytest.approx(3 / 12)  # of "88", "99" and "666"


def test_a_response_passes_at_the_reward_asked_for() -> None:
    engine, sets = benchmarks()
    cfg = EvalConfig(samples_per_prompt=4, temperature=1.0, pass_reward=0.5)

    def half_for_two_digits(prompt: Prompt, text: str) -> float:
        return 0.5 if len(text) == 2 else 0.4

    results = evaluate(engine, sets, half_for_two_digits, cfg, max_new_tokens=9)
    assert results["eval/first/pass@1"] == pytest.approx((2 / 4) / 3)
    assert results["eval/first/reward"] == pytest.approx((2 * 0.5 + 10 * 0.4) / 12)
    assert results["eval/second/pass@1"] == 0


# --- progress ---


@pytest.mark.parametrize("terminal", [False, True])
def test_the_progress_is_shown_while_it_runs(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_LINE_S", 0.0)
    engine, sets = benchmarks()
    out = Console(file=io.StringIO(), force_terminal=terminal, width=120, color_system=None)
    with Progress(console=out) as shown:
        evaluate(engine, {"first": sets["first"]}, arithmetic_reward, EvalConfig(), 9, progress=shown)
    assert isinstance(out.file, io.StringIO)
    text = out.file.getvalue()
    if terminal:
        assert "evaluation of first" in text
    else:
        assert text.splitlines() == [
            f"evaluation of first: {done}/3, 0:00:00, 0:00:00 left" for done in (1, 2)
        ]


# --- intervals and tests ---


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    # Brown, Cai and DasGupta 2001, equation 4; checked with scipy.stats.binomtest(...).proportion_ci
    [(8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (250, 500, 0.4563, 0.5437)],
)
def test_the_interval_of_a_share(right: int, count: int, low: float, high: float) -> None:
    assert wilson(right / count, count) == pytest.approx((low, high), abs=1e-4)


@pytest.mark.parametrize("values", [[0, 0.5, 0.5, 1], [0.25, 0, 0, 0.75, 1], [0.1, 0.2, 0.9]])
def test_the_bootstrap_agrees_with_all_resamples(values: list[float]) -> None:
    means = np.array([fmean(drawn) for drawn in product(values, repeat=len(values))])
    low, high = interval(np.array(values))
    # the share of all resamples below an end, up to the error of 10,000 draws and the steps of the means
    assert (means < low - 1e-9).mean() <= 0.03
    assert (means <= low + 1e-9).mean() >= 0.02
    assert (means > high + 1e-9).mean() <= 0.03
    assert (means >= high - 1e-9).mean() >= 0.02


def test_equal_problems_do_not_have_an_interval_of_width_0() -> None:
    low, high = interval(np.full(10, 0.5))
    assert (low, high) == pytest.approx((0.2366, 0.7634), abs=1e-4)  # Wilson's of 5 of 10
    assert interval(np.zeros(10)) == pytest.approx((0, 0.2775), abs=1e-4)
    assert 0 <= interval(np.zeros(50))[0] < 1e-9  # not -7e-18
    assert 0.999 < interval(np.ones(50))[1] <= 1


@pytest.mark.parametrize(
    ("a_only", "b_only", "p"),
    # twice the binomial tail, at most 1: 2 (1 + 20 + 190 + 1140 + 4845 + 15504) / 2^20 for 5 of 20
    [(0, 5, 2 / 32), (5, 0, 2 / 32), (5, 15, 43400 / 2**20), (3, 3, 1.0), (0, 0, 1.0), (1, 0, 1.0)],
)
def test_mcnemar(a_only: int, b_only: int, p: float) -> None:
    a = np.array([True] * a_only + [False] * b_only + [True] * 9 + [False] * 4)
    b = np.array([False] * a_only + [True] * b_only + [True] * 9 + [False] * 4)
    assert mcnemar(a, b) == pytest.approx(p)


def test_the_paired_bootstrap_finds_a_difference_that_all_problems_share() -> None:
    low, high, p = paired_bootstrap(np.array([0.25, 0.5, 0.25, 0.25]))
    assert 0.25 <= low < 0.3125 < high <= 0.5
    assert p == pytest.approx(2 / 10_001)
    low, high, p = paired_bootstrap(np.array([0.5, -0.5] * 20))
    assert low < 0 < high
    assert p > 0.8
    assert paired_bootstrap(np.zeros(5)) == (0, 0, 1)


# --- results ---


def labelled() -> dict[str, Evaluated]:
    labels = [{"level": "1", "subject": "Algebra"}, {"level": "2", "subject": "Algebra"}, {"level": "2"}]
    prompts = [Prompt(f"m/{i}", "7", labels=label) for i, label in enumerate(labels)]
    figures = {"pass@1": 0.5, "ci_low@1": 0.1, "ci_high@1": 0.9, "truncated_fraction": 0.25}
    return {"m": Evaluated(prompts, np.array([4, 2, 0]), figures)}


def test_results_are_reported_by_label() -> None:
    cfg = EvalConfig(samples_per_prompt=4, temperature=1.0)
    sets = report(labelled(), cfg)
    assert sets["m"]["passed"] == {"m/0": 4, "m/1": 2, "m/2": 0}
    assert sets["m"]["answers"] == {"m/0": "7", "m/1": "7", "m/2": "7"}
    shown = {
        (column, value): (figures["problems"], figures["pass@1"])
        for column, values in sets["m"]["by"].items()
        for value, figures in values.items()
    }
    assert shown == {
        ("level", "1"): (1, 1.0),
        ("level", "2"): (2, 0.25),
        ("subject", "Algebra"): (2, 0.75),
    }
    out = Console(file=io.StringIO(), width=120)
    out.print(table(sets))
    assert isinstance(out.file, io.StringIO)
    text = out.file.getvalue()
    for words in ("0.500 [0.100, 0.900]", "25.0%", "level 2", "subject Algebra"):
        assert words in text


def test_a_rate_that_only_one_benchmark_has_is_shown_without_a_mean() -> None:
    """An environment may tell success on some benchmarks only."""
    figures = {"pass@1": 0.25, "ci_low@1": 0.1, "ci_high@1": 0.5, "truncated_fraction": 0.0}
    told = figures | {"pass@1": 0.75, "success": 0.6, "ci_low@success": 0.3, "ci_high@success": 0.8}
    sets = {name: {"figures": each, "by": {}, "passed": {}} for name, each in (("a", figures), ("b", told))}
    for order in (("a", "b"), ("b", "a")):
        out = Console(file=io.StringIO(), width=120)
        out.print(table({name: sets[name] for name in order}))
        assert isinstance(out.file, io.StringIO)
        text = out.file.getvalue()
        assert "0.600 [0.300, 0.800]" in text
        mean = next(line for line in text.splitlines() if "mean of the benchmarks" in line)
        assert "0.500" in mean
        assert "0.600" not in mean


def test_the_sampling_states_what_the_rollout_decides() -> None:
    """So that a comparison tells evaluations with different limits apart."""
    values = {"rollout": {"max_new_tokens": 64, "stop": ["\n"]}, "reward": {"name": "arithmetic"}}
    found = sampling_of(Config.model_validate(values))
    assert (found["max_new_tokens"], found["stop"], found["reward"]) == (64, ["\n"], "arithmetic")
    own = sampling_of(Config.model_validate(values | {"eval": {"max_new_tokens": 32}}))
    assert own == found | {"max_new_tokens": 32}


def result_file(path: Path, passed: dict[str, int], n: int = 1, answer: str = "7") -> Path:
    content = {
        "evaluated": f"of {path.name}",
        "sampling": {"samples_per_prompt": n},
        "sets": {"m": {"passed": passed, "answers": dict.fromkeys(passed, answer)}},
    }
    path.write_text(json.dumps(content))
    return path


def test_comparing_two_evaluations_pairs_their_problems(tmp_path: Path) -> None:
    a = result_file(tmp_path / "a.json", {f"m/{i}": int(i < 5) for i in range(20)})
    (tmp_path / "b").mkdir()
    b = result_file(tmp_path / "b" / "evaluation.json", {f"m/{i}": int(i % 2 == 0) for i in range(1, 40)})
    lines = compare((a, b.parent)).splitlines()
    # common: 1 to 19. A solved 1 to 4, B the even ones: 1 and 3 by A alone, 6, 8, ..., 18 by B alone
    assert lines[2].startswith("m, 19 problems: pass@1 A 0.211 [")
    assert "B 0.474 [" in lines[2]
    p = 2 * (1 + 9 + 36) / 2**9
    assert "B - A = +0.263 [" in lines[3]
    assert f"p = {p:.3g} (McNemar's exact test, 2 problems solved by A alone and 7 by B alone)" in lines[3]


def test_comparing_several_samples_takes_the_bootstrap(tmp_path: Path) -> None:
    a = result_file(tmp_path / "a.json", {f"m/{i}": i % 3 for i in range(30)}, n=4)
    b = result_file(tmp_path / "b.json", {f"m/{i}": i % 3 + 2 for i in range(30)}, n=8)
    lines = compare((a, b)).splitlines()
    assert lines[2] == "A and B were evaluated with different samples_per_prompt"
    assert "A 0.250 [" in lines[3]
    assert "B 0.375 [" in lines[3]
    assert "B - A = +0.125 [" in lines[4]
    assert "(bootstrap over problems)" in lines[4]


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    a = result_file(tmp_path / "a.json", {"m/0": 1})
    b = result_file(tmp_path / "b.json", {"n/0": 1})
    changed = result_file(tmp_path / "changed.json", {"m/0": 1}, answer="8")
    (tmp_path / "broken.json").write_text('{"evaluated": 1')
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "part.json").write_text('{"evaluated": "", "sampling": {}, "sets": {"m": {"passed": {}}}}')
    for paths, words in {
        (a,): "takes 2",
        (a, b): "no problem in common",
        (a, changed): "problem m/0 of m has different answers in",
        (a, tmp_path): "run megatron-gmpo evaluate first",
        (a, tmp_path / "broken.json"): "is not the result of an evaluation",
        (tmp_path / "list.json", a): "is not the result of an evaluation",
        (a, tmp_path / "part.json"): "is not the result of an evaluation",
    }.items():
        with pytest.raises(InputError, match=words):
            compare(paths)
