"""Groups of samples in order, and their index."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from megatron_gmpo.batch.assembly import make_train_batch
from megatron_gmpo.batch.columns import RoutingShape, TrainBatch
from megatron_gmpo.batch.exchange import Exchange
from megatron_gmpo.batch.images import ImageTokens, image_rows
from megatron_gmpo.batch.index import StepIndex
from megatron_gmpo.batch.plan import plan_step
from megatron_gmpo.batch.samples import Prompt, Sample, SampleGroup
from megatron_gmpo.config.training import Unit
from megatron_gmpo.distributed import Nodes


def in_order(groups: Mapping[int, SampleGroup]) -> list[SampleGroup]:
    """Return all groups of a step, of which this process holds every one."""
    assert sorted(groups) == list(range(len(groups)))
    return [groups[position] for position in range(len(groups))]


def index_of(groups: Sequence[SampleGroup]) -> StepIndex:
    """Return the index of groups that one rank holds."""
    samples = [(number, sample) for number, group in enumerate(groups) for sample in group.samples]
    experts = [sample.routed_experts for _, sample in samples]
    return StepIndex(
        group=np.array([number for number, _ in samples], np.int32),
        length=np.array([len(sample.tokens) for _, sample in samples], np.int32),
        response_length=np.array([sample.response_mask.sum() for _, sample in samples], np.int32),
        episode_length=np.array([sample.episode_length for _, sample in samples], np.int32),
        turns=np.array([sample.num_turns for _, sample in samples], np.int32),
        reward=np.array([sample.reward for _, sample in samples], np.float64),
        truncated=np.array([sample.finish_reason == "length" for _, sample in samples], np.bool_),
        oldest_version=np.array([sample.policy_version for _, sample in samples], np.int32),
        version_sum=np.array([sample.token_versions[sample.response_mask].sum() for _, sample in samples]),
        owner=np.zeros(len(samples), np.int32),
        expert_bytes=np.array([0 if record is None else record.itemsize for record in experts], np.uint8),
        images=np.array([len(sample.images) for _, sample in samples], np.int32),
        image_rows=image_rows([image for _, sample in samples for image in sample.images]),
    )


def step_batch(
    groups: Sequence[SampleGroup],
    advantages: Tensor,
    routing: RoutingShape | None = None,
    *,
    mask_truncated: bool = False,
    unit: Unit = "episode",
    vision: ImageTokens | None = None,
) -> TrainBatch:
    """Return the batch that a single process makes of a step, with one microbatch."""
    index = index_of(groups)
    if mask_truncated:
        index = index.without_truncated()
    everything = np.ones(len(index), np.bool_)
    sizes = (index.length, index.response_length, index.units(unit))
    plan = plan_step(*sizes, everything, 1, lambda ns: [[ns.tolist()]])
    exchange = Exchange(Nodes("here"), 0, "", 60.0, routing)
    return make_train_batch(dict(enumerate(groups)), index, advantages, plan, exchange, 0, unit, vision)


def rewarded(rewards: Sequence[Sequence[float]]) -> list[SampleGroup]:
    """Return groups of samples of two tokens with these rewards."""
    return [
        SampleGroup(
            Prompt("p", "a", text="q"),
            [Sample([1, 2], [False, True], [0.0, -1.0], "x", "stop", 0, reward=reward) for reward in row],
        )
        for row in rewards
    ]
