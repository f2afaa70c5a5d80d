"""The process that scores answers: ``python -m megatron_gmpo.rewards.reasoning_gym_worker``.

Scorers of reasoning-gym 0.1.25 read some answers of the model with ``eval``, which would run any code in
them. Here they read them with ``ast.literal_eval``, which suffices for the lists that they expect. sympy's
``parse_expr`` evaluates too, and knows Python's built-in functions: ``exec(chr(112)+...)`` runs any code. An
answer is parsed only if its words are variables of one letter and functions of mathematics, and if it has
neither attributes nor texts.
"""

from __future__ import annotations

import ast
import importlib
import json
import re
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import sympy

from ..data.reasoning_gym import open_data_set
from .countdown import answer_in
from .worker import serve

_ATTRIBUTE_OR_TEXT = re.compile(r"""__|\.\s*[^\W\d]|["'\\]""")
_WORD = re.compile(r"[^\W\d]\w+")
_MATHEMATICS = """
sin cos tan cot sec csc asin acos atan acot asec acsc sinh cosh tanh coth asinh acosh atanh acoth
exp log ln sqrt cbrt root Abs abs sign pi oo factorial binomial Rational Integral
erf erfc erfi gamma lowergamma uppergamma beta Ei Si Ci Shi Chi li fresnels fresnelc polylog
"""
_KNOWN_WORDS = frozenset(_MATHEMATICS.split())
_parse_expr = sympy.parse_expr


def score(truth: str, response: str) -> float:
    """Return the score of a response, from the data set's scorer; ``truth`` is the answer of a record."""
    found = json.loads(truth)
    data_set = _data_set(found["data_set"])
    return data_set.score_answer(answer_in(response), _entry(found["data_set"], found["index"]))


@cache
def _data_set(source: str) -> Any:
    return open_data_set(source, source)


@lru_cache(maxsize=256)  # the samples of a prompt follow each other
def _entry(source: str, index: int) -> dict[str, Any]:
    return _data_set(source)[index]


def _parse_safely(text: str, *args: Any, **kwargs: Any) -> Any:
    if _ATTRIBUTE_OR_TEXT.search(text) or not _KNOWN_WORDS.issuperset(_WORD.findall(text)):
        raise ValueError("not an expression of numbers, variables of one letter and functions of mathematics")
    return _parse_expr(text, *args, **kwargs)


def _evaluate_no_code() -> None:
    """Replace ``eval`` and ``parse_expr`` where scorers read answers with them; sympy itself keeps both."""
    sympy.parse_expr = _parse_safely
    for name in ("algorithmic.string_insertion", "algorithmic.spiral_matrix", "algorithmic.binary_matrix"):
        _shadow(name, "eval", ast.literal_eval)
    _shadow("games.n_queens", "eval", ast.literal_eval)
    for name in ("games.countdown", "games.puzzle24"):
        _shadow(name, "parse_expr", _parse_safely)


def _shadow(module: str, name: str, function: Callable[..., Any]) -> None:
    vars(importlib.import_module(f"reasoning_gym.{module}"))[name] = function


if __name__ == "__main__":
    _evaluate_no_code()
    serve(score)
