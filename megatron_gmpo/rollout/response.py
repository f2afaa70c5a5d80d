"""The context that an engine samples from, and the response or turn of an episode that it returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ..batch.images import PromptImage
from ..batch.samples import Prompt, Sample, version_spans_of
from .ending import Ending


@dataclass(frozen=True)
class Context:
    """The tokens after which a response is sampled, and their images.

    Attributes:
        recorded: number of first tokens whose routed experts are known, so that the response leaves them out.
    """

    tokens: Sequence[int] | np.ndarray
    images: Sequence[PromptImage] = ()
    recorded: int = 0

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass
class Response:
    """One sampled response, joined from all its requests.

    Attributes:
        tokens: R response token ids, including the end token.
        logprobs: R log probabilities, after temperature and before top-p and top-k.
        versions: R training steps, one per token: the step whose weights sampled the token.
        finish_reason: ``stop``, ``length``, or empty while the response is unfinished.
        routed_experts: (C + R - 1 - recorded, layers, topk) uint8 or int16 expert ids, if requested. The C
            tokens of the context and the R of the response have a row each. The first ``recorded`` tokens
            and the last one have none.
    """

    tokens: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    logprobs: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))
    versions: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    finish_reason: str = ""
    routed_experts: np.ndarray | None = None

    def to_sample(self, prompt: Prompt, ending: Ending) -> Sample:
        """Return the sample of a finished response."""
        return Sample.from_response(
            prompt.input_ids,
            self.tokens,
            self.logprobs,
            text=ending.text(self.tokens),
            finish_reason="stop" if self.finish_reason == "stop" else "length",
            policy_version=int(self.versions.min()),
            version_spans=version_spans_of(self.versions, start=len(prompt.input_ids)),
            routed_experts=self.routed_experts,
            images=prompt.image_refs,
        )
