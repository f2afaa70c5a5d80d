"""Prompts and sampled responses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

if TYPE_CHECKING:  # environments' processes do not import torch
    from .images import ImageRef, PromptImage

FinishReason = Literal["stop", "length", "abort"]
EpisodeEnd = Literal["done", "turns", "tokens", "error"]


@dataclass
class Prompt:
    """A problem and its tokenized prompt.

    Attributes:
        id: stable name, unique in its data set, e.g. ``"gsm8k_train/17"``.
        answer: ground truth that the reward receives, as text.
        text: the prompt as plain text, or None if ``messages`` is given.
        messages: chat messages ``[{"role": "user", "content": ...}]``, or None. A message with images has
            content parts ``{"type": "image"}`` and ``{"type": "text", "text": ...}``.
        input_ids: token ids after template and tokenizer; every engine generates from them.
        labels: column of a benchmark -> the problem's value, e.g. ``{"level": "5"}``.
        images: the images, in the order of their tokens in ``input_ids``.
    """

    id: str
    answer: str
    text: str | None = None
    messages: list[dict[str, Any]] | None = None
    input_ids: list[int] = field(default_factory=list)
    labels: dict[str, str] = field(default_factory=dict)
    images: Sequence[PromptImage] = ()

    @property
    def image_refs(self) -> tuple[ImageRef, ...]:
        """Return the names of the images."""
        return tuple(image.ref for image in self.images)


@dataclass(frozen=True)
class Episode:
    """The record of a sample of several turns: how it ended, its reward and its messages.

    Attributes:
        ended: why the episode ended: ``done`` (the environment said so), ``turns`` or ``tokens`` (a limit) or
            ``error`` (the environment failed).
        name: the environment's name of the task, which splits the metrics; empty for none.
        reward: sum of the rewards of all steps.
        success: the environment's last word on success, or None if it said nothing.
        tool_calls: number of calls of tools.
        tool_errors: number of those that failed or were malformed.
        seconds: time within the environment's calls.
        messages: the conversation after the prompt, as text: turns and observations in order. The last
            observation has no tokens, because no turn follows it.
        error: why the environment failed, in one line.
    """

    ended: EpisodeEnd
    name: str = ""
    reward: float = 0.0
    success: bool | None = None
    tool_calls: int = 0
    tool_errors: int = 0
    seconds: float = 0.0
    messages: list[dict[str, Any]] = field(default_factory=list)
    error: str = ""


@dataclass(eq=False)
class Sample:
    """One sampled response, or episode of several turns, and the records that training needs of it.

    The columns are contiguous numpy arrays. The constructor also accepts lists, and arrays of another width.
    The turns of an episode are the runs of True in ``response_mask``: between two turns lies at least one
    token of an observation.

    Attributes:
        tokens: (L,) int32 token ids of prompt and response; of an episode, also those of its observations.
        response_mask: (L,) bool; True for tokens that the policy generated.
        rollout_logprobs: (L,) float32 log probability of each token under the distribution it was sampled
            from, 0 on all tokens that were not sampled.
        text: the response, decoded without special tokens; of an episode, its turns joined by newlines.
        finish_reason: ``stop`` (end token or stop string), ``length`` (token limit) or ``abort``. An episode
            has ``stop`` if it is done, ``length`` at a limit of turns or tokens, ``abort`` after an error.
        policy_version: the training step whose weights generated the response; the oldest step if there are
            several.
        reward: the reward, set by ``rollout.collect.score``.
        routed_experts: (L - 1, layers, topk) expert ids of a MoE rollout, uint8 if all of them fit, else
            int16; or None. Row t belongs to input token t, which predicts t + 1, so the last token has no
            row. All decoder layers have values; in layers without experts they have no meaning.
        version_spans: (spans, 2) int32 rows ``(start, version)``: the training step whose weights generated
            the tokens from ``start`` up to the start of the next span. None means that ``policy_version``
            generated the whole response. A span of an episode may include observations.
        episode: the environment's record, or None for a response without an environment.
        images: the images of prompt and observations, in the order of their tokens.

    Raises:
        ValueError: a column has a wrong number of rows, or its type cannot be converted without loss.
    """

    tokens: np.ndarray
    response_mask: np.ndarray
    rollout_logprobs: np.ndarray
    text: str
    finish_reason: FinishReason
    policy_version: int
    reward: float = 0.0
    routed_experts: np.ndarray | None = None
    version_spans: np.ndarray | None = None
    episode: Episode | None = None
    images: tuple[ImageRef, ...] = ()

    def __post_init__(self) -> None:
        self.tokens = _column("tokens", self.tokens, np.int32, (None,))
        length = len(self.tokens)
        self.response_mask = _column("response_mask", self.response_mask, np.bool_, (length,))
        self.rollout_logprobs = _column("rollout_logprobs", self.rollout_logprobs, np.float32, (length,))
        if self.version_spans is not None:
            self.version_spans = _column("version_spans", self.version_spans, np.int32, (None, 2))
        if self.routed_experts is not None:
            experts = narrow_experts(np.asarray(self.routed_experts))
            self.routed_experts = _column("routed_experts", experts, experts.dtype, (None, None, None))

    @classmethod
    def from_response(
        cls, prompt: list[int], response: ArrayLike, logprobs: ArrayLike, **others: Any
    ) -> Sample:
        """Return the sample of a prompt and a response that the policy generated completely.

        Args:
            prompt: P token ids.
            response: R token ids.
            logprobs: R log probabilities.
            others: the other fields, except ``response_mask``.
        """
        start = len(prompt)
        tokens = np.concatenate([np.asarray(prompt, np.int32), np.asarray(response, np.int32)])
        return cls(
            tokens=tokens,
            response_mask=np.arange(len(tokens)) >= start,
            rollout_logprobs=np.concatenate([np.zeros(start, np.float32), np.asarray(logprobs, np.float32)]),
            **others,
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sample) and all(
            np.array_equal(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)
        )

    @property
    def response_length(self) -> int:
        """Return the number of generated tokens."""
        return int(self.response_mask.sum())

    @property
    def num_turns(self) -> int:
        """Return the number of runs of generated tokens."""
        mask = self.response_mask
        return int(mask[:1].sum() + (mask[1:] & ~mask[:-1]).sum())

    @property
    def episode_length(self) -> int:
        """Return the number of tokens from the first generated one to the end, observations included."""
        return len(self.tokens) - int(self.response_mask.argmax()) if self.response_mask.any() else 0

    @property
    def version_sum(self) -> int:
        """Return the sum of ``token_versions`` over the response tokens."""
        if self.version_spans is None:
            return self.policy_version * self.response_length
        return int(self.token_versions[self.response_mask].sum(dtype=np.int64))

    @property
    def token_versions(self) -> np.ndarray:
        """Return (L,) int32: the training step whose weights generated each token, -1 before the response."""
        if self.version_spans is None:
            return np.where(self.response_mask, self.policy_version, -1).astype(np.int32)
        starts, versions = self.version_spans.T
        span = np.searchsorted(starts, np.arange(len(self.tokens)), side="right") - 1
        return np.where(span < 0, np.int32(-1), versions[span])


@dataclass
class SampleGroup:
    """The samples of one prompt. Advantages are relative to this group."""

    prompt: Prompt
    samples: list[Sample]

    @property
    def rewards(self) -> list[float]:
        return [sample.reward for sample in self.samples]


def narrow_experts(ids: np.ndarray) -> np.ndarray:
    """Return expert ids as uint8 if all of them fit, else as int16."""
    if ids.dtype.kind not in "iu":
        raise ValueError(f"expert ids have dtype {ids.dtype}, not an integer type")
    low, high = (int(ids.min()), int(ids.max())) if ids.size else (0, 0)
    if not -(2**15) <= low <= high < 2**15:
        raise ValueError(f"expert ids from {low} to {high} do not fit 16 bits")
    return ids.astype(np.uint8 if 0 <= low <= high < 2**8 else np.int16, copy=False)


def version_spans_of(versions: Sequence[int] | np.ndarray, start: int = 0) -> np.ndarray:
    """Return ``Sample.version_spans`` for one version per token, of which the first is token ``start``."""
    values = _column("token_versions", versions, np.int32, (None,))
    first = np.flatnonzero(np.diff(values, prepend=values[:1] - 1))
    return np.stack([first + start, values[first]], axis=1).astype(np.int32)


def _column(name: str, values: Any, dtype: DTypeLike, shape: tuple[int | None, ...]) -> np.ndarray:
    """Return ``values`` as a contiguous array of ``dtype``; None in ``shape`` stands for any size."""
    array = np.asarray(values)
    fits = len(array.shape) == len(shape) and all(
        expected in (None, found) for expected, found in zip(shape, array.shape, strict=True)
    )
    # lists become int64 or float64 arrays, or float64 if empty
    if not fits or (array.size and not np.can_cast(array.dtype, dtype, "same_kind")):
        found = f"dtype {array.dtype} and shape {array.shape}"
        raise ValueError(f"Sample.{name} has {found}, not {np.dtype(dtype)} and {shape}")
    column = np.ascontiguousarray(array, dtype)
    if array.dtype.kind in "iu" and array.dtype != column.dtype and (column != array).any():
        raise ValueError(f"Sample.{name} has {array[column != array][0]}, which does not fit {column.dtype}")
    return column
