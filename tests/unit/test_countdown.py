"""Countdown: the reward on solutions and on arbitrary text, and the generated problems."""

from __future__ import annotations

import json
import random
import warnings
from fractions import Fraction
from itertools import permutations, product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_gmpo.batch.samples import Prompt
from megatron_gmpo.commands import countdown
from megatron_gmpo.config import RewardConfig
from megatron_gmpo.errors import InputError
from megatron_gmpo.rewards import REWARDS, resolve_reward
from megatron_gmpo.testing.countdown import Countdown
from megatron_gmpo.testing.tiny_tokenizers import countdown_tokenizer

REWARD = REWARDS["countdown"]


def score(answer: str, response: str) -> float:
    return REWARD(Prompt("t/0", answer=answer), response)


@pytest.mark.parametrize(
    ("answer", "response"),
    [
        ("3,7,12=15", "3*(12-7)"),
        ("3,7,12=15", " ( 12 - 7 ) * 3\n"),
        ("12,7,3=15", "((3))*(12-7)"),
        ("3,7,12=15", "We need 15. <answer>1+1</answer> no: <answer> 3*(12-7) </answer>."),
        ("3,7,12=15", "<answer>3*(12-7)"),
        ("8,3,8,3=24", "8/(3-8/3)"),  # exact: in floats 23.999999999999996
        ("1,3,3=1", "1/3*3"),
        ("5,5=0", "5-5"),
        ("2,9=-7", "2-9"),
        ("7=7", "7"),
    ],
)
def test_solutions(answer: str, response: str) -> None:
    assert score(answer, response) == 1.0


@pytest.mark.parametrize(
    ("answer", "response"),
    [
        ("3,7,12=15", "3*(12-8)"),  # a number that was not given
        ("3,7,12=36", "3*12"),  # a number is missing
        ("3,7,12=15", "3*(12-7)+3-3"),  # a number is used twice
        ("3,3,9=9", "3*3"),
        ("12,3=15", "1*(12)+3"),
        ("3,7,12=15", "3*(12-7)=15"),
        ("3,7,12=15", "15"),
        ("3,7,12=15", ""),
        ("3,7,12=15", "3*(12-7"),
        ("3,7,12=15", "3(12-7)"),
        ("3,7,12=15", "3*(12-7)</answer> <answer>"),
        ("3,7,12=15", "3*(12-7); print(1)"),
        ("3,7,12=15", "__import__('os')"),
        ("3,7,12=15", "x"),
        ("3,7,12=15", "3*(12-7)#"),
        ("3,7,12=15", "3*\n(12-7)"),
        ("3,7,12=15", "3*\t(12-7)"),
        ("3,7,12=15", "03*(12-7)"),
        ("3,7,12=15", "3.0*(12-7)"),
        ("3,7,12=15", "٣*(12-7)"),
        ("3,7,12=15", "３*(12-7)"),
        ("3,7,12=15", "3×(12−7)"),
        ("3,7,12=15", "-3*(7-12)"),  # a unary operator
        ("3,7,12=15", "+3*(12-7)"),
        ("3,7,12=15", "3*(1 2-7)"),
        ("3,7=2", "7//3"),
        ("2,3=8", "2**3"),
        ("3,7=4", "7-3,"),
        ("3,7=1", "(3,7)"),
        ("3,7=1", "3/(7-7)"),
        ("0,7=0", "7/0"),
        ("1000=1000", "1_000"),
        ("16=16", "0x10"),
        ("10=10", "1e1"),
        ("9,9=1", "9**9**9**9**9"),
        ("1=1", "9" * 100_000),
        ("1=1", "(" * 100 + "1" + ")" * 100 + " "),  # 201 characters
        ("1=1", "(" * 100_000),
        ("1=1", "1+" * 50_000 + "1"),
        ("3,7=10", "3+7\0"),
    ],
)
def test_no_solutions(answer: str, response: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert score(answer, response) == 0.0


def test_the_maximum_length_of_an_expression() -> None:
    assert score("1,1=2", "(" * 98 + "1" + ")" * 98 + " +1") == 1.0  # 200 characters, 98 nested parentheses
    assert score("1,1=2", "(" * 98 + "1" + ")" * 98 + "  +1") == 0.0


@given(
    st.text(
        alphabet=st.one_of(st.sampled_from("0123456789+-*/() =_.eE,x<>answer\n\0²٣"), st.characters()),
        max_size=300,
    )
)
def test_no_response_raises(response: str) -> None:
    assert score("3,7,12=15", response) in (0.0, 1.0)


@st.composite
def expressions(draw: st.DrawFn) -> tuple[str, list[int], Fraction]:
    """Draw a fully parenthesised expression, its numbers and its value, without a division by zero."""
    if draw(st.integers(0, 2)) == 0:
        number = draw(st.integers(0, 30))
        return str(number), [number], Fraction(number)
    (a, left, x), (b, right, y) = draw(expressions()), draw(expressions())
    op = draw(st.sampled_from("+-*/" if y else "+-*"))
    value = x + y if op == "+" else x - y if op == "-" else x * y if op == "*" else x / y
    return f"({a}{op}{b})", left + right, value


@pytest.mark.slow
@given(expressions(), st.randoms(use_true_random=False), st.integers(-50, 50))
def test_values_are_exact_and_numbers_are_counted(
    expression: tuple[str, list[int], Fraction], order: random.Random, off: int
) -> None:
    text, numbers, value = expression
    order.shuffle(numbers)
    given_numbers = ",".join(map(str, numbers))
    expected = len(text) <= 200 and value.denominator == 1
    assert score(f"{given_numbers}={int(value)}", text) == expected
    assert score(f"{given_numbers}={int(value) + off}", text) == (expected and off == 0)
    assert score(f"{given_numbers},1={int(value)}", text) == 0.0


@pytest.mark.parametrize(
    "answer", ["", "3,7,12", "3,7,12=", "=15", "3;7=15", "3,7=1.5", "3, 7=10", "3,7=10\n", "٣,7=10"]
)
def test_a_prompt_without_a_problem_is_refused(answer: str) -> None:
    with pytest.raises(
        InputError, match="of t/0 is no Countdown problem: write numbers and target as 3,7,12=45"
    ):
        score(answer, "3+7")


def test_countdown_is_a_built_in_reward() -> None:
    assert resolve_reward(RewardConfig(name="countdown")) is REWARD


# --- the problems ---


@pytest.mark.parametrize(("count", "max_number", "max_target"), [(2, 5, 9), (3, 12, 99), (4, 20, 200)])
def test_drawn_expressions_solve_their_problems(count: int, max_number: int, max_target: int) -> None:
    kind, generator = Countdown(count, max_number, max_target), random.Random(0)
    drawn = [kind.draw(generator) for _ in range(500)]
    for problem, solution in drawn:
        assert score(problem, solution) == 1.0, (problem, solution)
        numbers, target = problem.split("=")
        values = [int(number) for number in numbers.split(",")]
        assert len(values) == count
        assert values == sorted(values, reverse=True)
        assert 1 <= min(values) <= max(values) <= max_number
        assert 1 <= int(target) <= max_target
    assert all(any(op in solution for _, solution in drawn) for op in "+-*/")
    assert count == 2 or any("(" in solution for _, solution in drawn)
    assert not any(f"({n})" in solution for _, solution in drawn for n in range(max_number + 1))


@pytest.mark.slow
def test_every_solvable_problem_is_found_and_no_other() -> None:
    expected = set()
    for a, b, c in product(range(1, 4), repeat=3):
        for (x, y, z), f, g in product(permutations(map(Fraction, (a, b, c))), "+-*/", "+-*/"):
            for text in (f"(x{f}y){g}z", f"x{f}(y{g}z)"):
                try:
                    value = eval(text, {"x": x, "y": y, "z": z})
                except ZeroDivisionError:
                    continue
                if value.denominator == 1 and 1 <= value <= 20:
                    expected.add(f"{','.join(map(str, sorted((a, b, c), reverse=True)))}={value}")
    kind = Countdown(count=3, max_number=3, max_target=20)
    assert set(kind.problems(len(expected), random.Random(1))) == expected
    with pytest.raises(
        InputError,
        match=rf"num_train \+ num_heldout = 999, but only {len(expected)} problems of .* ask for fewer",
    ):
        kind.problems(999, random.Random(1))


def test_the_command_writes_seeded_disjoint_problems_and_their_tokenizer_reads_them(tmp_path: Path) -> None:
    def written(folder: str, seed: int) -> list[list[dict[str, str]]]:
        argv = ["--num_train", "300", "--num_heldout", "50", "--seed", str(seed), "--problems_only"]
        countdown.main(["--out", str(tmp_path / folder), *argv])
        return [
            [json.loads(line) for line in (tmp_path / folder / f"{name}.jsonl").read_text().splitlines()]
            for name in ("train", "heldout")
        ]

    train, heldout = written("a", 3)
    assert (len(train), len(heldout)) == (300, 50)
    assert len({problem["answer"] for problem in train + heldout}) == 350
    assert written("b", 3) == [train, heldout]
    assert written("c", 4)[1] != heldout
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["heldout.jsonl", "train.jsonl"]
    tokenizer = countdown_tokenizer()
    text = f"{train[0]['problem']}8/(3-8*3)+9-4"
    assert train[0]["problem"] == f"{train[0]['answer']}:"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer) == 21
