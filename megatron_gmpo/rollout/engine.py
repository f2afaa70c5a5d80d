"""What every rollout engine does: sample responses, and take new weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ..types import Prompt, SampleGroup


@dataclass(frozen=True)
class SamplingParams:
    """How to sample.

    Attributes:
        n: responses for each prompt.
        max_new_tokens: most tokens of a response, its end token included.
        temperature: divides the logits; 0 is greedy decoding.
        top_p: nucleus mass, 1 for all.
        top_k: most likely tokens to keep, 0 for all.
        stop: strings that end a response, besides the end tokens.
    """

    n: int = 1
    max_new_tokens: int = 1024
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()


class RolloutEngine(Protocol):
    """Both methods are collective: every rank calls them in the same order, with the same prompts and sampling."""

    def generate(self, prompts: list[Prompt], sampling: SamplingParams) -> list[SampleGroup]:
        """Samples ``sampling.n`` responses from ``input_ids`` of each prompt; rewards are left at 0.

        Returns:
            One group for each prompt, in the order of ``prompts``, all of them on every rank.
        """
        ...

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Replaces all weights; later samples carry ``policy_version = version``.

        Args:
            named_tensors: the policy's export, under the names of its Hugging Face checkpoint.
            version: training steps taken.

        Raises:
            InputError: a tensor is unknown, missing, repeated or of another shape than the engine's.
        """
        ...
