"""A calculator as a tool: ``megatron_gmpo.rollout.environments.calculator:calculator``."""

from __future__ import annotations

import ast
from fractions import Fraction

from ...rewards.countdown import MAX_LENGTH, exact_value


def calculator(expression: str) -> str:
    """Compute the value of an arithmetic expression.

    Args:
        expression: Decimal numbers, the operators + - * / and parentheses, e.g. "(3 + 4.5) * 2".
    """
    if len(expression) > MAX_LENGTH:
        raise ValueError(f"the expression has more than {MAX_LENGTH} characters")
    value = exact_value(ast.parse(expression.strip(), mode="eval").body, _number)
    if value.denominator == 1:
        return str(value.numerator)
    return f"{float(value):.12g}"


def _number(node: ast.expr) -> Fraction:
    match node:
        case ast.Constant(value=int(number) | float(number)) if not isinstance(number, bool):
            return Fraction(str(number))  # of the digits, unlike Fraction(0.1)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -exact_value(operand, _number)
    raise SyntaxError(f"not allowed in an expression: {type(node).__name__}")
