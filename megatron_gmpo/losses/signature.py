"""Check the signature of a policy loss, and ``algorithm.options`` against it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, get_type_hints

from pydantic import ConfigDict, PydanticUserError, TypeAdapter

from ..config.values import parse_value
from ..errors import InputError
from ..plugins import nearest

_CLIPS = ("clip_low", "clip_high")


def check_signature(name: str, function: Callable[..., Any]) -> None:
    """Check that the signature is ``(tokens, *, clip_low, clip_high, ...)``.

    Raises:
        InputError: the signature differs; the line names the parameter.
    """
    remedy = "write def loss(tokens, *, clip_low, clip_high, ...)"
    try:
        first, *others = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # not a Python function, or one without parameters
        raise InputError(
            f"algorithm.loss = {name!r} does not take the parameter 'tokens': {remedy}"
        ) from None
    if first.kind not in (first.POSITIONAL_ONLY, first.POSITIONAL_OR_KEYWORD):
        raise InputError(f"algorithm.loss = {name!r}: parameter {first.name!r} is not positional: {remedy}")
    for parameter in others:
        if parameter.kind is not parameter.KEYWORD_ONLY:
            raise InputError(
                f"algorithm.loss = {name!r}: parameter {parameter.name!r} is not keyword-only: {remedy}"
            )
    for clip in _CLIPS:
        if clip not in (parameter.name for parameter in others):
            raise InputError(f"algorithm.loss = {name!r} does not take the parameter {clip!r}: {remedy}")


def check_options(name: str, function: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Check ``algorithm.options`` against the keyword-only parameters of the loss and their annotations.

    Returns:
        The options, with every value as the type of its annotation.

    Raises:
        InputError: an unknown option (the line names the nearest), a missing one, a value of the wrong type
            or out of range, or an annotation that is not a type of config values.
    """
    parameters = {
        key: parameter
        for key, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and key not in _CLIPS
    }
    places = {key: f"algorithm.options.{key}" for key in parameters}
    places |= {key: f"algorithm.{key}" for key in _CLIPS}
    for key in options:
        if key not in parameters:
            likely = places[nearest(key, places)]
            raise InputError(f"algorithm.options.{key} is not an option of {name}: did you mean {likely}?")
    values: dict[str, Any] = {}
    for key, parameter in parameters.items():
        adapter = _adapter(name, function, key)
        if key in options:
            values[key] = parse_value(f"algorithm.options.{key}", adapter, options[key])
        elif parameter.default is parameter.empty:
            raise InputError(f"algorithm.options.{key} is not set, and {name} has no default for it: set it")
    return values


def _adapter(name: str, function: Callable[..., Any], key: str) -> TypeAdapter[Any]:
    try:
        kind = get_type_hints(function, include_extras=True).get(key, Any)
        return TypeAdapter(kind, config=ConfigDict(allow_inf_nan=False))
    except (NameError, PydanticUserError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"algorithm.loss = {name!r}: the annotation of parameter {key!r} is not a type of config values "
            f"({reason}): annotate options with types like float, bool or Literal, and read tensors from the "
            "tokens"
        ) from None
