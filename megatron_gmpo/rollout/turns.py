"""What the chat template writes between the turns of an episode, as tokens.

A turn is never rendered or encoded again. The text between two turns is a difference: what the chat template
writes for the conversation with the new messages, after the text of the last turn.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence, Set
from typing import Any

import numpy as np

from ..batch.samples import Prompt
from ..config import DataConfig
from ..data.chat import SpecialTokens
from ..data.encoding import chat_template
from ..errors import InputError, one_line
from .environments import EnvironmentFault

Messages = Sequence[dict[str, Any]]

_OPEN, _CLOSE = "<think>", "</think>"
_TURNS = 3
"""Turns of the conversations with which a template is proven. ``following`` shows the template one turn
before its own, so the third turn proves that earlier ones make no difference."""


class TurnTemplate:
    """The tokens before the first turn of an episode, and between two turns.

    The constructor proves with sample conversations that the chat template appends: with and without
    thinking, its text of the whole equals the text joined turn by turn, to the token.

    Args:
        tokenizer: the policy's tokenizer.
        cfg: the chat template and its variables.
        section: section of ``cfg`` in the config, for error lines.
        tools: JSON schemas of the tools, which the prompts' ``input_ids`` describe.
        keep_thinking: accept a template that drops thinking from earlier turns. The turns keep it, because
            they stay as they were sampled.

    Raises:
        InputError: there is no chat template, it does not describe the tools, or it does not append the
            results of tools or, without tools, the messages of users.
    """

    def __init__(
        self,
        tokenizer: Any,
        cfg: DataConfig,
        section: str = "data",
        tools: Sequence[dict[str, Any]] = (),
        keep_thinking: bool = False,
    ) -> None:
        chat = chat_template(cfg, tokenizer, section, tools)
        if chat is None:
            raise InputError(
                "rollout.environment and rollout.tools need a chat template, which separates turns: "
                f"take a model whose tokenizer has one, and leave {section}.use_chat_template out"
            )
        self._chat, self._special = chat, SpecialTokens(tokenizer, chat.source)
        self._turn = f"turn{secrets.token_hex(16)}"  # in place of a turn's text; no environment can guess it
        task: Messages = [{"role": "user", "content": "A task."}]
        if cfg.system_prompt:
            task = [{"role": "system", "content": cfg.system_prompt}, *task]
        needed = "tool" if tools else "user"
        self._refusals = {role: self._refusal(task, role, keep_thinking) for role in ("user", "tool")}
        if reason := self._refusals[needed]:
            remedy = "correct the template in the model folder"
            if not keep_thinking and not self._refusal(task, needed, True):
                remedy = (
                    "set rollout.keep_thinking = true, with which earlier turns stay as they were sampled"
                )
            raise InputError(f"the chat template of model.path {reason}: {remedy}")
        for tool in tools:
            if (name := tool["function"]["name"]) not in chat.render(task):
                raise InputError(
                    f"the chat template of model.path does not describe tools: describe {name!r} and how to "
                    f"call it in {section}.system_prompt"
                )
        self._closing = len(self._encode(self._after(task, [])))

    def first(self, prompt: Prompt, messages: Messages) -> np.ndarray:
        """Return the (P,) int32 tokens before the first turn: the prompt, then the messages of the reset.

        Raises:
            EnvironmentFault: the chat template does not append the messages.
        """
        ids = np.asarray(prompt.input_ids, np.int32)
        if not messages:
            return ids
        assert prompt.messages, "a prompt without messages"
        try:
            before = self._chat.render(prompt.messages, answer_follows=False)
            answer = self._encode(self._chat.render(prompt.messages)[len(before) :])
            whole = self._chat.render([*prompt.messages, *self._special.mark(list(messages))])
            new = self._encode(whole[len(before) :])
        except Exception as error:  # a template can raise any error
            raise EnvironmentFault(f"the chat template refuses reset's messages: {one_line(error)}") from None
        if not whole.startswith(before):
            raise EnvironmentFault("the chat template does not append reset's messages to the prompt")
        kept, end = np.split(ids, [len(ids) - len(answer)])
        if not np.array_equal(end, answer):
            raise EnvironmentFault(
                "the tokens with which the chat template opens a turn depend on the prompt's text: return no "
                "messages from reset"
            )
        return np.concatenate([kept, new])

    def following(
        self,
        start: Messages,
        previous: Messages,
        sampled: np.ndarray,
        messages: Messages,
        end_ids: Set[int],
    ) -> np.ndarray:
        """Return the int32 tokens between a turn and the next one.

        A turn that ended with an end token keeps it in the place of the template's. The time does not grow
        with the number of turns.

        Args:
            start: the messages before the first turn.
            previous: the messages of the turn before this one, the policy's and its observation, if any.
            sampled: the turn's tokens, at least one.
            messages: the observation, at least one message.
            end_ids: the end tokens.

        Raises:
            EnvironmentFault: the chat template does not append the messages.
        """
        for message in messages:
            if reason := self._refusals.get(message["role"], "is proven for the roles user and tool alone"):
                raise EnvironmentFault(
                    f"a message has the role {message['role']!r}; the chat template {reason}"
                )
        try:
            ids = self._encode(self._after([*start, *previous], messages))
        except Exception as error:  # a template can raise any error
            raise EnvironmentFault(f"the chat template refuses step's messages: {one_line(error)}") from None
        if sampled[-1] in end_ids:
            # the first token of a user's message ends the turn where a template closes no turn (GLM-4)
            ends = np.flatnonzero(np.isin(ids[: self._closing or 1], list(end_ids)))
            ids = ids[ends[0] + 1 :] if len(ends) else ids
        return ids

    def _after(self, history: Messages, messages: Messages) -> str:
        """Return the template's text after the turn between ``history`` and ``messages``."""
        turn = {"role": "assistant", "content": self._turn}
        rendered = self._chat.render(
            [*history, turn, *self._special.mark(list(messages))], answer_follows=bool(messages)
        )
        _, found, after = rendered.partition(self._turn)
        if not found:
            raise ValueError("it leaves out the text of a turn")
        return after

    def _encode(self, text: str) -> np.ndarray:
        return np.array(self._special.encode(text), np.int32)

    def _refusal(self, task: Messages, role: str, keep_thinking: bool) -> str:
        """Return why the template cannot append messages of ``role``; empty if it can."""
        for thinks in (False, True):
            # templates read thinking from the content, or from a field of its own
            reasons = [self._difference(task, role, keep_thinking, thinks, apart) for apart in (False, True)]
            if all(reasons):
                return reasons[0]
        return ""

    def _difference(self, task: Messages, role: str, keep_thinking: bool, thinks: bool, apart: bool) -> str:
        """Return how a sample conversation differs from the one that is joined turn by turn."""
        same = _without_thinking if keep_thinking else str
        try:
            messages, joined = list(task), self._chat.render(task)
            previous: Messages = []
            for number in range(_TURNS):
                text, turn = _sample_turn(joined, f"Turn {number}.", thinks, apart)
                result = {"role": role, "content": f"Result {number}.\nTry again."}
                observation = [result] * (2 if role == "tool" and number else 1)
                after = self._after([*task, *previous], observation)
                joined += text + after
                previous = [turn, *observation]
                messages += previous
                whole = self._chat.render(messages)
                if same(whole) != same(joined):
                    pairs = enumerate(zip(whole, joined, strict=False))
                    at = next((i for i, (one, other) in pairs if one != other), 0)
                    return (
                        f"writes {whole[at : at + 30]!r} where the conversation joined turn by turn has "
                        f"{joined[at : at + 30]!r}"
                    )
                ids = self._encode(after)
                if not len(ids) or not np.array_equal(ids, self._encode(joined)[-len(ids) :]):
                    return f"separates turns by {after[:30]!r}, whose tokens depend on the text before it"
        except Exception as error:  # a template can raise any error
            return f"refuses messages of the role {role!r} ({one_line(error)})"
        return ""


def _sample_turn(before: str, answer: str, thinks: bool, apart: bool) -> tuple[str, dict[str, str]]:
    """Return the text of a turn after ``before``, and its message, which has the thinking in it or apart."""
    opened, closed = (before.rstrip().endswith(tag) for tag in (_OPEN, _CLOSE))
    if closed or not (thinks or opened):
        return answer, {"role": "assistant", "content": answer}
    text = f"A thought.\n{_CLOSE}\n\n{answer}" if opened else f"{_OPEN}\nA thought.\n{_CLOSE}\n\n{answer}"
    if apart:
        return text, {"role": "assistant", "content": answer, "reasoning_content": "A thought."}
    return text, {"role": "assistant", "content": text}


def _without_thinking(text: str) -> str:
    """Return ``text`` without closed thinking blocks and whitespace."""
    return re.sub(rf"{_OPEN}.*?{_CLOSE}|\s", "", text, flags=re.DOTALL)
