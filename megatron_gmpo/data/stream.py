"""An endless, resumable stream of prompts that recognizes its data set."""

from __future__ import annotations

import random
from array import array
from functools import cached_property
from hashlib import blake2b
from typing import Any

from pydantic import Field, model_validator

from ..batch.samples import Prompt
from ..config.saved import SavedState
from ..errors import InputError

_DIGEST = 16
"""Bytes of a hash."""


class Fingerprint(SavedState):
    """Hashes of a data set. They tell what has changed, not where."""

    prompts: str
    """Hash of all token ids, in the order of the data set."""
    answers: str
    """Hash of all answers, in the order of the data set."""
    any_order: str
    """Hash of all pairs of prompt and answer, in sorted order."""


class StreamState(SavedState):
    """Position of a stream, as a checkpoint holds it."""

    seed: int
    epoch: int = Field(ge=0)
    position: int = Field(ge=0)
    """Prompts drawn in this epoch."""
    num_prompts: int = Field(ge=1)
    shuffle: bool | None = None
    fingerprint: Fingerprint | None = None
    """None in checkpoints of versions before this field."""

    @model_validator(mode="after")
    def _position_is_in_the_data(self) -> StreamState:
        if self.position > self.num_prompts:
            raise ValueError(f"position = {self.position} is beyond the {self.num_prompts} prompts")
        return self


class PromptStream:
    """An endless stream of prompts, reshuffled every epoch. The order depends only on ``seed`` and the epoch.

    Args:
        prompts: the prompts of an epoch, at least one.
        seed: seed of the order.
        shuffle: False keeps the order of the data set in every epoch.
    """

    def __init__(self, prompts: list[Prompt], seed: int, shuffle: bool) -> None:
        assert prompts
        self.prompts = prompts
        self.seed = seed
        self.shuffle = shuffle
        self._start_epoch(0)

    def __len__(self) -> int:
        """Return the number of prompts of an epoch."""
        return len(self.prompts)

    def next(self, n: int) -> list[Prompt]:
        """Return the next ``n`` prompts, which may come from several epochs."""
        taken: list[Prompt] = []
        while len(taken) < n:
            if self.position == len(self.order):
                self._start_epoch(self.epoch + 1)
            part = self.order[self.position : self.position + n - len(taken)]
            self.position += len(part)
            taken += [self.prompts[index] for index in part]
        return taken

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the stream and the fingerprint of its data, ready for JSON."""
        return StreamState(
            seed=self.seed,
            epoch=self.epoch,
            position=self.position,
            num_prompts=len(self.prompts),
            shuffle=self.shuffle,
            fingerprint=self._fingerprint,
        ).model_dump()

    def load_state_dict(self, saved: StreamState, *, allow_changed: bool = False) -> str:
        """Restore a position and its seed.

        Args:
            allow_changed: accept another data set. If it has another number of prompts, the stream starts the
                epoch after the saved one.

        Returns:
            One line that states the change of the data set; "" if nothing has changed.

        Raises:
            InputError: the state belongs to another data set.
        """
        changed = self._difference(saved)
        if changed and not allow_changed:
            raise InputError(
                f"{changed}: resume with the data and settings of the checkpoint, "
                "or set data.allow_changed = true"
            )
        self.seed = saved.seed
        if saved.num_prompts == len(self.prompts):
            self._start_epoch(saved.epoch)
            self.position = saved.position
        else:
            self._start_epoch(saved.epoch + 1)
        return changed

    def _difference(self, saved: StreamState) -> str:
        """Describe what distinguishes this data set from that of ``saved``, in a few words."""
        now, then = self._fingerprint, saved.fingerprint
        if saved.num_prompts != len(self.prompts):
            return f"data has {len(self.prompts)} prompts, the checkpoint's data had {saved.num_prompts}"
        if saved.shuffle not in (None, self.shuffle):
            return f"data.shuffle = {str(self.shuffle).lower()}, the checkpoint was written with the opposite"
        if then is None or then == now:
            return ""
        if then.any_order == now.any_order:
            return "data has the checkpoint's prompts and answers in another order"
        if then.prompts == now.prompts:
            return "data has the checkpoint's prompts with other answers"
        if then.answers == now.answers:
            return "data has the checkpoint's answers, but other prompts (texts, templates or tokenizer)"
        return "data has other prompts and other answers than the checkpoint's data"

    @cached_property
    def _fingerprint(self) -> Fingerprint:
        # 5 us for a prompt of 150 tokens; the tokenizer takes 100 us and more
        prompts = [_hash(array("i", prompt.input_ids).tobytes()) for prompt in self.prompts]
        answers = [_hash(prompt.answer.encode()) for prompt in self.prompts]
        pairs = sorted(map(bytes.__add__, prompts, answers))
        return Fingerprint(
            prompts=_hash(b"".join(prompts)).hex(),
            answers=_hash(b"".join(answers)).hex(),
            any_order=_hash(b"".join(pairs)).hex(),
        )

    def _start_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self.position = 0
        self.order = list(range(len(self.prompts)))
        if self.shuffle:
            random.Random(f"{self.seed}/{epoch}").shuffle(self.order)


def _hash(content: bytes) -> bytes:
    return blake2b(content, digest_size=_DIGEST).digest()
