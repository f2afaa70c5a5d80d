"""Chat messages with places for images, chat templates, and special tokens whose text is only text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers.utils.chat_template_utils import encode_marked_chat, mark_control_tokens

PLACE = "<image>"
"""Text that marks the place of an image, as in data sets of the hub."""


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template with its variables.

    Attributes:
        tokenizer: renders the template and encodes its text.
        source: the template.
        variables: values of the template's variables.
        tools: JSON schemas of tools that the template describes to the model.
    """

    tokenizer: Any
    source: str
    variables: dict[str, Any] = field(default_factory=dict)
    tools: Sequence[dict[str, Any]] = ()

    def render(self, messages: Sequence[dict[str, Any]], *, answer_follows: bool = True) -> str:
        """Return the text of a conversation. A template can raise any error.

        Args:
            answer_follows: end the text where the model's next turn starts.
        """
        others: dict[str, Any] = self.variables | {"chat_template": self.source}
        if self.tools:  # an empty list would announce tools in Llama's template
            others["tools"] = list(self.tools)
        return self.tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=answer_follows, **others
        )


class SpecialTokens:
    """The tokens with which text could forge a turn, and their text as text.

    These are the tokenizer's special tokens, and the added tokens that the template writes, as in
    transformers' ``sanitize_control_tokens``. DeepSeek does not mark ``<|User|>`` as special, for example.

    Args:
        template: source of the chat template, or the format string of prompts.
    """

    def __init__(self, tokenizer: Any, template: str) -> None:
        self._tokenizer = tokenizer
        named = tokenizer.all_special_tokens  # slow tokenizers do not mark all of them as special
        added = tokenizer.added_tokens_decoder.values()
        tokens = {token.content for token in added if token.special or token.content in template}
        tokens = [token for token in tokens.union(named) if not token.isspace()]
        longest_first = sorted(tokens, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def mark(self, content: Any) -> Any:
        """Return text, or messages, in which the text of special tokens is marked as text."""
        return mark_control_tokens(content, self._pattern)

    def encode(self, rendered: str) -> list[int]:
        """Return the token ids of text with marks, without a start or end of the sequence.

        Raises:
            ValueError: the tokenizer makes a special token of its text although it is marked.
        """
        return encode_marked_chat(self._tokenizer, rendered)


def is_message(message: Any, images: bool) -> bool:
    """Return whether a value is a message: a role, and a text, or content parts if there can be images."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        return False
    content = message.get("content")
    if isinstance(content, list) and images:
        return bool(content) and all(map(_is_part, content))
    return isinstance(content, str)


def _is_part(part: Any) -> bool:
    """Return whether a content part is a text, or the place of an image, and has no other values."""
    if not isinstance(part, dict):
        return False
    values = {name: value for name, value in part.items() if value is not None}  # Arrow rows have all fields
    is_text = values.get("type") == "text" and isinstance(values.get("text"), str)
    return values == {"type": "image"} or (is_text and len(values) == 2)


def content_parts(content: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return content parts in which image parts replace ``PLACE``, without empty texts."""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    found: list[dict[str, Any]] = []
    for part in parts:
        if part["type"] == "image":
            found.append({"type": "image"})
            continue
        for number, text in enumerate(part["text"].split(PLACE)):
            found += [{"type": "image"}] if number else []
            found += [{"type": "text", "text": text}] if text else []
    return found
