"""Calls of tools in the text of a turn.

Three forms are understood, each wherever it appears, because their marks do not occur in one another and a
model uses the form that it has learned, whatever its chat template says:

- Qwen and Hermes: ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``.
- Llama 3: the turn is one JSON object or several, ``{"name": ..., "parameters": {...}}``, separated by ``;``,
  with or without ``<|python_tag|>`` before them.
- DeepSeek: a call between ``<｜tool▁call▁begin｜>`` and ``<｜tool▁call▁end｜>``, with the name before its
  arguments. V3 and R1 write ``function<｜tool▁sep｜>name`` and the arguments in a block of code; V3.1 writes
  ``name<｜tool▁sep｜>`` and the arguments.

Reasoning up to the last ``</think>`` is ignored.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

_HERMES = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
_DEEPSEEK = re.compile(r"<｜tool▁call▁begin｜>(.*?)(?:<｜tool▁call▁end｜>|\Z)", re.DOTALL)
_SEPARATOR = "<｜tool▁sep｜>"
_CODE_BLOCK = re.compile(r"```(?:json)?\n(.*)```", re.DOTALL)
_LLAMA = "<|python_tag|>"
_BETWEEN = re.compile(r"[;\s]*")


@dataclass(frozen=True)
class Call:
    """A call that a turn contains.

    Attributes:
        name: name of the function; "" if it cannot be read.
        arguments: its arguments by name.
        error: why the call is malformed, as a sentence for the model; "" if it is not.
    """

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    error: str = ""


def parse_calls(text: str) -> list[Call]:
    """Return the calls in a turn's text, in order, malformed ones included; none if the turn calls no tool.

    Args:
        text: the turn with its special tokens, without the end token.
    """
    text = text.rpartition("</think>")[2].strip()
    if calls := [_from_json(body) for body in _HERMES.findall(text)]:
        return calls
    if calls := [_deepseek(body) for body in _DEEPSEEK.findall(text)]:
        return calls
    if _LLAMA in text:
        return _llama(text.partition(_LLAMA)[2])
    keys = '"name"' in text and ('"parameters"' in text or '"arguments"' in text)
    return _llama(text) if text.startswith("{") and keys else []


def _llama(text: str) -> list[Call]:
    calls, start = [], _end(_BETWEEN, text, 0)
    while start < len(text):
        try:
            value, end = json.JSONDecoder().raw_decode(text, start)
        except (ValueError, RecursionError):
            return [*calls, _from_json(text[start:])]
        calls.append(_call(value))
        start = _end(_BETWEEN, text, end)
    return calls or [_from_json(text)]


def _end(pattern: re.Pattern[str], text: str, start: int) -> int:
    found = pattern.match(text, start)
    return found.end() if found else start


def _deepseek(body: str) -> Call:
    head, separator, rest = body.partition(_SEPARATOR)
    if not separator:
        return Call("", error=f"The call has no {_SEPARATOR} after its name.")
    name = head.strip()
    if name == "function":
        name, _, rest = rest.partition("\n")
    block = _CODE_BLOCK.search(rest)
    return _from_json(block[1] if block else rest, name.strip())


def _from_json(text: str, name: str | None = None) -> Call:
    """Return the call of a JSON object, or of a name and the JSON object of its arguments."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        return Call(name or "", error=f"The call is not valid JSON: {reason}.")
    return _call(value if name is None else {"name": name, "arguments": value})


def _call(value: Any) -> Call:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return Call("", error='The call is not a JSON object with the text "name".')
    arguments = value.get("arguments", value.get("parameters", {}))
    if not isinstance(arguments, dict):
        return Call(value["name"], error="The arguments are not a JSON object.")
    return Call(value["name"], arguments)
