"""The reward of the Countdown numbers game.

A solution is an arithmetic expression that uses every given number exactly once and evaluates to the target.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable
from fractions import Fraction

from ..batch.samples import Prompt
from ..errors import InputError

MAX_LENGTH = 200
"""Maximum length of an expression in characters."""

_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def countdown_reward(prompt: Prompt, response: str) -> float:
    """Return 1.0 if the response is a solution of the prompt's problem, else 0.0.

    The expression is the content of the last ``<answer> </answer>``, or the whole response without one. It
    consists of decimal numbers, the binary operators ``+ - * /``, parentheses and spaces. It is parsed, not
    executed, and evaluated in exact fractions. No response raises an error.

    Args:
        prompt: prompt whose ``answer`` has the numbers and the target, e.g. ``"3,7,12=45"``.
        response: the response text.

    Raises:
        InputError: the prompt's answer does not have this form.
    """
    return float(not mistake(prompt, response))


def mistake(prompt: Prompt, response: str) -> str:
    """Return in one sentence why the response is no solution, or "" if it is; see ``countdown_reward``."""
    numbers, target = _read(prompt)
    expression = answer_in(response)
    if not re.fullmatch(rf"[-0-9+*/() ]{{1,{MAX_LENGTH}}}", expression):
        return "The answer is not an expression of numbers, + - * / and parentheses."
    used: list[int] = []

    def leaf(node: ast.expr) -> Fraction:
        match node:
            case ast.Constant(value=int(number)):
                used.append(number)
                return Fraction(number)
        raise SyntaxError(f"not allowed in a Countdown expression: {type(node).__name__}")

    try:
        value = exact_value(ast.parse(expression, mode="eval").body, leaf)
    except SyntaxError:
        return "The expression cannot be read."
    except ZeroDivisionError:
        return "The expression divides by zero."
    if value != target:
        return f"The value is {value}, not {target}."
    return "" if sorted(used) == numbers else f"The numbers are {sorted(used)}, not {numbers}."


def answer_in(response: str) -> str:
    """Return the content of the last ``<answer> </answer>``, or the whole response without one."""
    return response.rpartition("<answer>")[2].partition("</answer>")[0].strip()


def _read(prompt: Prompt) -> tuple[list[int], int]:
    """Return the sorted numbers and the target of a problem."""
    if not re.fullmatch(r"[0-9]+(,[0-9]+)*=-?[0-9]+", prompt.answer):
        raise InputError(
            f"the answer {prompt.answer!r} of {prompt.id} is no Countdown problem: "
            "write numbers and target as 3,7,12=45"
        )
    numbers, _, target = prompt.answer.partition("=")
    return sorted(map(int, numbers.split(","))), int(target)


def exact_value(node: ast.expr, leaf: Callable[[ast.expr], Fraction]) -> Fraction:
    """Return the exact value of a parsed expression of the four binary operators.

    Args:
        leaf: returns the value of any other node, or raises ``SyntaxError``.

    Raises:
        ZeroDivisionError: a division by zero.
    """
    match node:
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](exact_value(left, leaf), exact_value(right, leaf))
    return leaf(node)
