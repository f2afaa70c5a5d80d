"""Functions that the policy may call, as an environment."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from ...batch.samples import Prompt
from ...config import RolloutConfig
from ...errors import InputError, one_line
from ...plugins import check_callable, resolve
from . import Observation
from .tool_calls import Call, parse_calls

MAX_RESULT_CHARACTERS = 32_000
"""Maximum length of a tool's result. A longer one is replaced with an error, which the model can avoid."""


class ToolEnvironment:
    """Answer a turn's calls of tools; a turn without a call ends the episode.

    Each call has one message as its answer, ``{"role": "tool", "name": ..., "content": ...}``, in order. A
    function's result is text, or JSON if it is anything else. A malformed call, an unknown name, wrong
    arguments and an exception have an error as their result, which the model reads. A call that does not end
    is a fault of the episode, as in other environments.

    Args:
        functions: functions by name, which may be ``async``.
    """

    def __init__(self, functions: Mapping[str, Callable[..., Any]]) -> None:
        self._functions = functions

    def reset(self, prompt: Prompt) -> Observation:
        """Leave the prompt as it is."""
        return Observation()

    async def step(self, action: str) -> Observation:
        """Answer the calls in a turn, one after another."""
        calls = parse_calls(action)
        results = [await self._result(call) for call in calls]
        return Observation(
            [
                {"role": "tool", "name": call.name, "content": content}
                for call, (content, _) in zip(calls, results, strict=True)
            ],
            done=not calls,
            info={"tool_calls": len(calls), "tool_errors": sum(failed for _, failed in results)},
        )

    async def _result(self, call: Call) -> tuple[str, bool]:
        """Return the text of a call's result, and whether it is an error."""
        if call.error:
            return f"Error: {call.error}", True
        if call.name not in self._functions:
            return f"Error: no tool {call.name!r}. The tools are {', '.join(self._functions)}.", True
        function = self._functions[call.name]
        try:
            inspect.signature(function).bind(**call.arguments)
        except TypeError as error:
            return f"Error: {call.name}: {error}.", True
        try:
            result = function(**call.arguments)
            if inspect.isawaitable(result):
                result = await result
            text = result if isinstance(result, str) else json.dumps(result, ensure_ascii=False, default=str)
            text.encode()  # raises an error for half of a surrogate pair
        except Exception as error:
            return f"Error: {type(error).__name__}: {one_line(error)}"[:MAX_RESULT_CHARACTERS], True
        if len(text) > MAX_RESULT_CHARACTERS:
            limit = f"{MAX_RESULT_CHARACTERS:,}"
            return f"Error: the result has {len(text):,} characters, more than {limit}.", True
        return text, False


def bound(tools: Sequence[str], arguments: Mapping[str, Any]) -> dict[str, Callable[..., Any]]:
    """Return the functions of ``rollout.tools`` by name, with the arguments that the model does not give.

    Args:
        tools: ``module:function`` each.
        arguments: ``rollout.environment_args``; each function receives those that it has a parameter for.

    Raises:
        InputError: a function cannot be imported, two have the same name, or no function has a parameter of
            an argument's name.
    """
    functions: dict[str, Callable[..., Any]] = {}
    unused = set(arguments)
    for tool in tools:
        function = resolve("rollout.tools", tool, {})
        check_callable("rollout.tools", tool, function, "give a function")
        name = getattr(function, "__name__", "")
        if not name or name in functions:
            raise InputError(
                f"rollout.tools = {tool!r} has the name {name!r}: every tool needs a name of its own"
            )
        parameters = inspect.signature(function).parameters
        hidden = {key: value for key, value in arguments.items() if key in parameters}
        unused -= hidden.keys()
        functions[name] = partial(function, **hidden) if hidden else function
    if unused:
        raise InputError(
            f"rollout.environment_args.{min(unused)} is no parameter of rollout.tools = {list(tools)}: "
            "leave it out"
        )
    return functions


def tool_schemas(cfg: RolloutConfig) -> list[dict[str, Any]]:
    """Return the JSON schemas of ``rollout.tools`` for the chat template's ``tools``; none without tools.

    transformers makes them from type hints and docstrings. They leave out what ``rollout.environment_args``
    gives.

    Raises:
        InputError: a function cannot be imported or described.
    """
    if not cfg.tools:
        return []
    from transformers.utils import get_json_schema  # the workers do not import transformers

    schemas = []
    functions = bound(cfg.tools, cfg.environment_args)
    for tool, function in zip(cfg.tools, functions.values(), strict=True):
        hidden = function.keywords if isinstance(function, partial) else {}
        try:
            schema = get_json_schema(function.func if isinstance(function, partial) else function)
        except Exception as error:  # of several types, which transformers does not export together
            raise InputError(
                f"rollout.tools = {tool!r} cannot be described ({one_line(error)}): give it type hints and a "
                "docstring that describes every argument under Args:"
            ) from None
        parameters = schema["function"]["parameters"]
        parameters["properties"] = {
            key: value for key, value in parameters["properties"].items() if key not in hidden
        }
        if "required" in parameters:
            parameters["required"] = [key for key in parameters["required"] if key not in hidden]
        schemas.append(schema)
    return schemas
