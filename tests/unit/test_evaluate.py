"""pass@k compared with counting, and the metrics that an evaluation reports."""

from __future__ import annotations

from itertools import combinations
from statistics import fmean

import pytest

from megatron_gmpo.batch.samples import Prompt, SampleGroup
from megatron_gmpo.config import EvalConfig
from megatron_gmpo.evaluate import evaluate, pass_at_k
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
    records: dict[str, dict[int, SampleGroup]] = {}
    results = evaluate(engine, sets, arithmetic_reward, cfg, max_new_tokens=9, stop=("\n",), records=records)
    assert results == pytest.approx(
        {
            "eval/first/pass@1": (1 + 1 / 4 + 0) / 3,
            "eval/first/pass@2": (1 + 1 / 2 + 0) / 3,
            "eval/first/pass@4": 2 / 3,
            "eval/first/reward": 5 / 12,
            "eval/first/response_length": (4 + 6 + 6) / 12,
            "eval/first/timeouts": 0,
            "eval/first/problems": 3,
            "eval/second/pass@1": 1 / 2,
            "eval/second/pass@2": 1 - 1 / 6,
            "eval/second/pass@4": 1,
            "eval/second/reward": 1 / 2,
            "eval/second/response_length": 1,
            "eval/second/timeouts": 0,
            "eval/second/problems": 1,
        }
    )
    sampling = SamplingParams(n=4, max_new_tokens=9, temperature=0.6, top_p=0.95, stop=("\n",))
    assert engine.calls == [(["a", "b", "c"], sampling), (["d"], sampling)]
    assert {name: [g.rewards for g in groups.values()] for name, groups in records.items()} == {
        "first": [[1.0] * 4, [0.0, 1.0, 0.0, 0.0], [0.0] * 4],
        "second": [[1.0, 0.0, 0.0, 1.0]],
    }


def test_defaults_are_one_greedy_answer() -> None:
    engine, sets = benchmarks()
    results = evaluate(engine, sets, arithmetic_reward, EvalConfig(), max_new_tokens=9)
    assert set(results) == {
        f"eval/{name}/{figure}"
        for name in sets
        for figure in ("pass@1", "reward", "response_length", "timeouts", "problems")
    }
    assert results["eval/first/pass@1"] == pytest.approx(1 / 3)
    assert engine.calls[0][1] == SamplingParams(n=1, max_new_tokens=9, temperature=0.0)


def test_its_own_token_limit_counts() -> None:
    engine, sets = benchmarks()
    cfg = EvalConfig(samples_per_prompt=4, temperature=1.0, max_new_tokens=1)
    results = evaluate(engine, sets, arithmetic_reward, cfg, max_new_tokens=9)
    assert engine.calls[0][1].max_new_tokens == 1
    assert results["eval/first/response_length"] == 1


def test_a_response_passes_at_the_reward_asked_for() -> None:
    engine, sets = benchmarks()
    cfg = EvalConfig(samples_per_prompt=4, temperature=1.0, pass_reward=0.5)

    def half_for_two_digits(prompt: Prompt, text: str) -> float:
        return 0.5 if len(text) == 2 else 0.4

    results = evaluate(engine, sets, half_for_two_digits, cfg, max_new_tokens=9)
    assert results["eval/first/pass@1"] == pytest.approx((2 / 4) / 3)
    assert results["eval/first/reward"] == pytest.approx((2 * 0.5 + 10 * 0.4) / 12)
    assert results["eval/second/pass@1"] == 0
