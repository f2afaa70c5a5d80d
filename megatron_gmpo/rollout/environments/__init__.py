"""Environments: what answers the policy's turns. docs/agents.md shows how to write one.

An episode alternates turns, which the policy samples, and observations, which the environment returns. Each
live episode has a worker process of its own; see ``pool``.
"""

from __future__ import annotations

import base64
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any, Protocol

import numpy as np

from ...batch.samples import Prompt

_KNOWN_INFO = {"name": str, "success": bool, "tool_calls": int, "tool_errors": int, "answered": bool}

ENVIRONMENTS: dict[str, str] = {
    "alfworld": "megatron_gmpo.rollout.environments.games:ALFWorld",
    "household": "megatron_gmpo.rollout.environments.household:Household",
    "textworld": "megatron_gmpo.rollout.environments.games:TextWorld",
}
"""Built-in environments: name -> ``module:Class``, which only the workers import."""


@dataclass(frozen=True)
class Observation:
    """The answer of an environment to one turn.

    Attributes:
        messages: chat messages that the policy reads next, each with the texts ``role`` and ``content``. What
            ``reset`` returns follows the prompt's messages; without any, the prompt stays as it is. For a
            vision-language model the content may also be a list of ``text_part`` and ``image_part``.
        reward: reward of the step; the reward of an episode is the sum.
        done: whether the episode is over.
        info: values that JSON can hold. These are read, others are ignored: ``name`` (text) splits metrics by
            kind of task; ``success`` (bool) says whether the episode has reached its goal so far;
            ``tool_calls`` and ``tool_errors`` (int) are added up. ``answered`` (bool) says that the episode
            is done because the turn was the policy's final answer: if a limit has cut that turn, the episode
            counts as cut.

    Raises:
        ValueError: a value does not have its type, the reward is not finite, or a count is negative or does
            not fit 31 bits.
    """

    messages: Sequence[dict[str, Any]] = ()
    reward: float = 0.0
    done: bool = False
    info: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for message in self.messages:
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                raise ValueError(f"message {message!r} has no texts 'role' and 'content'")
            content = message.get("content")
            for text in map(_checked, content) if isinstance(content, list) else [content]:
                if not isinstance(text, str):
                    raise ValueError(f"message {message!r} has no texts 'role' and 'content'")
                text.encode()  # no half of a surrogate pair, which no tokenizer can encode
        if not isfinite(self.reward):
            raise ValueError(f"reward = {self.reward!r} is not finite")
        if not isinstance(self.done, bool | np.bool_):
            raise ValueError(f"done = {self.done!r} is neither True nor False")
        if not isinstance(self.info, dict):
            raise ValueError(f"info = {self.info!r} is no dict")
        for key, kind in _KNOWN_INFO.items():
            value = self.info.get(key)
            plain = value.item() if isinstance(value, np.generic) else value
            if key in self.info and type(plain) is not kind:
                raise ValueError(f"info[{key!r}] = {self.info[key]!r} is no {kind.__name__}")
            if kind is int and not 0 <= (plain or 0) < 2**31:
                raise ValueError(f"info[{key!r}] = {self.info[key]!r} is not from 0 to 2^31 - 1")

    @classmethod
    def text(cls, content: str, **others: Any) -> Observation:
        """Return an observation of one user message; ``others`` are the other fields."""
        return cls([{"role": "user", "content": content}], **others)


def text_part(text: str) -> dict[str, str]:
    """Return a part of a message's content."""
    return {"type": "text", "text": text}


def image_part(data: bytes) -> dict[str, str]:
    """Return a part of a message's content that shows an encoded image, such as the bytes of a PNG file."""
    return {"type": "image", "image": base64.b64encode(data).decode()}


def _checked(part: Any) -> str:
    """Return the text or the encoded image of a content part."""
    for kind in ("text", "image"):
        if isinstance(part, dict) and part.get("type") == kind and isinstance(part.get(kind), str):
            return part[kind]
    raise ValueError("a content part is neither a text_part nor an image_part")


class Environment(Protocol):
    """A task of several turns. Its class is made for every episode, in a worker process.

    The class receives ``rollout.environment_args`` as keyword arguments, and ``seed`` (int, 32 bits) if it
    takes one. The seed depends on ``seed`` of the run, the prompt, the number of the sample and the draw, so
    that a resumed run plays the same episodes. The global generators of Python and numpy have it too. Both
    methods may be ``async``. A method ``close``, if there is one, is called when the episode has ended.
    """

    def reset(self, prompt: Prompt) -> Observation | Awaitable[Observation]:
        """Start the episode of a prompt, which comes without its token ids."""
        ...

    def step(self, action: str) -> Observation | Awaitable[Observation]:
        """Answer a turn. ``action`` is its text with special tokens, without end token and stop string."""
        ...


class EnvironmentFault(Exception):  # noqa: N818
    """An environment raised an error, hung, exited, or returned nonsense or too much; in one line."""
