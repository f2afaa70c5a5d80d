"""Groups of samples in order, and their index."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megatron_gmpo.batch.index import StepIndex
from megatron_gmpo.batch.samples import Prompt, Sample, SampleGroup


def in_order(groups: Mapping[int, SampleGroup]) -> list[SampleGroup]:
    """Return all groups of a step, of which this process holds every one."""
    assert sorted(groups) == list(range(len(groups)))
    return [groups[position] for position in range(len(groups))]


def index_of(groups: Sequence[SampleGroup]) -> StepIndex:
    """Return the index of groups that this process holds."""
    return StepIndex.gather(dict(enumerate(groups)), len(groups))


def rewarded(rewards: Sequence[Sequence[float]]) -> list[SampleGroup]:
    """Return groups of samples of two tokens with these rewards."""
    return [
        SampleGroup(
            Prompt("p", "a", text="q"),
            [Sample([1, 2], [False, True], [0.0, -1.0], "x", "stop", 0, reward=reward) for reward in row],
        )
        for row in rewards
    ]
