"""The structure of an answer: lists, tuples, intervals, matrices, relations, values with units, or words."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import sympy

from .expression import NotUnderstoodError, parse
from .notation import key
from .units import split_unit


@dataclass(frozen=True)
class Value:
    """An expression.

    Attributes:
        text: the tidied text without unit and percent sign.
        expression: its exact value.
        unit: the unit as it is written, or "".
        percent: whether a percent sign follows.
    """

    text: str
    expression: Any
    unit: str = ""
    percent: bool = False


@dataclass(frozen=True)
class Words:
    """A text that is not understood as mathematics; ``key`` is what equal texts share."""

    key: str


@dataclass(frozen=True)
class Items:
    """A list, a set or a union: the order does not count.

    Attributes:
        items: the elements.
        kind: ``"list"``, ``"set"`` or ``"union"``.
    """

    items: tuple[Answer, ...]
    kind: str = "list"


@dataclass(frozen=True)
class Group:
    """A tuple, an interval or a matrix: order and brackets count.

    Attributes:
        brackets: the kind, e.g. ``"(]"``, or ``"matrix 2"`` with the number of columns.
        items: the entries.
        variable: the letter whose inequality this interval solves, or "".
    """

    brackets: str
    items: tuple[Answer, ...]
    variable: str = ""


@dataclass(frozen=True)
class Relation:
    """Texts that the operators ``= < > \\leq \\geq \\neq`` connect, one operator fewer than texts."""

    parts: tuple[str, ...]
    operators: tuple[str, ...]


Answer = Value | Words | Items | Group | Relation

_OPENING = {"(": ")", "[": "]", "{": "}", r"\{": r"\}", r"\langle": r"\rangle"}
_BRACKET = re.compile(r"\\[{}]|\\[lr]angle|[()\[\]{}]")
_RELATION = re.compile(r"\\(?:leq|geq|neq|approx)(?![A-Za-z])|[=<>]")
_MATRIX = re.compile(
    r"[\[(]?\s*\\begin\{([pb]?matrix|array)\}(?:\{[clr|]*\})?(.*)\\end\{\1\}\s*[\])]?", re.DOTALL
)
_SET_BUILDER = re.compile(r"([A-Za-z])\s*(?:\\in\s*\(-\\infty,\\infty\)\s*)?[:|](.*)")
_SAME_DIRECTION = ({"<", r"\leq"}, {">", r"\geq"})
FLIPPED = {"<": ">", ">": "<", r"\leq": r"\geq", r"\geq": r"\leq"}


def read(text: str) -> Answer:
    """Return the structure of a tidied answer."""
    if r"\ldots" in text:
        return Words(key(text))
    if matrix := _MATRIX.fullmatch(text):
        return _matrix(matrix[2])
    for separator, kind in ((r"[,;]", "list"), (r"\\(?:cup|lor)(?![A-Za-z])", "union")):
        if len(_split(text, separator)) > 1:
            return Items(_members(text, separator), kind)
    if (bracketed := _bracketed(text)) is not None:
        return bracketed
    if len(both := _both_signs(text)) > 1:
        return Items(tuple(map(read, both)))
    name, *members = _split(text, r"\\in(?![A-Za-z])")
    if len(members) == 1 and re.fullmatch(r"[A-Za-z]", name):
        inside = read(members[0])
        return Group(inside.brackets, inside.items, name) if isinstance(inside, Group) else inside
    if operators := tuple(_operators(text)):
        return _relation(tuple(_split(text, _RELATION.pattern)), operators)
    return _value(text)


def _value(text: str) -> Answer:
    amount, unit = split_unit(text)
    percent = amount.endswith("%")
    amount = amount.removesuffix("%").strip()
    if scientific := re.fullmatch(r"(-?\d+(?:\.\d+)?)[eE]([-+]?\d+)", amount):
        amount = f"{scientific[1]} * 10^{{{scientific[2]}}}"
    try:
        return Value(amount, parse(amount), unit, percent)
    except NotUnderstoodError:
        return Words(key(text))


def _bracketed(text: str) -> Answer | None:
    """Return the structure of a text inside one pair of brackets with commas, or of a set."""
    brackets = list(_BRACKET.finditer(text))
    if not brackets or brackets[0].start() or brackets[-1].end() < len(text) or not _encloses(text):
        return None
    opening, closing = brackets[0][0], brackets[-1][0]
    inside = text[len(opening) : -len(closing)].strip()
    if opening == r"\{":
        if builder := _SET_BUILDER.fullmatch(inside):
            solutions = read(builder[2].strip())
            return solutions if isinstance(solutions, Group) and solutions.variable == builder[1] else None
        return None if re.search(r"[:|]", inside) else Items(_members(inside), "set")
    if opening == "{" or len(_split(inside, r"[,;]")) == 1:
        return None
    return Group(opening + closing, _members(inside))


def _members(text: str, separator: str = "[,;]") -> tuple[Answer, ...]:
    return tuple(read(item) for part in _split(text, separator) for item in _both_signs(part) if item)


def _matrix(text: str) -> Answer:
    rows = [row.split("&") for row in text.strip().removesuffix(r"\\").split(r"\\")]
    if len({len(row) for row in rows}) > 1:
        return Words(key(text))
    return Group(f"matrix {len(rows[0])}", tuple(read(cell.strip()) for row in rows for cell in row))


def _relation(parts: tuple[str, ...], operators: tuple[str, ...]) -> Answer:
    if operators[-1] == r"\approx" and not is_label(parts[-2]):  # the value before a rounding counts
        if not _is_near(read(parts[-2]), read(parts[-1])):
            return Words(key(" ".join(parts)))
        parts, operators = parts[:-1], operators[:-1]
    operators = tuple("=" if operator == r"\approx" else operator for operator in operators)
    if not operators:
        return read(parts[0])
    return _interval(parts, operators) or Relation(parts, operators)


def _is_near(value: Answer, rounded: Answer) -> bool:
    """Return whether two numbers differ by less than one percent."""
    if not isinstance(value, Value) or not isinstance(rounded, Value):
        return False
    exact, other = value.expression, rounded.expression
    return bool(exact.is_real and other.is_real and abs(exact - other) <= abs(exact) / 100)


def _interval(parts: tuple[str, ...], operators: tuple[str, ...]) -> Group | None:
    """Return the interval that solves an inequality like x < 2 or 1 <= x < 2."""
    places = [place for place, part in enumerate(parts) if re.fullmatch(r"[A-Za-z]|\\theta", part)]
    if len(places) != 1 or not all(operator in FLIPPED for operator in operators):
        return None
    place = places[0]
    ends = [read(part) for part in parts]
    if any(
        not isinstance(end, Value) or (end.expression.free_symbols and end is not ends[place]) for end in ends
    ):
        return None
    low: tuple[str, Answer] = ("(", Value(r"-\infty", -sympy.oo))
    high: tuple[Answer, str] = (Value(r"\infty", sympy.oo), ")")
    if len(parts) == 3 and (place != 1 or not any(set(operators) <= same for same in _SAME_DIRECTION)):
        return None
    for other in range(len(parts)):
        if other == place:
            continue
        operator = operators[0] if other < place else FLIPPED[operators[-1]]  # end OPERATOR variable
        if operator in ("<", r"\leq"):
            low = ("(" if operator == "<" else "[", ends[other])
        else:
            high = (ends[other], ")" if operator == ">" else "]")
    return Group(low[0] + high[1], (low[1], high[0]), parts[place])


def is_label(text: str) -> bool:
    r"""Return whether the left side of an equation names what the right side gives.

    ``f(2)``, ``AB`` and ``\angle 1`` are such names. ``2x`` is none: 2x = 10 says that x is 5.
    """
    outside = re.sub(r"\\text\s*\{[^{}]*\}|_\{[^{}]*\}|_\w|\([^()]*\)|\\angle\s*\w+", "", text)
    letters = set(re.findall(r"[A-Za-z]+", outside))
    return not re.search(r"\d", outside) or len(letters) > 1


def _both_signs(text: str) -> list[str]:
    r"""Return the two texts that ``\pm`` abbreviates, or the text."""
    if not re.search(r"\\pm(?![A-Za-z])", text):
        return [text]
    plus = re.sub(r"\\(pm|mp)(?![A-Za-z])", lambda sign: "+" if sign[1] == "pm" else "-", text)
    minus = re.sub(r"\\(pm|mp)(?![A-Za-z])", lambda sign: "-" if sign[1] == "pm" else "+", text)
    return [plus, minus]


def _operators(text: str) -> list[str]:
    return [text[start:end] for start, end in _outside(text, _RELATION.pattern)]


def _split(text: str, separator: str) -> list[str]:
    """Split at the separators that are outside all brackets."""
    parts, last = [], 0
    for start, end in _outside(text, separator):
        parts.append(text[last:start].strip())
        last = end
    return [*parts, text[last:].strip()]


def _outside(text: str, pattern: str) -> list[tuple[int, int]]:
    """Return the matches of a pattern that are outside all brackets. Intervals like (3,4] are balanced."""
    depth, found = 0, []
    for match in re.finditer(rf"{_BRACKET.pattern}|(?P<found>{pattern})", text):
        if match["found"] is None:
            depth += 1 if match[0] in _OPENING else -1
        elif depth == 0:
            found.append(match.span())
    return found


def _encloses(text: str) -> bool:
    """Return whether the first bracket is closed by the last one."""
    depth = 0
    for bracket in _BRACKET.finditer(text):
        depth += 1 if bracket[0] in _OPENING else -1
        if depth <= 0:
            return depth == 0 and bracket.end() == len(text)
    return False
