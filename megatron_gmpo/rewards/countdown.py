"""The reward of the Countdown numbers task: an expression in which every given number stands once and whose value is the target."""

from __future__ import annotations

import ast
import operator
import re
from fractions import Fraction

from ..batch.samples import Prompt
from ..errors import InputError

MAX_LENGTH = 200
"""Characters of the longest expression that is read."""

_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def countdown_reward(prompt: Prompt, response: str) -> float:
    """1.0 when the response is an expression in exactly the prompt's numbers, each used once, whose value is the target; else 0.0.

    An expression has decimal numbers, the four binary operators ``+ - * /``, parentheses and spaces, and is computed in exact fractions.
    It is the whole response, or what stands in its last ``<answer> </answer>``. It is parsed, never run, and no response raises.

    Args:
        prompt: its ``answer`` has the numbers and the target, ``"3,7,12=45"``.

    Raises:
        InputError: the prompt's answer is not of this form.
    """
    numbers, target = _read(prompt)
    expression = response.rpartition("<answer>")[2].partition("</answer>")[0].strip()
    if not re.fullmatch(rf"[-0-9+*/() ]{{1,{MAX_LENGTH}}}", expression):
        return 0.0
    used: list[int] = []
    try:
        value = _value(ast.parse(expression, mode="eval").body, used)
    except (SyntaxError, ZeroDivisionError):
        return 0.0
    return float(value == target and sorted(used) == numbers)


def _read(prompt: Prompt) -> tuple[list[int], int]:
    """The sorted numbers and the target."""
    if not re.fullmatch(r"[0-9]+(,[0-9]+)*=-?[0-9]+", prompt.answer):
        raise InputError(
            f"the answer {prompt.answer!r} of {prompt.id} is no Countdown problem: write numbers and target as 3,7,12=45"
        )
    numbers, _, target = prompt.answer.partition("=")
    return sorted(map(int, numbers.split(","))), int(target)


def _value(node: ast.expr, used: list[int]) -> Fraction:
    """The exact value of a parsed expression; ``used`` receives its numbers.

    Raises:
        SyntaxError: it holds anything but numbers and the four operators between two of them.
        ZeroDivisionError: it divides by zero.
    """
    match node:
        case ast.Constant(value=int(number)):
            used.append(number)
            return Fraction(number)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_value(left, used), _value(right, used))
    raise SyntaxError(f"no part of a Countdown expression: {type(node).__name__}")
