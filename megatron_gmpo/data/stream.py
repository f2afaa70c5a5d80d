"""An endless, resumable stream of prompts that recognizes its data set."""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence
from functools import cached_property
from hashlib import blake2b
from itertools import pairwise
from typing import Annotated, Any

from pydantic import Field, NonNegativeInt, model_validator

from ..batch.samples import Prompt
from ..config.saved import SavedState
from ..errors import InputError

_DIGEST = 16
"""Bytes of a hash."""


_Span = Annotated[list[NonNegativeInt], Field(min_length=2, max_length=2)]


class Fingerprint(SavedState):
    """Hashes of a data set. They tell what has changed, not where."""

    prompts: str
    """Hash of all token ids and images, in the order of the data set."""
    answers: str
    """Hash of all answers, in the order of the data set."""
    any_order: str
    """Hash of all pairs of prompt and answer, in sorted order."""


class StreamState(SavedState):
    """Position of a stream, as a checkpoint holds it."""

    seed: int
    epoch: int = Field(ge=0)
    position: int = Field(ge=0)
    """Place in this epoch of the first prompt that was not trained on."""
    trained: list[_Span] = Field(default_factory=list)
    """Places ``[start, stop]`` after it that were trained on, see ``PromptStream.place``."""
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

    A prompt's place in the stream is its number in this endless order.

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
        self._trained: list[list[int]] = []  # places after a restored position that are left out
        self._start_epoch(0)

    def __len__(self) -> int:
        """Return the number of prompts of an epoch."""
        return len(self.prompts)

    @property
    def place(self) -> int:
        """Return the place of the next prompt. Every draw ends at the place where the next one starts."""
        return self.epoch * len(self.prompts) + self.position

    def next(self, n: int) -> list[Prompt]:
        """Return the next ``n`` prompts, which may come from several epochs."""
        taken: list[Prompt] = []
        while len(taken) < n:
            if self.position == len(self.order):
                self._start_epoch(self.epoch + 1)
            place = self.place
            left_out = max((stop - place for start, stop in self._trained if start <= place), default=0)
            if left_out > 0:
                epoch, position = divmod(place + left_out, len(self.prompts))
                if epoch > self.epoch:
                    self._start_epoch(epoch)
                self.position = position
                continue
            until = min((start - place for start, _ in self._trained if start > place), default=n)
            part = self.order[self.position : self.position + min(until, n - len(taken))]
            self.position += len(part)
            taken += [self.prompts[index] for index in part]
        return taken

    def state_dict(self, pending: Sequence[tuple[int, int]] = ()) -> dict[str, Any]:
        """Return the position of the stream and the fingerprint of its data, ready for JSON.

        Args:
            pending: ``place`` before and after each draw that was not trained on yet, ascending. A restored
                stream draws them again, and no other prompt that this one has drawn.
        """
        size, ends = len(self.prompts), [*pending, (self.place, self.place)]
        first = ends[0][0]
        gaps = [[stop, start] for (_, stop), (start, _) in pairwise(ends) if stop < start]
        trained = [span for span in [*self._trained, *gaps] if span[1] > first]
        return StreamState(
            seed=self.seed,
            epoch=first // size if pending else self.epoch,
            position=first % size if pending else self.position,
            trained=trained,
            num_prompts=size,
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
            self.position, self._trained = saved.position, saved.trained
        else:
            self._start_epoch(saved.epoch + 1)
            self._trained = []
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
            return (
                "data has the checkpoint's answers, but other prompts (texts, images, templates or tokenizer)"
            )
        return "data has other prompts and other answers than the checkpoint's data"

    @cached_property
    def _fingerprint(self) -> Fingerprint:
        # 5 us for a prompt of 150 tokens; the tokenizer takes 100 us and more
        prompts = [
            _hash(
                array("i", prompt.input_ids).tobytes() + b"".join(image.ref.digest for image in prompt.images)
            )
            for prompt in self.prompts
        ]
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
