"""Makes problems of the Countdown numbers task, and a tiny Qwen3-MoE that solves some of them, for examples/moe/countdown_tiny_cpu.toml.

python -m tools.countdown
python -m tools.countdown --problems_only --out data/countdown --count 4 --max_number 99 --max_target 999 --num_train 100000
"""

from __future__ import annotations

import json
import operator
import random
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import tyro
from transformers.utils import logging

from megatron_gmpo.config import exit_with_one_line
from megatron_gmpo.errors import InputError
from tools.make_tiny_model import countdown_tokenizer, make_tiny_model
from tools.warm_up import warm_up

_OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
_IN_PARENTHESES = {
    "+": (set(), set()),
    "-": (set(), set("+-")),
    "*": (set("+-"), set("+-")),
    "/": (set("+-"), set("+-*/")),
}
"""The operators whose results need parentheses on an operator's left, and on its right."""
_PATIENCE = 100_000
"""Draws in a row that bring no new problem, after which there are taken to be no more."""


@dataclass(frozen=True)
class Countdown:
    """A kind of Countdown problem.

    Attributes:
        count: numbers of a problem.
        max_number: the largest they can be; the smallest is 1.
        max_target: the largest target, a whole number from 1.
    """

    count: int = 3
    max_number: int = 12
    max_target: int = 99

    def draw(self, generator: random.Random) -> tuple[str, str]:
        """A problem, such as ``"12,7,3=15"``, and the random expression it was made from, ``"3*(12-7)"``.

        A problem's numbers are written in falling order, so that the text is the same for the same numbers and target.
        """
        while True:
            numbers = sorted((generator.randint(1, self.max_number) for _ in range(self.count)), reverse=True)
            value, solution = _random_expression(numbers, generator)
            if value.denominator == 1 and 1 <= value <= self.max_target:
                return f"{','.join(map(str, numbers))}={value}", solution

    def problems(self, number: int, generator: random.Random) -> list[str]:
        """So many different problems in a random order.

        Raises:
            InputError: there are fewer.
        """
        found: dict[str, None] = {}
        misses = 0
        while len(found) < number:
            before = len(found)
            found[self.draw(generator)[0]] = None
            misses = 0 if len(found) > before else misses + 1
            if misses == _PATIENCE:
                raise InputError(
                    f"num_train + num_heldout = {number}, but only {before} problems of {self} were found: ask for fewer"
                )
        problems = list(found)
        generator.shuffle(problems)  # those with many solutions were found first
        return problems


def _random_expression(numbers: list[int], generator: random.Random) -> tuple[Fraction, str]:
    """The value and the text of an expression in all ``numbers``: any two parts are joined, until one is left.

    Of two summands or factors the larger comes first, so that there are fewer ways to write the same.
    """
    parts = [
        (Fraction(number), str(number), "") for number in numbers
    ]  # value, text, the operator applied last
    while len(parts) > 1:
        generator.shuffle(parts)
        left, right = parts.pop(), parts.pop()
        op = generator.choice("+-*/" if right[0] else "+-*")
        if op in "+*" and left[0] < right[0]:
            left, right = right, left
        texts = [
            f"({text})" if last in wrapped else text
            for (_, text, last), wrapped in zip((left, right), _IN_PARENTHESES[op], strict=True)
        ]
        parts.append((_OPERATIONS[op](left[0], right[0]), op.join(texts), op))
    value, text, _ = parts[0]
    return value, text


def main(
    out: Path = Path("runs/countdown"),
    num_train: int = 4000,
    num_heldout: int = 200,
    count: int = 3,
    max_number: int = 12,
    max_target: int = 99,
    problems_only: bool = False,
    warm_up_steps: int = 1000,
    seed: int = 0,
) -> None:
    """Write train.jsonl and heldout.jsonl with the columns problem and answer, then the folder model, then warm_up.json.

    Args:
        out: Folder to write.
        num_train: Problems in train.jsonl.
        num_heldout: Problems in heldout.jsonl; none of them is in train.jsonl or among those the model is warmed up with.
        count: Numbers of a problem.
        max_number: Largest number.
        max_target: Largest target.
        problems_only: Make no model.
        warm_up_steps: Batches of solved problems that the model is trained on.
        seed: Seed of problems, weights and order.
    """
    for name, value in (("count", count), ("max_number", max_number), ("max_target", max_target)):
        if value < 1:
            raise InputError(f"--{name} {value}: give at least 1")
    kind, generator = Countdown(count, max_number, max_target), random.Random(seed)
    problems = kind.problems(num_train + num_heldout, generator)
    heldout = set(problems[:num_heldout])
    out.mkdir(parents=True, exist_ok=True)
    for name, chosen in (("train", problems[num_heldout:]), ("heldout", problems[:num_heldout])):
        path = out / f"{name}.jsonl"
        path.write_text(
            "".join(json.dumps({"problem": f"{problem}:", "answer": problem}) + "\n" for problem in chosen)
        )
        print(f"{path}: {len(chosen):,} problems")
    if problems_only:
        return
    make_tiny_model(out / "model", tokenizer=countdown_tokenizer(), seed=seed)
    drawn = (kind.draw(generator) for _ in range(64 * warm_up_steps))
    solved = [
        {"problem": f"{problem}:", "answer": solution}
        for problem, solution in drawn
        if problem not in heldout
    ]
    loss = warm_up(out / "model", solved, steps=warm_up_steps, seed=seed)
    (out / "warm_up.json").write_text(json.dumps({"loss": loss}))
    print(f"{out / 'model'}: loss {loss:.3f} nats a token after {warm_up_steps} steps")


if __name__ == "__main__":
    logging.disable_progress_bar()
    try:
        tyro.cli(main, use_underscores=True)
    except InputError as error:
        exit_with_one_line(error)
