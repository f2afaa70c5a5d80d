"""A rollout engine that reads its responses from a script."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from megatron_gmpo.batch.samples import Prompt, Sample, SampleGroup
from megatron_gmpo.metrics.figures import Metric
from megatron_gmpo.rollout.engine import SamplingParams


class ScriptedEngine:
    """``RolloutEngine`` without a model, which takes the responses of a prompt from a script.

    Each character of a response is a token.

    Args:
        script: prompt id -> responses. Each call takes the next ``n`` and starts again after the last. A
            response longer than ``max_new_tokens`` is cut and finishes with ``length``.

    Attributes:
        calls: the prompts' ids and the sampling of every call.
    """

    def __init__(self, script: Mapping[str, Sequence[str]]) -> None:
        self.script = script
        self.version = 0
        self.calls: list[tuple[list[str], SamplingParams]] = []
        self._taken = dict.fromkeys(script, 0)

    def generate(self, prompts: list[Prompt], sampling: SamplingParams) -> dict[int, SampleGroup]:
        self.calls.append(([p.id for p in prompts], sampling))
        groups: list[SampleGroup] = []
        for prompt in prompts:
            groups.append(SampleGroup(prompt, [self._sample(prompt, sampling) for _ in range(sampling.n)]))
            sampling.report(len(groups) / len(prompts))
        return dict(enumerate(groups))

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        self.version = version

    def sleep(self) -> None: ...

    def take_metrics(self) -> dict[str, Metric]:
        return {}

    def close(self) -> None: ...

    def _sample(self, prompt: Prompt, sampling: SamplingParams) -> Sample:
        responses = self.script[prompt.id]
        text = responses[self._taken[prompt.id] % len(responses)]
        self._taken[prompt.id] += 1
        spoken = text[: sampling.max_new_tokens]
        return Sample(
            tokens=[*prompt.input_ids, *map(ord, spoken)],
            response_mask=[False] * len(prompt.input_ids) + [True] * len(spoken),
            rollout_logprobs=[0.0] * len(prompt.input_ids) + [-1.0] * len(spoken),
            text=spoken,
            finish_reason="stop" if spoken == text else "length",
            policy_version=self.version,
        )
