"""Rewards for typical answers of models, the time limit, and user-defined functions."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from megatron_gmpo.batch.samples import Prompt, Sample, SampleGroup
from megatron_gmpo.config import RewardConfig
from megatron_gmpo.errors import InputError
from megatron_gmpo.rewards import REWARDS, MathReward, resolve_reward
from megatron_gmpo.rewards.arithmetic import arithmetic_reward
from megatron_gmpo.rewards.votes import majority, votes
from megatron_gmpo.rewards.worker import MEMORY_BYTES

RIGHT = [
    ("72", "so it is \\boxed{72}"),
    ("72", "\\boxed{72.}"),
    ("72", "\\boxed{72.0}"),
    ("72", "\\boxed{ 72 }"),
    ("72", "\\boxed {72}"),
    ("72", "\\boxed{\\$72}"),
    ("72", "\\boxed{72\\$}"),
    ("72", "\\boxed{72 \\text{ dollars}}"),
    ("72", "\\boxed{71}. No: \\boxed{72}"),
    ("72", "\\boxed{\\boxed{72}}"),
    ("So it is $\\boxed 2$", "$\\boxed 2$."),
    ("72", "\\boxed{72} and then \\boxed{7"),
    ("72", "\\boxed{72} and " + "\\boxed{" * 4000),
    ("72", "I get 5 + 67 = 72 dollars."),
    ("72", "The answer is $72$."),
    ("Half of 48 is 24, so 48+24=72. #### 72", "\\boxed{72}"),
    ("72", "3+4=7\n#### 72"),
    ("1,234", "\\boxed{1234}"),
    ("1234", "\\boxed{1{,}234}"),
    ("025", "\\boxed{25}"),
    ("\\frac{1}{2}", "\\boxed{0.5}"),
    ("\\frac{1}{2}", "\\boxed{\\dfrac12}"),
    ("$\\frac12$", "\\boxed{1/2}"),
    ("\\boxed{\\frac{3}{4}}", "\\boxed{\\frac{\\sqrt{9}}{2^{2}}}"),
    ("7/2", "\\boxed{3\\frac{1}{2}}"),
    ("3/4", "\\boxed{75\\%}"),
    ("50\\%", "\\boxed{50}"),
    ("2\\sqrt{3}", "\\boxed{\\sqrt{12}}"),
    ("x^2+2x+1", "\\boxed{(x+1)^2}"),
    ("p - q", "\\boxed{-q+p}"),
    ("5", "\\boxed{x=5}"),
    ("90^\\circ", "\\boxed{90}"),
    ("(1, 2)", "\\boxed{\\left(1,2\\right)}"),
    ("\\left( 3, \\frac{\\pi}{2} \\right)", "\\boxed{(3, \\pi/2)}"),
    ("[0,1)", "\\boxed{x \\in [0, 1)}"),
    ("(-\\infty,2]", "\\boxed{(-\\infty, 2]}"),
    ("1,2,3", "\\boxed{3, 2, 1}"),
    ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\boxed{\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}}"),
    ("\\text{Evelyn}", "\\boxed{Evelyn}"),
    ("\\text{(B)}", "\\boxed{B}"),
    ("True", "\\boxed{true}"),
    ("10^{-3}", "\\boxed{0.001}"),
]
WRONG = [
    ("72", "\\boxed{71}"),
    ("72", "\\boxed{-72}"),
    ("72", "\\boxed{72} or rather \\boxed{73}"),
    ("72", "\\boxed{}"),
    ("72", ""),
    ("72", "I do not know"),
    ("\\frac{1}{2}", "\\boxed{2}"),
    ("\\frac{1}{3}", "\\boxed{0.333}"),
    ("(1,2)", "\\boxed{(2,1)}"),
    ("[0,1)", "\\boxed{[0,1]}"),
    ("1,2,3", "\\boxed{1,2}"),
    ("\\pi", "\\boxed{3.14}"),
    ("x+1", "\\boxed{x-1}"),
    ("\\text{Evelyn}", "\\boxed{Carla}"),
    ("True", "\\boxed{False}"),
    ("72", "\\boxed{\\frac{}{\\left}"),
    ("72", "\\boxed{9^(9^(9^9))}"),
]


ENDLESS = "\\boxed{\\pi^{\\pi^{\\pi^{\\pi^{\\pi}}}}}"
"""An answer of more digits than a computer can hold."""


@pytest.fixture(scope="module")
def math_reward() -> Iterator[MathReward]:
    with MathReward(timeout_s=20) as reward:
        yield reward


def score(reward: MathReward, pairs: list[tuple[str, str]]) -> list[float]:
    """Score from several threads at once, as the collector does."""
    with ThreadPoolExecutor(8) as threads:
        return list(threads.map(lambda pair: reward(Prompt("t/0", answer=pair[0]), pair[1]), pairs))


def test_right_and_wrong_answers(math_reward: MathReward) -> None:
    pairs = RIGHT + WRONG
    scores = score(math_reward, pairs)
    expected = [1.0] * len(RIGHT) + [0.0] * len(WRONG)
    assert [pair for pair, got, want in zip(pairs, scores, expected, strict=True) if got != want] == []
    assert all(type(value) is float for value in scores)
    assert math_reward.timeouts == 0


@pytest.mark.slow
def test_a_check_that_does_not_end_times_out_and_is_counted() -> None:
    with MathReward(timeout_s=2, workers=2) as reward:
        pairs = [
            ("72", ENDLESS),
            ("72", "\\boxed{72}"),
            ("3", ENDLESS),
            ("72", "\\boxed{73}"),
        ]
        assert score(reward, pairs[1:2]) == [1.0]
        assert score(reward, pairs) == [0.0, 1.0, 0.0, 0.0]
        assert reward.timeouts == 2


@pytest.mark.slow
def test_the_answer_after_an_endless_one_does_not_wait_for_a_new_worker() -> None:
    others = children()
    with MathReward(timeout_s=2, workers=1) as reward:
        assert score(reward, [("72", "\\boxed{72}")]) == [1.0]
        before = children()
        assert score(reward, [("72", ENDLESS)]) == [0.0]
        for worker in children() - before:
            worker.suspend()  # as if it took for ever to start
        assert score(reward, [("72", "\\boxed{72}")]) == [1.0]
        assert reward.timeouts == 1
    assert children() == others


@pytest.mark.slow
def test_a_worker_has_a_limit_of_memory_and_is_replaced_at_the_limit() -> None:
    others = children()
    with MathReward(timeout_s=60, workers=1) as reward:
        assert score(reward, [("72", "\\boxed{72}")]) == [1.0]
        workers = children() - others
        limits = {worker: worker.rlimit(psutil.RLIMIT_AS)[0] for worker in workers}
        limited = [worker for worker in workers if limits[worker] != psutil.RLIM_INFINITY]
        assert limited  # the spare worker may still be starting
        for worker in limited:
            assert limits[worker] <= worker.memory_info().vms + MEMORY_BYTES
            worker.rlimit(psutil.RLIMIT_AS, (worker.memory_info().vms + (16 << 20), -1))
        assert score(reward, [("72", "x" * (64 << 20))]) == [0.0]
        assert reward.timeouts == 1
        assert len(workers - children()) == 1
        assert score(reward, [("72", "\\boxed{72}")]) == [1.0]


def children() -> set[psutil.Process]:
    return {
        child
        for child in psutil.Process().children()
        if "megatron_gmpo.rewards.math.worker" in child.cmdline()
    }


@pytest.mark.slow
def test_a_reward_starts_again_after_close(math_reward: MathReward) -> None:
    prompt = Prompt("t/0", answer="72")
    assert math_reward(prompt, "\\boxed{72}") == 1.0
    math_reward.close()
    math_reward.close()
    assert math_reward(prompt, "\\boxed{72}") == 1.0


@pytest.mark.slow
def test_the_registry_works_without_config_and_lets_the_interpreter_end(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from megatron_gmpo.rewards import REWARDS\n"
        "from megatron_gmpo.batch.samples import Prompt\n"
        "print(REWARDS['math'](Prompt('t/0', answer='1/2'), '\\\\boxed{0.5}'))\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, script],
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "1.0\n", "")


@pytest.mark.parametrize(
    ("truth", "response", "value"),
    [("052", "052", 1.0), ("052", " 052\n", 1.0), ("052", "52", 0.0), ("052", "052 ", 1.0), ("052", "", 0.0)],
)
def test_arithmetic(truth: str, response: str, value: float) -> None:
    assert REWARDS["arithmetic"](Prompt("t/0", answer=truth), response) == value


def test_resolve_built_in() -> None:
    reward = resolve_reward(RewardConfig(timeout_s=3.5, workers=1))
    assert isinstance(reward, MathReward)
    assert (reward.timeout_s, reward.workers) == (3.5, 1)
    assert resolve_reward(RewardConfig(name="arithmetic")) is REWARDS["arithmetic"]


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_rewards.py").write_text(
        "def is_long(prompt, response):\n    return len(response) > 3\nnumber = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("own")
def test_a_user_defined_function() -> None:
    reward = resolve_reward(RewardConfig(name="own_rewards:is_long"))
    values = [reward(Prompt("t/0", answer=""), text) for text in ("ab", "abcd")]
    assert values == [0.0, 1.0]
    assert all(type(value) is float for value in values)


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("maths", ["'maths' is unknown", "did you mean 'math'", "arithmetic", "module:function"]),
        ("no_such_module:f", ["no_such_module:f", "No module named"]),
        ("own_rewards:missing", ["own_rewards:missing", "missing"]),
        ("own_rewards:number", ["own_rewards:number", "is a int", "callable"]),
        (":f", [":f", "module:function"]),
    ],
)
def test_bad_names(name: str, parts: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        resolve_reward(RewardConfig(name=name))
    assert all(part in str(caught.value) for part in ["reward.name", *parts]), caught.value
    assert "\n" not in str(caught.value)


# --- votes ---


def group_of(reward: MathReward | None, answer: str, responses: list[str]) -> SampleGroup:
    prompt = Prompt("p", answer)
    samples = [Sample([1], [False], [0.0], text, "stop", 0) for text in responses]
    for sample in samples:
        sample.reward = reward(prompt, sample.text) if reward else arithmetic_reward(prompt, sample.text)
    return SampleGroup(prompt, samples)


@pytest.mark.parametrize(
    ("responses", "found"),
    [
        (["so \\boxed{1/2}", "it is $0.5$", "\\boxed{\\frac12}"], [[0, 1, 2]]),  # right, in three spellings
        (["\\boxed{0.25}", "\\boxed{1/2}", "\\boxed{\\frac14}"], [[0, 2], [1]]),  # wrong ones are equal
        (["\\boxed{2}", "no idea", "", "\\boxed{3}"], [[0], [3]]),  # no answer, no vote
    ],
)
def test_equal_answers_vote_together(
    responses: list[str], found: list[list[int]], math_reward: MathReward
) -> None:
    group = group_of(math_reward, "1/2", responses)
    assert votes(math_reward, group, [r == 1 for r in group.rewards]) == found


def test_other_rewards_vote_by_text() -> None:
    group = group_of(None, "7", ["7", "8", " 8 ", "7", "8"])
    found = votes(arithmetic_reward, group, [r == 1 for r in group.rewards])
    assert found == [[0, 3], [1, 2, 4]]
    assert [majority(found, k) for k in (1, 2, 3, 4, 5)] == [0, 0, 1, 0, 1]
    assert majority([], 3) is None
    assert majority([[2]], 2) is None  # the only answer is not among the first two
