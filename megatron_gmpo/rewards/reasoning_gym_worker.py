"""The process that scores answers: ``python -m megatron_gmpo.rewards.reasoning_gym_worker``.

Scorers of reasoning-gym 0.1.25 read some answers of the model with ``eval``, which would run any code in
them. Here they read them with ``ast.literal_eval``, which suffices for the lists that they expect. sympy's
``parse_expr`` evaluates too, and reaches any object through attributes and texts: an answer with either is
not parsed.
"""

from __future__ import annotations

import ast
import importlib
import json
import re
from functools import cache, lru_cache
from types import ModuleType
from typing import Any

import sympy
import sympy.parsing.sympy_parser

from ..data.reasoning_gym import open_data_set
from .countdown import answer_in
from .worker import serve

_ATTRIBUTE_OR_TEXT = re.compile(r"""__|\.\s*[^\W\d]|["'\\]""")
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
    if _ATTRIBUTE_OR_TEXT.search(text):
        raise ValueError("not an expression of numbers, names and functions")
    return _parse_expr(text, *args, **kwargs)


def _evaluate_no_code() -> None:
    """Replace ``eval`` and ``parse_expr`` in the modules of the scorers that read answers with them."""
    sympy.parse_expr = sympy.parsing.sympy_parser.parse_expr = _parse_safely
    for name in ("string_insertion", "spiral_matrix", "binary_matrix"):
        _shadow(importlib.import_module(f"reasoning_gym.algorithmic.{name}"))
    _shadow(importlib.import_module("reasoning_gym.games.n_queens"))


def _shadow(module: ModuleType) -> None:
    vars(module)["eval"] = ast.literal_eval


if __name__ == "__main__":
    _evaluate_no_code()
    serve(score)
