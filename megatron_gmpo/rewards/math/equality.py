"""Whether a teacher would accept an answer for the reference answer."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterable
from typing import Any

import sympy

from .answer import FLIPPED, Answer, Group, Items, Relation, Value, Words, is_label, read
from .expression import NotUnderstoodError, bits, parse
from .final_answer import final_answer, last_boxed
from .notation import key, tidy
from .units import conflict

MAX_LENGTH = 1000
"""Maximum length in characters of an answer that is parsed; longer ones are compared as text."""
DIGITS = 50
"""Decimal digits of a numerical comparison, beside those of the largest integer in the expressions."""
ROUNDED_DIGITS = 6
"""Significant digits from which a decimal may stand for a value that has no finite decimal."""

_CHOICE = re.compile(
    r"(?:(?:option|choice) )?(?:\\text\s*\{\s*)?"
    r"(?:\(\s*([A-Z])\s*\)|([A-Z])[).:](?=\s|\}|$))(?:[\s:.}]+(.*))?",
    re.I,
)
_BASE = re.compile(r"(\d+)_\{?(\d+)\}?")
_DECIMAL = re.compile(r"-?\d*\.(\d+)")


def is_correct(truth: str, response: str) -> bool:
    r"""Return whether the final answer of ``response`` equals ``truth``, without a time limit.

    Args:
        truth: the reference answer, plain text or LaTeX: alone, in a ``\boxed{}``, or after ``####``.
        response: a whole response. docs/rewards.md says where its final answer is, and what equal means.
    """
    boxed = last_boxed(truth)
    truth = (boxed if boxed is not None else truth.rpartition("####")[2]).strip()
    answer = (final_answer(response) or "").strip()
    if not answer or answer == truth:
        return bool(answer)
    if len(answer) > MAX_LENGTH or len(truth) > MAX_LENGTH:
        return False
    return equal(tidy(truth), tidy(answer))


def equal(truth: str, answer: str) -> bool:
    """Return whether two tidied answers are equal."""
    if not answer or key(truth) == key(answer):
        return bool(answer)
    one, other = _CHOICE.fullmatch(truth), _CHOICE.fullmatch(answer)
    if one or other:
        return _same_choice(truth, answer)
    if based := _BASE.fullmatch(truth):  # the problem names the base
        return answer == based[1]
    return same(read(truth), read(answer))


def _same_choice(truth: str, answer: str) -> bool:
    """Compare multiple choice answers like (B), B and (B) 7: by the letter or by the value after it."""
    (letter, value), (chosen, given) = _choice(truth), _choice(answer)
    if letter and chosen:
        return letter == chosen and (not value or not given or equal(value, given))
    return bool(value) and bool(given) and equal(value, given)


def _choice(text: str) -> tuple[str, str]:
    """Return the letter and the value of a multiple choice answer; either may be empty."""
    text = re.sub(r"(?i)^(?:option|choice) ", "", text)
    if re.fullmatch("[A-Za-z]", text):
        return text.upper(), text
    found = _CHOICE.fullmatch(text)
    return ((found[1] or found[2]).upper(), found[3] or "") if found else ("", text)


def same(truth: Answer, answer: Answer) -> bool:
    """Return whether two structures are equal."""
    match truth, answer:
        case Relation(), Relation():
            return _same_relation(truth, answer)
        case _, Relation():
            given = _right_side(answer)
            return given is not None and same(truth, given)
        case Relation(parts=(name, value), operators=("=",)), _:
            return is_label(name) and same(read(value), answer)
        case Value(), Value():
            return _same_value(truth, answer)
        case (Items(items=(only,)), _) if not isinstance(answer, Items):
            return same(only, answer)
        case (_, Items(items=(only,))) if not isinstance(truth, Items):
            return same(truth, only)
        case Words(), Words():
            return truth.key == answer.key
        case Items(), Items():
            return _same_items(truth, answer)
        case (Items(kind="list"), Group(brackets="()")) | (Group(brackets="()"), Items(kind="list")):
            return _same_order(truth.items, answer.items)  # a list in parentheses, a point without them
        case Group(), Group():
            named = not truth.variable or not answer.variable or truth.variable == answer.variable
            return named and truth.brackets == answer.brackets and _same_order(truth.items, answer.items)
    return False


def _same_order(one: tuple[Answer, ...], other: tuple[Answer, ...]) -> bool:
    return len(one) == len(other) and all(map(same, one, other))


def _same_items(one: Items, other: Items) -> bool:
    """Compare without order: each item of one equals a different item of the other.

    In a list of letters the order counts, because most problems with such answers ask for it.
    """
    if "union" in (one.kind, other.kind) and one.kind != other.kind:
        return False
    if one.kind == "list" and all(
        isinstance(item, Value) and re.fullmatch("[A-Z]", item.text) for item in one.items
    ):
        return _same_order(one.items, other.items)
    left = list(other.items)
    for item in one.items:
        found = next((place for place, candidate in enumerate(left) if same(item, candidate)), None)
        if found is None:
            return False
        del left[found]
    return not left


def _right_side(relation: Relation) -> Answer | None:
    """Return what an equation like x = 2 + 3 = 5 states, or None if it states nothing or is false."""
    if set(relation.operators) != {"="}:
        return None
    parts = relation.parts[::-1] if re.fullmatch("[A-Za-z]", relation.parts[-1]) else relation.parts  # 5 = x
    first, *others = parts
    last = read(others[-1])
    equals = others[:-1] if is_label(first) and re.search(r"[A-Za-z]", first) else [first, *others[:-1]]
    return last if all(same(read(part), last) for part in equals) else None


def _same_relation(truth: Relation, answer: Relation) -> bool:
    """Compare equations and inequalities: side by side, turned around, or multiplied by a number."""
    turned = Relation(answer.parts[::-1], tuple(FLIPPED.get(sign, sign) for sign in answer.operators[::-1]))
    for candidate in (answer, turned):
        if truth.operators == candidate.operators and all(map(equal, truth.parts, candidate.parts)):
            return True
    if len(truth.parts) != 2:
        return False
    if (
        set(answer.operators) == {"="}
        and truth.operators == ("=",)
        and key(truth.parts[0]) == key(answer.parts[0])
    ):
        stated = _right_side(answer)
        if stated is not None and same(read(truth.parts[1]), stated):
            return True
    try:
        one, other = (parse(relation.parts[0]) - parse(relation.parts[-1]) for relation in (truth, answer))
    except NotUnderstoodError:
        return False
    if len(answer.parts) != 2 or not one.free_symbols or not other.free_symbols:
        return False
    if truth.operators == answer.operators and truth.operators[0] in ("=", r"\neq"):
        return _proportional(one, other, (1, -1))
    signs = {(True, False): (1,), (False, True): (-1,), (True, True): (1, -1), (False, False): ()}
    return _proportional(
        one, other, signs[truth.operators == answer.operators, truth.operators == turned.operators]
    )


def _proportional(one: Any, other: Any, signs: tuple[int, ...]) -> bool:
    """Return whether one expression is a constant times the other, with one of these signs."""
    ratios = []
    for left, right in _evaluated(one, other):
        if left is None or right is None or right == 0 or left == 0:
            return False
        ratios.append(sympy.N(left / right, DIGITS))
    first = ratios[0]
    positive = bool(first.is_real) and (1 if first > 0 else -1) in signs
    return positive and all(_close(first, ratio, _digits(one, other)) for ratio in ratios[1:])


def _same_value(truth: Value, answer: Value) -> bool:
    if conflict(truth.unit, answer.unit):
        return False
    if truth.percent == answer.percent:
        return _same_number(truth, answer)
    if truth.percent:
        return any(_same_number(value, answer) for value in _percentages(truth))
    return any(_same_number(truth, value) for value in _percentages(answer))


def _percentages(value: Value) -> tuple[Value, Value]:
    """Return 50 and 1/2 for 50%."""
    return Value(value.text, value.expression), Value("", value.expression / 100)


def _same_number(truth: Value, answer: Value) -> bool:
    one, other = truth.expression, answer.expression
    if one == other:
        return True
    if _is_rounded(truth, other) or _is_rounded(answer, one):
        return True
    if one.is_Rational and other.is_Rational:
        return False
    return _equal_everywhere(one, other)


def _is_rounded(value: Value, exact: Any) -> bool:
    """Return whether a decimal is the correct rounding of a value that has no finite decimal."""
    decimal = _DECIMAL.fullmatch(value.text)
    if not decimal or exact.free_symbols or not exact.is_real:
        return False
    if exact.is_Rational and pow(10, exact.q.bit_length(), exact.q) == 0:  # q divides a power of 10
        return False
    if len(value.text.strip("-").replace(".", "").strip("0")) < ROUNDED_DIGITS:
        return False
    return bool(abs(exact - value.expression) <= sympy.Rational(1, 2 * 10 ** len(decimal[1])))


def _equal_everywhere(one: Any, other: Any) -> bool:
    """Compare expressions at fixed points, with more digits than their integers have."""
    digits = _digits(one, other)
    for place, (left, right) in enumerate(_evaluated(one, other)):
        if place and not (_is_real(left) and _is_real(right)):
            continue  # identities of roots and logarithms hold for positive numbers
        if left is None or right is None:
            return False
        if max(abs(left), abs(right)) < sympy.Float(10) ** (-digits // 2):
            return sympy.simplify(one - other) == 0  # zero, or lost to cancellation
        if not _close(left, right, digits):
            return False
    return True


def _is_real(value: Any) -> bool:
    return value is not None and bool(value.is_real)


def _evaluated(one: Any, other: Any) -> Iterable[tuple[Any, Any]]:
    """Yield the values of two expressions at points of positive, negative and mixed coordinates."""
    digits = _digits(one, other)
    symbols = sorted(one.free_symbols | other.free_symbols, key=str)
    random_numbers = random.Random(0)
    for signs in itertools.islice(((1, 1), (-1, -1), (1, -1)), 3 if symbols else 1):
        point = {
            symbol: sympy.Rational(signs[place % 2] * random_numbers.randint(300, 3000), 997)
            for place, symbol in enumerate(symbols)
        }
        yield _at(one, point, digits), _at(other, point, digits)


def _at(expression: Any, point: dict[Any, Any], digits: int) -> Any:
    """Return the numerical value, or None if it is not a finite number."""
    value = expression.evalf(digits, subs=point, maxn=4 * digits)
    return value if value.is_finite and value.is_number else None


def _digits(*expressions: Any) -> int:
    """Return with how many digits to compute."""
    return DIGITS + max(map(bits, expressions)) // 3


def _close(one: Any, other: Any, digits: int) -> bool:
    return bool(abs(one - other) <= sympy.Float(10) ** (DIGITS // 2 - digits) * max(abs(one), abs(other)))
