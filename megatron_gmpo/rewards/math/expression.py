r"""A parser of LaTeX and plain expressions that refuses what it does not understand completely.

math-verify's parser (latex2sympy2_extended) drops or invents what it does not know: ``52_9`` becomes 52,
``\gamma - 1`` the gamma function, ``\ldots`` a space, ``2(3)`` the mixed number 5, and words become products.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import sympy

MAX_BITS = 1 << 14
"""Size of the largest integer that is computed, about 4,900 decimal digits."""
MAX_DEPTH = 50
"""Maximum depth of nested brackets."""

_FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    **{
        name: getattr(sympy, name)
        for name in ("sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh")
    },
    **{f"arc{name}": getattr(sympy, f"a{name}") for name in ("sin", "cos", "tan")},
    "ln": sympy.log,
    "exp": sympy.exp,
    "log": lambda x: sympy.log(x) / sympy.log(10),
}
_CONSTANTS = {"pi": sympy.pi, "infty": sympy.oo}
_GREEK = (
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta kappa lambda mu nu xi rho sigma tau "
    "phi varphi chi psi omega Gamma Delta Theta Lambda Sigma Phi Psi Omega ell"
)
_SYMBOLS = frozenset(_GREEK.split())
_CLOSING = {"(": ")", "[": "]", "{": "}", "|": "|", r"\lfloor": r"\rfloor", r"\lceil": r"\rceil"}
_APPLIED = set("fghFGHP")
"""Letters that name a function, not a factor, in front of a parenthesis."""
_NUMBER = re.compile(r"\s*(\d+(?:\.(\d*))?|\.\d+)(?:\\overline\s*\{(\d+)\})?")
_MIXED = re.compile(r"\s*\\frac\s*(?:\{(\d+)\}|(\d))\s*(?:\{(\d+)\}|(\d))|\s+(\d+)\s*/\s*(\d+)(?![\d.])")
_INDEX = re.compile(r"\s*(?:\{([0-9A-Za-z+,\- ]+)\}|([0-9A-Za-z]))")
_TOKEN = re.compile(r"\\[A-Za-z]+|\\[{}]|[A-Za-z]+|\d|\S")


class NotUnderstoodError(ValueError):
    """A text is not, or not completely, an expression of the grammar."""


def parse(text: str) -> sympy.Expr:
    """Return the expression that a tidied text stands for. Decimals are exact rational numbers.

    Raises:
        NotUnderstoodError: a character is outside the grammar, or the text has several meanings.
    """
    if re.fullmatch(r"[A-Za-z]{2,}|[A-Z]( ?- ?[A-Z])+", text):
        raise NotUnderstoodError("a word or an order")
    parser = _Parser(text)
    value = parser.sum()
    if parser.peek():
        raise NotUnderstoodError(text[parser.at :])
    return value


class _Parser:
    """Recursive descent: sum > product > power > atom. ``at`` is the position in ``text``."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.depth = 0

    def peek(self) -> str:
        """Return the next token, "" at the end: a command, a run of letters, one digit or one character."""
        token = _TOKEN.search(self.text, self.at)
        return token[0] if token else ""

    def take(self, *tokens: str) -> str:
        """Consume the next token if it is one of ``tokens`` and return it; otherwise return ""."""
        token = self.peek()
        if token and token in tokens:
            self.at = self.text.index(token, self.at) + len(token)
            return token
        return ""

    def expect(self, token: str) -> None:
        if not self.take(token):
            raise NotUnderstoodError(f"{token} expected at {self.text[self.at :]!r}")

    def sum(self) -> Any:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise NotUnderstoodError("nested too deeply")
        sign = self.take("+", "-")
        total = -self.product() if sign == "-" else self.product()
        while sign := self.take("+", "-"):
            total = total - self.product() if sign == "-" else total + self.product()
        self.depth -= 1
        return total

    def product(self) -> Any:
        value = self.power()
        divided = False
        while True:
            if self.take("*"):
                value, divided = value * self.signed(), False
            elif self.take("/"):
                divisor = self.signed()
                value, divided = quotient(value, divisor), True
            elif self._factor_follows():
                # 1/2x may be 1/(2x) or x/2; 1/2 x is x/2
                if divided and not self.text[self.at].isspace():
                    raise NotUnderstoodError("a factor directly after a division")
                value = value * self.power()
            else:
                return value

    def signed(self) -> Any:
        return -self.power() if self.take("-") else self.power()

    def power(self) -> Any:
        value = self.atom()
        while self.take("!"):
            value = _factorial(value)
        if self.take("^"):
            if self.peek() == r"\circ" or self.peek() == "'":
                raise NotUnderstoodError("a unit or a derivative inside an expression")
            value = raised(value, self.exponent())
            if self.peek() in ("^", "!"):
                raise NotUnderstoodError("a power of a power without brackets")
        return value

    def exponent(self) -> Any:
        if self.peek() == "{":
            return self.argument()
        sign = -1 if self.take("-") else 1
        return sign * (self._number(mixed=False) if self.peek().isdigit() else self.atom())

    def argument(self) -> Any:
        r"""Read the argument of a command: ``{...}``, or as in ``\frac12`` one digit or letter."""
        if self.take("{"):
            value = self.sum()
            self.expect("}")
            return value
        while self.text[self.at : self.at + 1].isspace():
            self.at += 1
        character = self.text[self.at : self.at + 1]
        if character == "\\":
            return self.atom()
        if not re.fullmatch("[0-9A-Za-z]", character):
            raise NotUnderstoodError("an argument is missing")
        self.at += 1
        return sympy.Integer(character) if character.isdigit() else self._symbol(character)

    def atom(self) -> Any:
        token = self.peek()
        if token.isdigit() or token == ".":
            return self._number()
        if token in _CLOSING:
            return self._bracket()
        if token[:1] == "\\":
            return self._command()
        if token.isalpha() and token.isascii():
            return self._letter(token)
        raise NotUnderstoodError(f"{token!r}")

    def _factor_follows(self) -> bool:
        token = self.peek()
        if token[:1] == "\\":
            return token not in (r"\rfloor", r"\rceil", r"\{", r"\}") and token != r"\infty"
        return token in ("(", "[", "{") or (token.isalpha() and token.isascii())

    def _number(self, mixed: bool = True) -> Any:
        number = _NUMBER.match(self.text, self.at)
        if number is None:
            raise NotUnderstoodError("a number")
        self.at = number.end()
        value = sympy.Rational(number[1].removesuffix("."))
        if repeated := number[3]:
            value += sympy.Rational(int(repeated), 10 ** len(number[2] or "") * (10 ** len(repeated) - 1))
        elif mixed and number[1].isdigit():
            value += self._mixed()
        if re.match(r"\s*[\d_.]", self.text[self.at :]):
            raise NotUnderstoodError("a base, or two numbers")
        return value

    def _mixed(self) -> Any:
        """Read the fraction of a mixed number like 3 1/2 and return it, or 0 if no fraction follows."""
        found = _MIXED.match(self.text, self.at)
        if not found:
            return 0
        upper, lower = (int(group) for group in found.groups() if group)
        if not 0 < upper < lower:
            raise NotUnderstoodError("neither a mixed number nor a product")
        self.at = found.end()
        return sympy.Rational(upper, lower)

    def _bracket(self) -> Any:
        opening = self.peek()
        self.take(opening)
        value = self.sum()
        self.expect(_CLOSING[opening])
        around = {"|": sympy.Abs, r"\lfloor": sympy.floor, r"\lceil": sympy.ceiling}
        return around[opening](value) if opening in around else value

    def _command(self) -> Any:
        token = self.peek()
        name = token[1:]
        if name in _FUNCTIONS:
            self.take(token)
            return self._function(name)
        if name not in _CONSTANTS and name not in _SYMBOLS and name not in ("frac", "binom", "sqrt"):
            raise NotUnderstoodError(token)
        if name == "infty" and not re.fullmatch(r"[-+]? ?\\infty", self.text.strip()):
            raise NotUnderstoodError("arithmetic with infinity")
        self.take(token)
        if name == "frac":
            return quotient(self.argument(), self.argument())
        if name == "binom":
            return _binomial(self.argument(), self.argument())
        if name == "sqrt":
            return self._root()
        return _CONSTANTS[name] if name in _CONSTANTS else self._symbol(name)

    def _root(self) -> Any:
        degree: Any = sympy.Integer(2)
        if self.take("["):
            degree = self.sum()
            self.expect("]")
        if self.peek() == "(":
            return raised(self._bracket(), 1 / degree)
        value = self.argument()
        if re.match(r"\d", self.text[self.at :]):
            raise NotUnderstoodError("a root of one digit or of several")
        return raised(value, quotient(sympy.Integer(1), degree))

    def _letter(self, run: str) -> Any:
        if run in _FUNCTIONS:
            self.take(run)
            return self._function(run)
        if len(run) > 1 and run.isupper():  # a segment or an area, like AB
            self.take(run)
            return self._symbol(run)
        if len(run) > 3 or (len(run) > 1 and not run.islower()):
            raise NotUnderstoodError(f"the word {run}")
        self.at = self.text.index(run, self.at) + 1
        return self._symbol(run[0])

    def _symbol(self, name: str) -> Any:
        if self.take("_"):
            index = _INDEX.match(self.text, self.at)
            if index is None:
                raise NotUnderstoodError("an index")
            self.at = index.end()
            return sympy.Symbol(f"{name}_{(index[1] or index[2]).replace(' ', '')}")
        if self.peek() == "'" or (name in _APPLIED and self.peek() == "("):
            raise NotUnderstoodError("a function")
        return {"i": sympy.I, "e": sympy.E}.get(name) or sympy.Symbol(name)

    def _function(self, name: str) -> Any:
        function = _FUNCTIONS[name]
        if name == "log" and self.take("_"):
            base = self.argument()
            function = partial(_logarithm, base)
        exponent = self.exponent() if self.take("^") else sympy.Integer(1)
        if exponent == -1:
            if name not in ("sin", "cos", "tan"):
                raise NotUnderstoodError("an inverse function or a reciprocal")
            function, exponent = _FUNCTIONS[f"arc{name}"], sympy.Integer(1)
        if self.peek() in ("(", "{", "[", "|"):
            value = function(self._bracket())
            if self.peek() == "^":
                raise NotUnderstoodError("the power of a function or of its argument")
            return raised(value, exponent)
        argument = self.power()
        while (
            self._factor_follows()
            and self.peek() not in ("(", "[", "{")
            and self.peek()[1:] not in _FUNCTIONS
        ):
            argument *= self.power()
        if self.peek() == "/":
            raise NotUnderstoodError("a quotient of a function or of its argument")
        return raised(function(argument), exponent)


def quotient(numerator: Any, denominator: Any) -> Any:
    """Return the quotient.

    Raises:
        NotUnderstoodError: division by zero.
    """
    if denominator == 0:
        raise NotUnderstoodError("division by zero")
    return numerator / denominator


def raised(base: Any, exponent: Any) -> Any:
    """Return the power.

    Raises:
        NotUnderstoodError: it is undefined, or an integer in it would exceed ``MAX_BITS``.
    """
    if exponent.is_Rational:
        if base == 0 and exponent <= 0:
            raise NotUnderstoodError("a power of zero")
        if bits(base) * abs(exponent) > MAX_BITS:
            raise NotUnderstoodError("a number with too many digits")
    elif bits(exponent) > 64:
        raise NotUnderstoodError("an exponent with too many digits")
    return base**exponent


def bits(expression: Any) -> int:
    """Return the size of the largest integer in an expression."""
    return max(
        (max(abs(part.p), part.q).bit_length() for part in expression.atoms(sympy.Rational)), default=1
    )


def _factorial(value: Any) -> Any:
    if value.is_Rational and not (value.is_Integer and 0 <= value <= 1000):
        raise NotUnderstoodError("a factorial with too many digits")
    return sympy.factorial(value)


def _binomial(upper: Any, lower: Any) -> Any:
    if any(part.is_Rational and not (part.is_Integer and 0 <= part <= 1000) for part in (upper, lower)):
        raise NotUnderstoodError("a binomial coefficient with too many digits")
    return sympy.binomial(upper, lower)


def _logarithm(base: Any, value: Any) -> Any:
    return quotient(sympy.log(value), sympy.log(base))
