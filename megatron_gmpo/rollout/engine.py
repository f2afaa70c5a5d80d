"""What every rollout engine does: sample responses, and take new weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from ..batch.samples import Prompt, SampleGroup
from ..metrics.figures import Metric


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
        router_noise: standard deviation of Gaussian noise on a MoE's router logits; only the embedded engine adds it.
    """

    n: int = 1
    max_new_tokens: int = 1024
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()
    router_noise: float = 0.0


class RolloutEngine(Protocol):
    """Every method is collective: all ranks call it in the same order, with the same prompts and sampling.

    Attributes:
        version: the training step whose weights it has.
    """

    version: int

    def generate(self, prompts: list[Prompt], sampling: SamplingParams) -> list[SampleGroup]:
        """Samples ``sampling.n`` responses from ``input_ids`` of each prompt; rewards are left at 0.

        Returns:
            One group for each prompt, in the order of ``prompts``, all of them on every rank.
        """
        ...

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Replaces all weights; later samples carry ``policy_version = version``.

        Args:
            named_tensors: the policy's export, under the names of its Hugging Face checkpoint; may be iterated more than once.
            version: training steps taken.

        Raises:
            InputError: a tensor is unknown, missing, repeated or of another shape than the engine's.
            NonFiniteError: a weight to be quantised is NaN or infinite.
        """
        ...

    def sleep(self) -> None:
        """Gives back the device memory it shares with the trainer, if any, until the next ``update_weights``."""
        ...

    def take_metrics(self) -> dict[str, Metric]:
        """Figures on the engine's own work since the last call."""
        ...

    def close(self) -> None:
        """Ends whatever it started."""
        ...


def end_token_ids(generation_config: Any, tokenizer: Any) -> set[int]:
    """Tokens that end a response: those of transformers' generation config, and the tokenizer's."""
    ids = generation_config.eos_token_id
    return {*(ids if isinstance(ids, list) else [ids]), tokenizer.eos_token_id} - {None}


def response_text(tokenizer: Any, response: list[int], end_ids: set[int], stop: tuple[str, ...]) -> str:
    """What a reward reads: a response without its end token and special tokens, up to the first stop string."""
    spoken = response[:-1] if response[-1] in end_ids else response
    text: str = tokenizer.decode(spoken, skip_special_tokens=True)
    for string in stop:
        text = text.split(string, 1)[0]
    return text
