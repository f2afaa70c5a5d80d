"""Functions that the policy may call, as an environment."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import update_wrapper
from typing import Any, get_type_hints

from ...batch.samples import Prompt
from ...config import RolloutConfig
from ...errors import InputError, one_line
from ...plugins import check_callable, resolve
from . import Observation
from .tool_calls import Call, parse_calls

MAX_RESULT_CHARACTERS = 32_000
"""Maximum length of the results of a turn together, so that no turn of the model exceeds what an observation
may have, which would be a fault. A result with which they are longer is replaced with an error."""
MAX_ERROR_CHARACTERS = 500
"""Length at which an error is cut."""
MAX_CALLS = 64
"""Maximum number of calls in a turn. Those after them are not made."""


@dataclass(frozen=True)
class Tool:
    """A function that the policy may call.

    Attributes:
        function: the function, which may be ``async``.
        given: arguments that the model does not give and cannot replace.
    """

    function: Callable[..., Any]
    given: Mapping[str, Any]

    @property
    def signature(self) -> inspect.Signature:
        """Return the function's signature as the model sees it."""
        signature = inspect.signature(self.function)
        parameters = [part for name, part in signature.parameters.items() if name not in self.given]
        return signature.replace(parameters=parameters)

    def schema(self) -> dict[str, Any]:
        """Return the JSON schema that transformers makes from type hints and docstring."""
        from transformers.utils import get_json_schema  # the workers do not import transformers

        def described() -> None: ...

        update_wrapper(described, self.function)
        # the model does not see these, so they may have types that JSON schemas have no word for
        described.__annotations__ = get_type_hints(self.function) | dict.fromkeys(self.given, str)
        schema = get_json_schema(described)
        parameters = schema["function"]["parameters"]
        for name in self.given:
            del parameters["properties"][name]
        if "required" in parameters:
            parameters["required"] = [name for name in parameters["required"] if name not in self.given]
        return schema


class ToolEnvironment:
    """Answer a turn's calls of tools; a turn without a call ends the episode.

    Each call has one message as its answer, ``{"role": "tool", "name": ..., "content": ...}``, in order. A
    function's result is text, or JSON if it is anything else. A malformed call, an unknown name, wrong
    arguments and an exception have an error as their result, which the model reads. A call that does not end
    is a fault of the episode, as in other environments.

    Args:
        tools: the tools by name; see ``named_tools``.
    """

    def __init__(self, tools: Mapping[str, Tool]) -> None:
        self._tools = tools

    def reset(self, prompt: Prompt) -> Observation:
        """Leave the prompt as it is."""
        return Observation()

    async def step(self, action: str) -> Observation:
        """Answer the calls in a turn, one after another."""
        calls = parse_calls(action)
        if len(calls) > MAX_CALLS:
            error = f"A turn may have {MAX_CALLS} calls; the other {len(calls) - MAX_CALLS} were not made."
            calls = [*calls[:MAX_CALLS], Call("", error=error)]
        messages: list[dict[str, str]] = []
        errors, room = 0, MAX_RESULT_CHARACTERS
        for call in calls:
            content, failed = await self._result(call, room)
            if failed:
                content = _encodable(content)[:MAX_ERROR_CHARACTERS]
            messages.append({"role": "tool", "name": _encodable(call.name), "content": content})
            errors += failed
            room = max(0, room - len(content))
        info = {"tool_calls": len(calls), "tool_errors": errors, "answered": not calls}
        return Observation(messages, done=not calls, info=info)

    async def _result(self, call: Call, room: int) -> tuple[str, bool]:
        """Return the text of a call's result, of ``room`` characters at most, and whether it is an error."""
        if call.error:
            return f"Error: {call.error}", True
        if call.name not in self._tools:
            return f"Error: no tool {call.name!r}. The tools are {', '.join(self._tools)}.", True
        tool = self._tools[call.name]
        try:
            tool.signature.bind(**call.arguments)
        except TypeError as error:
            return f"Error: {call.name}: {error}.", True
        try:
            result = tool.function(**call.arguments, **tool.given)
            if inspect.isawaitable(result):
                result = await result
            text = result if isinstance(result, str) else json.dumps(result, ensure_ascii=False, default=str)
            text.encode()  # raises an error for half of a surrogate pair
        except Exception as error:
            return f"Error: {type(error).__name__}: {one_line(error)}", True
        if len(text) > room:
            return f"Error: the result has {len(text):,} characters; the turn has room for {room:,}.", True
        return text, False


def _encodable(text: str) -> str:
    """Return ``text`` with an escape for half of a surrogate pair, which the JSON of a call can contain."""
    return text.encode(errors="backslashreplace").decode()


def named_tools(functions: Sequence[str], arguments: Mapping[str, Any]) -> dict[str, Tool]:
    """Return the tools of ``rollout.tools`` by name.

    Args:
        functions: ``module:function`` each.
        arguments: ``rollout.environment_args``; each function receives those that it has a parameter for.

    Raises:
        InputError: a function cannot be imported, two have the same name, or no function has a parameter of
            an argument's name.
    """
    tools: dict[str, Tool] = {}
    unused = set(arguments)
    for path in functions:
        function = resolve("rollout.tools", path, {})
        check_callable("rollout.tools", path, function, "give a function")
        name = getattr(function, "__name__", "")
        if not name or name in tools:
            raise InputError(
                f"rollout.tools = {path!r} has the name {name!r}: every tool needs a name of its own"
            )
        parameters = inspect.signature(function).parameters
        tools[name] = Tool(function, {key: value for key, value in arguments.items() if key in parameters})
        unused -= parameters.keys()
    if unused:
        raise InputError(
            f"rollout.environment_args.{min(unused)} is no parameter of rollout.tools = {list(functions)}: "
            "leave it out"
        )
    return tools


def tool_schemas(cfg: RolloutConfig) -> list[dict[str, Any]]:
    """Return the JSON schemas of ``rollout.tools`` for the chat template's ``tools``; none without tools.

    Raises:
        InputError: a function cannot be imported or described, or a value of ``rollout.environment_args``
            does not have the type of the parameter's annotation.
    """
    from ...config.values import check_arguments  # the workers do not import pydantic

    if not cfg.tools:
        return []  # rollout.environment_args are the environment's
    schemas = []
    for path, tool in zip(cfg.tools, named_tools(cfg.tools, cfg.environment_args).values(), strict=True):
        check_arguments("rollout.environment_args", tool.function, tool.given)
        try:
            schemas.append(tool.schema())
        except Exception as error:  # of several types, which transformers does not export together
            raise InputError(
                f"rollout.tools = {path!r} cannot be described ({one_line(error)}): give it type hints and a "
                "docstring that describes every argument under Args:"
            ) from None
    return schemas
