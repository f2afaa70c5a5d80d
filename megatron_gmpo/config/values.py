"""Values from words of the command line and back, and values of open tables.

An open table, such as ``[megatron]``, has fields that a library or the user's code declares.
"""

from __future__ import annotations

import ast
import json
import re
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError

from ..errors import InputError

_ONLY_IN_PYTHON = {"callable_type", "needs_python_object"}
"""Pydantic's error types of annotations whose values are Python objects, such as functions."""


def parse_value(field: str, adapter: TypeAdapter[Any], value: Any) -> Any:
    """Return ``value`` as the type of ``adapter``.

    Text is parsed: ``"False"`` is a bool and ``".001"`` is a float, if the type is one. Any other value must
    already have the type; an int is a float too, and a list is a tuple too.

    Args:
        field: the config field, for the error line.
        value: a TOML value.

    Raises:
        InputError: the value does not have the type.
    """
    try:
        # The rules for JSON are the rules for TOML. Those for Python objects would read true as the number 1.
        return adapter.validate_json(json.dumps(value, default=str), strict=not isinstance(value, str))
    except ValidationError as error:
        reasons = [part["msg"] for part in error.errors() if part["type"] not in _ONLY_IN_PYTHON]
        reason = " or ".join(dict.fromkeys(reasons)) or "a config cannot set this field; remove it"
        raise InputError(f"{field} = {value!r}: {reason}") from None


def check_arguments(field: str, function: Callable[..., Any], values: Mapping[str, Any]) -> None:
    """Check that a user's arguments for ``function`` have the types of its annotations, as far as it has any.

    Args:
        field: the config field of the open table that has the arguments, for the error line.

    Raises:
        InputError: a value does not have its type, such as ``pydantic.FilePath``; an annotation is not a type
            of config values.
    """
    for name, value in values.items():
        try:
            kind = get_type_hints(function, include_extras=True).get(name, Any)
            adapter = TypeAdapter(kind, config=ConfigDict(allow_inf_nan=False))
        except (NameError, PydanticUserError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(
                f"{field}.{name}: its annotation is not a type of config values ({reason}): annotate it with "
                "a type like float, bool or pydantic.FilePath"
            ) from None
        parse_value(f"{field}.{name}", adapter, value)


def parse_words(kind: Any, words: str | list[str] | bool) -> Any:
    """Convert the result of argparse for an option of type ``kind``.

    ``words`` is one word, several words, or True for a flag.
    """
    if isinstance(words, bool):
        return words
    if isinstance(words, str):
        return _scalar(kind, words)
    values = [_scalar(kind, word) for word in words]
    return values[0] if len(values) == 1 and not isinstance(values[0], str) else values


def _scalar(kind: Any, text: str) -> Any:
    """Parse quoted strings, lists, inline tables and values of open tables; return other text as is.

    pydantic converts such text to the field's type. For example, a path ``2025-08-01`` stays text. The values
    of open tables are of TOML or of Python, and of the type of their field (``parse_value``).
    """
    inner, optional = unwrapped(kind)
    if text == "None" and optional:
        return None
    if inner is not Any and not text.startswith(('"', "'", "[", "{")):
        return text
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return _python_literal(text) if inner is Any else text


def _python_literal(text: str) -> Any:
    """Return the value of text like ``True``, ``.001`` or ``[False, 1.]``; return other text as is."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    return value if isinstance(value, bool | float | list) else text


def unwrapped(kind: Any) -> tuple[Any, bool]:
    """Return a type without ``Annotated`` and ``None``, and whether it allows None."""
    if get_origin(kind) is Annotated:
        return unwrapped(get_args(kind)[0])
    if get_origin(kind) in (Union, UnionType):
        (inner,) = (arg for arg in get_args(kind) if arg is not NoneType)
        return unwrapped(inner)[0], True
    return kind, kind is Any


def as_argument(value: Any) -> str:
    """Return ``value`` as a command-line argument: a plain word without quotes, any other value as TOML."""
    if value is None:
        return "None"
    if isinstance(value, Path):
        value = str(value)
    plain = isinstance(value, str) and re.fullmatch(r"(?!\.\d)[A-Za-z_/.][\w/.:-]*", value)
    if plain and value not in ("true", "false", "nan", "inf", "None", "True", "False"):
        return value
    return json.dumps(value, ensure_ascii=False)
