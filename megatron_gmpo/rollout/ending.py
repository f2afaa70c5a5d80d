"""Where a response ends, and its text: the rule of every engine."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Ending:
    """The rule by which a response ends: at its first end token or its first stop string.

    The response includes the end token, or the token that completes the stop string. A stop string may be
    split into tokens in any way, and may contain special tokens.

    Attributes:
        tokenizer: the model's tokenizer.
        end_ids: the end tokens.
        stop: the stop strings.
    """

    tokenizer: Any
    end_ids: Set[int]
    stop: tuple[str, ...] = ()

    @property
    def window(self) -> int:
        """Return a number of tokens that is enough to contain any stop string that the last one completes."""
        # a token decodes to at least one byte; some tokenizers strip a space from the first token
        return 1 + max(len(string.encode()) for string in self.stop)

    def length(self, tokens: np.ndarray) -> int | None:
        """Return how many of (T,) ``tokens`` make the response; None if they do not end it."""
        ends = np.flatnonzero(np.isin(tokens, list(self.end_ids)))
        length = int(ends[0]) + 1 if len(ends) else None
        stopped = self._stops_at(tokens[:length]) if self.stop else None
        return length if stopped is None else stopped

    def text(self, response: np.ndarray) -> str:
        """Return the text of (R,) tokens for the reward.

        It has no end token and no special tokens, and ends before the first stop string.
        """
        # a memoryview, unlike an array, becomes no list of Python integers (transformers' to_py_obj)
        content = (response[:-1] if response[-1] in self.end_ids else response).data
        text: str = self.tokenizer.decode(content, skip_special_tokens=True)
        if not self.stop:
            return text
        whole: str = self.tokenizer.decode(content)
        start = min((whole.find(string) for string in self.stop if string in whole), default=len(whole))
        rest = whole[start:]
        for token in self.tokenizer.added_tokens_decoder.values():
            if token.special:
                rest = rest.replace(token.content, "")
        return text[: len(text) - len(rest)]

    def action(self, turn: np.ndarray) -> str:
        """Return the text of a turn's (R,) tokens for the environment: ``text`` with its special tokens.

        The marks of tool calls are special tokens of some tokenizers.
        """
        whole: str = self.tokenizer.decode((turn[:-1] if turn[-1] in self.end_ids else turn).data)
        return whole[: min((whole.find(string) for string in self.stop if string in whole), default=None)]

    def _stops_at(self, tokens: np.ndarray) -> int | None:
        """Return how many tokens complete the first stop string; None if there is none."""

        def completed(low: int, high: int) -> bool:
            text = self.tokenizer.decode(tokens[max(0, low - self.window) : high].data)
            return any(string in text for string in self.stop)

        # tokens[:high] contain a stop string, tokens[:low] do not; each turn decodes half as many tokens
        low, high = 0, len(tokens)
        if not completed(low, high):
            return None
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if completed(low, middle) else (middle, high)
        return high


def end_token_ids(config: Any, generation_config: Any, tokenizer: Any) -> set[int]:
    """Return the tokens that end a response: those of the model's two configs and of the tokenizer.

    SGLang also reads all three (``ModelConfig._get_hf_eos_token_id``, ``Req._check_token_based_finish``), and
    a request cannot change that.
    """
    listed = [getattr(config, "eos_token_id", None), generation_config.eos_token_id, tokenizer.eos_token_id]
    return {i for ids in listed for i in (ids if isinstance(ids, list) else [ids])} - {None}
