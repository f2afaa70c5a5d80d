"""The interface of rollout engines: sample responses, and load new weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from ..batch.samples import Prompt, SampleGroup
from ..metrics.figures import Metric


def report_nothing(share: float) -> None:
    """Ignore the share of the samples that are finished."""


@dataclass(frozen=True)
class SamplingParams:
    """Parameters of sampling.

    Attributes:
        n: number of responses per prompt.
        max_new_tokens: maximum length of a response, including its end token.
        temperature: divides the logits; 0 means greedy decoding.
        top_p: nucleus mass; 1 keeps all tokens.
        top_k: number of most likely tokens to keep; 0 keeps all.
        stop: strings that end a response, in addition to the end tokens.
        router_noise: standard deviation of Gaussian noise on a MoE's router logits; only the embedded engine
            adds it.
        seed: numbers from which every sample's own seed is drawn; the SGLang engine sets them.
        draw: place of the batch's first prompt in the stream of prompts, on which the seeds of environments
            depend.
        report: function that receives the share of a call's samples that are finished, from time to time and
            from any thread. The embedded engine counts this rank's samples, and an unfinished response by its
            tokens. SGLang's calls it on the first rank of each node.
    """

    n: int = 1
    max_new_tokens: int = 1024
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()
    router_noise: float = 0.0
    seed: tuple[int, ...] = (0,)
    draw: int = 0
    report: Callable[[float], None] = field(default=report_nothing, compare=False)


class RolloutEngine(Protocol):
    """The interface of a rollout engine.

    Every method is collective: all ranks call it in the same order, with the same prompts and sampling.

    Attributes:
        version: the training step of the loaded weights.
    """

    version: int

    def generate(self, prompts: list[Prompt], sampling: SamplingParams) -> dict[int, SampleGroup]:
        """Sample ``sampling.n`` responses to the ``input_ids`` of each prompt; rewards stay 0.

        An engine that was made with a ``Player`` plays episodes instead.

        Returns:
            The groups that this rank sampled, by the position of their prompt in ``prompts``. Every position
            is on exactly one rank.
        """
        ...

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Replace all weights; later samples have ``policy_version = version``.

        Args:
            named_tensors: the policy's export, by the names in its Hugging Face checkpoint; may be iterated
                several times.
            version: number of training steps taken.

        Raises:
            InputError: a tensor is unknown, missing or repeated, or its shape differs from the engine's
                tensor.
            NonFiniteError: a weight to be quantized is NaN or infinite.
        """
        ...

    def sleep(self) -> None:
        """Release device memory shared with the trainer, if any, until the next ``update_weights``."""
        ...

    def take_metrics(self) -> dict[str, Metric]:
        """Return the engine's own metrics since the last call."""
        ...

    def close(self) -> None:
        """Release the engine's resources."""
        ...
