"""Problems and scores of reasoning-gym."""

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_gmpo.batch.samples import Prompt
from megatron_gmpo.config import DataConfig, RewardConfig
from megatron_gmpo.data.reasoning_gym import open_data_set
from megatron_gmpo.data.rows import Row, read_rows
from megatron_gmpo.errors import InputError
from megatron_gmpo.rewards import Reward, reasoning_gym_worker, resolve_reward
from megatron_gmpo.rewards.reasoning_gym import ReasoningGymReward

pytest.importorskip(
    "reasoning_gym", reason="reasoning-gym is not installed: run pip install -e '.[reasoning]'"
)

pytestmark = pytest.mark.slow  # processes that import reasoning-gym


def rows(source: str) -> list[Row]:
    return list(read_rows(DataConfig(path=f"reasoning_gym:{source}"), "data"))


def prompt(row: Row) -> Prompt:
    return Prompt(row.id, row.answer)


@pytest.fixture(scope="module")
def reward() -> Iterator[ReasoningGymReward]:
    found = resolve_reward(RewardConfig(name="reasoning_gym", timeout_s=20, workers=1))
    assert isinstance(found, ReasoningGymReward)
    yield found
    found.close()


def test_problems_and_their_scores(reward: Reward) -> None:
    found = rows("chain_sum?min_terms=3&max_terms=3&size=4&seed=5")
    assert [row.id for row in found] == [f"chain_sum/{i}" for i in range(4)]
    assert len({row.problem for row in found}) == 4
    for row in found:
        (expression,) = re.findall(r"problem: ([-+\d ]+) =", row.problem)
        terms = re.findall(r"([-+]?) ?(\d+)", expression)
        total = sum(-int(number) if sign == "-" else int(number) for sign, number in terms)
        assert len(terms) == 3
        assert json.loads(row.answer)["answer"] == str(total)
        assert reward(prompt(row), f"First {total + 1}. <answer>{total}</answer>") == 1.0
        assert reward(prompt(row), f"{total}") == 1.0
        assert reward(prompt(row), f"<answer>{total + 1}</answer>") < 0.1


def test_the_problems_depend_on_the_seed_and_not_on_the_hash_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    # ransom_note iterates over a set of letters
    monkeypatch.setenv("PYTHONHASHSEED", "1")
    first = rows("ransom_note?size=3")
    monkeypatch.setenv("PYTHONHASHSEED", "2")
    assert [(row.problem, row.answer) for row in rows("ransom_note?size=3")] == [
        (row.problem, row.answer) for row in first
    ]
    assert rows("ransom_note?size=3&seed=1")[0].problem != first[0].problem


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ("chain_sun", "'chain_sun' is no data set: did you mean 'chain_sum'?"),
        ("composite", "'composite' is no data set: did you mean"),
        ("chain_sum?min_term=2", "chain_sum has no argument 'min_term': did you mean 'min_terms'?"),
        ("chain_sum?min_terms=two", "min_terms = 'two': Input should be a valid integer"),
        ("chain_sum?min_terms=4&max_terms=3", r"chain_sum refuses its arguments \(max_terms must be >="),
    ],
)
def test_refusals(source: str, line: str) -> None:
    with pytest.raises(InputError, match=line) as error:
        rows(source)
    assert str(error.value).startswith(f"data.path = 'reasoning_gym:{source}'")
    assert "\n" not in str(error.value)


def test_a_split_and_other_prompts_are_refused(reward: Reward) -> None:
    with pytest.raises(InputError, match="split = 'test' is not a split"):
        list(read_rows(DataConfig(path="reasoning_gym:chain_sum", split="test"), "data"))
    with pytest.raises(InputError, match="gsm8k/0 is no problem of reasoning-gym"):
        reward(Prompt("gsm8k/0", "72"), "72")


@pytest.mark.parametrize(
    ("source", "attack"),
    [
        # an expression of Python whose value is the right answer, after a side effect
        ("spiral_matrix?size=1", "(__import__('pathlib').Path({file!r}).touch(), {right!r})[1].split()"),
        (
            "countdown?size=1",
            "{right} + [c for c in ().__class__.__base__.__subclasses__() if c.__name__ == "
            "'_Printer'][0].__init__.__globals__['sys'].modules['os'].mkdir({file!r})",
        ),
        # built-in functions that sympy's parser knows, and letters that Python's parser takes for "exec"
        ("countdown?size=1", "exec({spelled})"),
        ("puzzle24?size=1", "[f({spelled}) for f in (exec,)]"),
        ("simple_integration?size=1", "lambdify(x, \uff45xec({spelled}))(1)"),
    ],
)
def test_an_answer_is_never_run_as_code(source: str, attack: str, reward: Reward, tmp_path: Path) -> None:
    (row,) = rows(source)
    right = json.loads(row.answer)["answer"]
    file = tmp_path / "made"
    spelled = "+".join(f"chr({ord(letter)})" for letter in f"open({str(file)!r}, 'w')")
    assert reward(prompt(row), f"<answer>{right}</answer>") == 1.0
    answer = attack.format(file=str(file), right=right, spelled=spelled)
    assert reward(prompt(row), f"<answer>{answer}</answer>") < 0.05
    assert not file.exists()


@pytest.mark.parametrize("name", ["intermediate_integration", "polynomial_multiplication"])
def test_right_expressions_are_still_parsed(name: str, reward: Reward) -> None:
    for row in rows(f"{name}?size=30"):
        assert reward(prompt(row), f"<answer>{json.loads(row.answer)['answer']}</answer>") == 1.0


def test_the_list_that_a_scorer_reads_with_eval_still_counts(reward: Reward) -> None:
    (row,) = rows("spiral_matrix?size=1")
    right = json.loads(row.answer)["answer"].split()
    assert ast.literal_eval(str(right)) == right
    assert reward(prompt(row), f"<answer>{right}</answer>") == 0.1  # 0.1 for a list: SpiralMatrixDataset


def test_every_data_set_generates_and_accepts_its_own_answers() -> None:
    from reasoning_gym.factory import DATASETS

    names = sorted(set(DATASETS) - {"composite"})
    assert len(names) > 100
    without_answer = set()
    for name in names:
        entry = open_data_set(name, "data.path")[1]
        if entry["answer"] is None:  # any answer that meets the conditions is right
            without_answer.add(name)
        else:
            truth = json.dumps({"answer": entry["answer"], "data_set": name, "index": 1})
            assert reasoning_gym_worker.score(truth, f"<answer>{entry['answer']}</answer>") == 1.0, name
    assert without_answer == {"boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"}
