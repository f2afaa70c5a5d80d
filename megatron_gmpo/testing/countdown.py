"""Problems of the Countdown numbers task, and a tiny Qwen3-MoE that solves some of them."""

from __future__ import annotations

import json
import operator
import random
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from ..errors import InputError
from .arithmetic import write_problems
from .tiny_models import make_tiny_model
from .tiny_tokenizers import countdown_tokenizer
from .warm_up import warm_up

_OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
_IN_PARENTHESES = {
    "+": (set(), set()),
    "-": (set(), set("+-")),
    "*": (set("+-"), set("+-")),
    "/": (set("+-"), set("+-*/")),
}
"""Operator -> operators whose results need parentheses as its left operand, and as its right operand."""
_MAX_MISSES = 100_000
"""Consecutive draws without a new problem after which the search stops."""


@dataclass(frozen=True)
class Countdown:
    """A kind of Countdown problem.

    Attributes:
        count: numbers per problem.
        max_number: largest number; the smallest is 1.
        max_target: largest target; targets are whole numbers from 1.
    """

    count: int = 3
    max_number: int = 12
    max_target: int = 99

    def draw(self, generator: random.Random) -> tuple[str, str]:
        """Return a problem and the random expression from which it was made.

        Example: ``"12,7,3=15"`` and ``"3*(12-7)"``. The numbers are in descending order, so equal numbers and
        targets give equal texts.
        """
        while True:
            numbers = sorted((generator.randint(1, self.max_number) for _ in range(self.count)), reverse=True)
            value, solution = _random_expression(numbers, generator)
            if value.denominator == 1 and 1 <= value <= self.max_target:
                return f"{','.join(map(str, numbers))}={value}", solution

    def problems(self, number: int, generator: random.Random) -> list[str]:
        """Return ``number`` different problems in a random order.

        Raises:
            InputError: there are fewer than ``number`` problems.
        """
        found: dict[str, None] = {}
        misses = 0
        while len(found) < number:
            before = len(found)
            found[self.draw(generator)[0]] = None
            misses = 0 if len(found) > before else misses + 1
            if misses == _MAX_MISSES:
                raise InputError(
                    f"num_train + num_heldout = {number}, but only {before} problems of {self} were found: "
                    f"ask for fewer"
                )
        problems = list(found)
        generator.shuffle(problems)  # problems with many solutions are found first
        return problems


def make_countdown(
    out: Path,
    kind: Countdown,
    *,
    num_train: int = 4000,
    num_heldout: int = 200,
    warm_up_steps: int | None = 1000,
    seed: int = 0,
) -> tuple[dict[Path, int], float | None]:
    """Write train.jsonl and heldout.jsonl, then the folder model, then warm_up.json, which holds the loss.

    Args:
        warm_up_steps: number of batches of 64 solved problems on which the model is trained. None makes no
            model.

    Returns:
        The number of problems in each file, and the loss of the warm-up.

    Raises:
        InputError: there are too few problems of this kind.
    """
    generator = random.Random(seed)
    problems = kind.problems(num_train + num_heldout, generator)
    rows = [{"problem": f"{problem}:", "answer": problem} for problem in problems]
    counts = write_problems(out, rows[num_heldout:], rows[:num_heldout])
    if warm_up_steps is None:
        return counts, None
    make_tiny_model(out / "model", tokenizer=countdown_tokenizer(), seed=seed)
    heldout = set(problems[:num_heldout])
    drawn = (kind.draw(generator) for _ in range(64 * warm_up_steps))
    solved = [
        {"problem": f"{problem}:", "answer": solution}
        for problem, solution in drawn
        if problem not in heldout
    ]
    loss = warm_up(out / "model", solved, steps=warm_up_steps, seed=seed)
    (out / "warm_up.json").write_text(json.dumps({"loss": loss}))
    return counts, loss


def _random_expression(numbers: list[int], generator: random.Random) -> tuple[Fraction, str]:
    """Return the value and the text of a random expression that uses all ``numbers``.

    Two random parts are joined until one is left. The larger of two summands or factors comes first, which
    leaves fewer ways to write the same expression.
    """
    # value, text, and the operator applied last
    parts = [(Fraction(number), str(number), "") for number in numbers]
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
