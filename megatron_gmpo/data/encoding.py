"""Turn problems into prompts: template, chat template and tokenizer."""

from __future__ import annotations

import inspect
import logging
import re
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from string import Formatter
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from ..batch.samples import Prompt
from ..config import DataConfig
from ..errors import InputError
from .chat import PLACE, ChatTemplate, SpecialTokens, content_parts, is_message
from .rows import LONE_SURROGATE, Row

if TYPE_CHECKING:
    from .images import ModelImages

logger = logging.getLogger(__name__)

RENDER_LIMIT_S = 10.0
"""CPU time that a chat template may take for one prompt."""

_ANSWERING_ROLES = ("assistant", "model", "gpt", "bot")
_PARAMETERS = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
_TAKEN = set(_PARAMETERS) - {"tools", "documents"}
"""Parameters of ``apply_chat_template`` that are no variables of a template."""


@dataclass
class _Draft:
    """A prompt before the tokenizer, and whether the text of special tokens is marked in ``rendered``."""

    prompt: Prompt
    where: str
    rendered: str
    marked: bool


class PromptEncoder:
    """Encodes rows with the templates of a config and a tokenizer.

    Args:
        cfg: the templates. ``use_chat_template = None`` uses the tokenizer's chat template if it has one.
        tokenizer: the policy's tokenizer.
        section: section of ``cfg`` in the config, for error lines.
        tools: JSON schemas of tools, which the chat template describes to the model.
        images: the image processor of a vision-language model.

    Attributes:
        marked: number of prompts in which the text of special tokens was encoded as text.

    Raises:
        InputError: a template is invalid, or the tokenizer lacks the chat template that a setting needs.
    """

    def __init__(
        self,
        cfg: DataConfig,
        tokenizer: Any,
        section: str,
        tools: Sequence[dict[str, Any]] = (),
        images: ModelImages | None = None,
    ) -> None:
        self._cfg, self._tokenizer, self._section, self._images = cfg, tokenizer, section, images
        self._chat = chat_template(cfg, tokenizer, section, tools)
        _check_template(cfg.template, section)
        if cfg.image_column and not self._chat:
            raise InputError(
                f"{section}.image_column = {cfg.image_column!r} needs a chat template, which writes the "
                "tokens around an image: leave use_chat_template out, and use the tokenizer of the model"
            )
        self._special = SpecialTokens(tokenizer, self._chat.source if self._chat else cfg.template)
        self._prefix: list[int] | None = None
        self.marked = 0

    def encode(self, rows: Sequence[Row]) -> list[Prompt]:
        """Return the prompts of ``rows`` with ``input_ids``.

        With a chat template ``messages`` is set, without a chat template ``text``. The tokenizer's own end of
        sequence is left out, because the response follows.

        Raises:
            InputError: a problem has the wrong type; a template or the tokenizer refuses it or leaves it out.
        """
        with _cpu_time_limit() as restart:
            drafts = []
            for row in rows:
                restart()
                drafts.append(self._draft(row))
        self.marked += sum(draft.marked for draft in drafts)
        plain = iter(self._token_ids([draft for draft in drafts if not draft.marked]))
        prefix = [] if self._chat else self._start_of_sequence(drafts[0])
        for draft in drafts:
            ids = self._marked_ids(draft) if draft.marked else next(plain)
            if not ids:
                raise InputError(f"{draft.where}: the tokenizer gives no tokens: leave the row out")
            draft.prompt.input_ids = prefix + ids
        if self._images:
            self._add_images(self._images, rows, drafts)
        return [draft.prompt for draft in drafts]

    def _add_images(self, images: ModelImages, rows: Sequence[Row], drafts: Sequence[_Draft]) -> None:
        """Load the images of the prompts, and repeat each image token for the tokens of its image."""
        loaded = iter(images.load([(row.where, source) for row in rows for source in row.images]))
        for row, draft in zip(rows, drafts, strict=True):
            prompt = draft.prompt
            prompt.images = tuple(islice(loaded, len(row.images)))
            places = prompt.input_ids.count(images.image_token)
            if places != len(prompt.images):
                raise InputError(
                    f"{draft.where}: the prompt has {places} image tokens for {len(prompt.images)} images: "
                    "use the chat template of the model, and special_tokens = 'text'"
                )
            sizes = iter([images.tokens(image.ref) for image in prompt.images])
            prompt.input_ids = [
                token
                for id in prompt.input_ids
                for token in ([id] * next(sizes) if id == images.image_token else [id])
            ]

    def _draft(self, row: Row) -> _Draft:
        problem = row.problem
        marks = self._cfg.special_tokens == "text"
        marked = self._special.mark(problem) if marks else problem
        prompt = Prompt(id=row.id, answer=row.answer, labels=row.labels)
        if self._chat:
            prompt.messages = self._messages(problem, row)
            rendered = self._render(self._chat, self._messages(marked, row), row.where)
        elif isinstance(problem, str) and problem.strip():
            prompt.text, rendered = self._fill(problem), self._fill(marked)
        else:
            raise InputError(
                f"{row.where}: column {self._cfg.prompt_column!r} is not text, "
                "and only a chat template takes messages"
            )
        if LONE_SURROGATE.search(rendered):
            raise InputError(f"{row.where}: the text has a lone surrogate, half of a character: correct it")
        return _Draft(prompt, row.where, rendered, marked != problem)

    def _fill(self, problem: str) -> str:
        return self._cfg.template.format(prompt=problem) if self._cfg.template else problem

    def _messages(self, problem: Any, row: Row) -> list[dict[str, Any]]:
        cfg, where, images = self._cfg, row.where, bool(self._cfg.image_column)
        if isinstance(problem, str) and problem.strip():
            messages = [{"role": "user", "content": self._fill(problem)}]
        elif isinstance(problem, list) and problem and all(is_message(m, images) for m in problem):
            if cfg.template:
                raise InputError(
                    f"{where}: column {cfg.prompt_column!r} holds messages: "
                    "leave template out, it applies to text"
                )
            messages = [{"role": message["role"], "content": message["content"]} for message in problem]
        else:
            raise InputError(
                f"{where}: column {cfg.prompt_column!r} is neither text nor a list of messages: "
                "give messages with role and content, both text"
                + (", or content parts of text and images" if images else "")
            )
        if messages[-1]["role"].lower() in _ANSWERING_ROLES:
            raise InputError(
                f"{where}: the messages end with a turn of {messages[-1]['role']!r}, which would be part of "
                "the prompt: end them before the answer"
            )
        if cfg.system_prompt:
            if messages[0]["role"] == "system":
                raise InputError(
                    f"{where}: the messages have a system message already: leave system_prompt out"
                )
            messages.insert(0, {"role": "system", "content": cfg.system_prompt})
        return self._with_places(messages, row) if images else messages

    def _with_places(self, messages: list[dict[str, Any]], row: Row) -> list[dict[str, Any]]:
        """Return messages in which content parts mark the places of the row's images."""
        parts = [content_parts(message["content"]) for message in messages]
        places = sum(content.count({"type": "image"}) for content in parts)
        if places != len(row.images):
            raise InputError(
                f"{row.where}: the prompt has places for {places} images, and column "
                f"{self._cfg.image_column!r} has {len(row.images)}: mark the place of each image by {PLACE} "
                "in the text, or by an image part"
            )
        return [
            message | {"content": content} if {"type": "image"} in content else message
            for message, content in zip(messages, parts, strict=True)
        ]

    def _render(self, chat: ChatTemplate, messages: list[dict[str, Any]], where: str) -> str:
        try:
            text = chat.render(messages)
        except Exception as error:  # a template can raise any error
            raise InputError(f"{where}: the tokenizer's chat template fails: {_one_line(error)}") from None
        content = messages[-1]["content"]
        texts = [content] if isinstance(content, str) else [part.get("text", "") for part in content]
        if any(part.strip() not in text for part in texts):
            raise InputError(
                f"{where}: the tokenizer's chat template leaves out the text of the last message: "
                f"set {self._section}.use_chat_template = false and give {self._section}.template"
            )
        return text

    def _token_ids(self, drafts: Sequence[_Draft]) -> list[list[int]]:
        """Return the token ids of rendered texts, without a start or end of the sequence."""
        if not drafts:
            return []
        texts = [draft.rendered for draft in drafts]
        try:
            ids = self._tokenizer(texts, add_special_tokens=False)["input_ids"]
        except Exception as error:
            if len(drafts) > 1:  # find the row
                return [ids for draft in drafts for ids in self._token_ids([draft])]
            raise InputError(f"{drafts[0].where}: the tokenizer fails: {_one_line(error)}") from None
        return ids

    def _marked_ids(self, draft: _Draft) -> list[int]:
        try:
            return self._special.encode(draft.rendered)
        except Exception as error:
            raise InputError(
                f"{draft.where}: the tokenizer cannot encode its special tokens as text "
                f"({_one_line(error)}): leave the row out, or set {self._section}.special_tokens = 'token'"
            ) from None

    def _start_of_sequence(self, draft: _Draft) -> list[int]:
        """Return the token ids that the tokenizer puts before a text. What it puts after it is left out."""
        if self._prefix is None:
            text = draft.prompt.text or ""
            bare = self._tokenizer(text, add_special_tokens=False)["input_ids"]
            whole = self._tokenizer(text)["input_ids"]
            added = range(len(whole) - len(bare) + 1)
            start = next((i for i in added if whole[i : i + len(bare)] == bare), 0)
            self._prefix = list(whole[:start])
        return self._prefix


def _check_template(template: str, section: str) -> None:
    if not template:
        return
    field = f"{section}.template = {template!r}"
    try:
        fields = [part[1:] for part in Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        raise InputError(
            f"{field} is not a format string ({error}): write literal braces as {{{{ and }}}}"
        ) from None
    names = {str(name) for name, _, _ in fields}
    if names != {"prompt"}:
        raise InputError(
            f"{field} must have the field {{prompt}} and no other, has {sorted(names)}: "
            "write literal braces as {{ and }}"
        )
    if any(spec or conversion for _, spec, conversion in fields):
        raise InputError(f"{field} formats its field: write {{prompt}} without ':' and '!'")


def chat_template(
    cfg: DataConfig, tokenizer: Any, section: str, tools: Sequence[dict[str, Any]] = ()
) -> ChatTemplate | None:
    """Return the chat template to apply, or None.

    Raises:
        InputError: a setting needs a chat template that the tokenizer lacks, or is no variable of it.
    """
    has_one = bool(tokenizer.chat_template)
    chat = has_one if cfg.use_chat_template is None else cfg.use_chat_template
    if chat and not has_one:
        raise InputError(
            f"{section}.use_chat_template = true: the tokenizer has no chat template, "
            "leave the field out or set it to false"
        )
    if not chat:
        for field, value in (
            ("system_prompt", cfg.system_prompt),
            ("chat_template_kwargs", cfg.chat_template_kwargs),
        ):
            if value:
                raise InputError(
                    f"{section}.{field} = {value!r} needs a chat template: put it into {section}.template"
                )
        return None
    field, variables = f"{section}.chat_template_kwargs", cfg.chat_template_kwargs
    templates = tokenizer.chat_template
    if isinstance(templates, str):
        templates = {"default": templates}
    name = variables.get("chat_template", "default")
    if name not in templates:
        raise InputError(
            f"{field}.chat_template = {name!r} is not one of the tokenizer's chat templates "
            f"{sorted(templates)}: choose one of them"
        )
    for variable in variables:
        used = re.search(rf"\b{re.escape(variable)}\b", templates[name])
        if variable != "chat_template" and (variable in _TAKEN or not used):
            raise InputError(f"{field}.{variable} is no variable of the chat template: leave it out")
    return ChatTemplate(tokenizer, templates[name], variables, tools)


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


@contextmanager
def _cpu_time_limit() -> Iterator[Any]:
    """Give a function that raises TimeoutError ``RENDER_LIMIT_S`` of CPU time after its last call.

    A loop in a template is Python code, which a signal interrupts. CPU time does not run while a loaded
    machine keeps the process waiting.
    """

    def expired(*_: object) -> None:
        raise TimeoutError(f"it took more than {RENDER_LIMIT_S:g} s of CPU time")

    before = signal.signal(signal.SIGVTALRM, expired)
    try:
        yield lambda: signal.setitimer(signal.ITIMER_VIRTUAL, RENDER_LIMIT_S)
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
