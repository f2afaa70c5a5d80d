"""What the chat template writes between the turns of an episode, as tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..batch.samples import Prompt
from ..config import DataConfig


class TurnTemplate:
    """The tokens before the first turn of an episode, and between two turns.

    Args:
        tokenizer: the policy's tokenizer.
        cfg: the chat template and its variables.
        section: section of ``cfg`` in the config, for error lines.
        tools: JSON schemas of the tools, which the prompts' ``input_ids`` describe.
        keep_thinking: keep the thinking blocks that the template drops from earlier turns.

    Raises:
        InputError: there is no chat template, or it does not keep earlier turns as they were sampled.
    """

    def __init__(
        self,
        tokenizer: Any,
        cfg: DataConfig,
        section: str = "data",
        tools: Sequence[dict[str, Any]] = (),
        keep_thinking: bool = False,
    ) -> None:
        raise NotImplementedError

    def first(self, prompt: Prompt, messages: Sequence[dict[str, Any]]) -> np.ndarray:
        """Return the (P,) int32 tokens before the first turn: the prompt, then ``messages`` of the reset."""
        raise NotImplementedError

    def following(self, sampled: np.ndarray, messages: Sequence[dict[str, Any]]) -> np.ndarray:
        """Return the int32 tokens between a turn and the next one.

        Args:
            sampled: the turn's tokens. What it sampled of the template's closing tokens is not repeated.
            messages: the observation, at least one message.
        """
        raise NotImplementedError
