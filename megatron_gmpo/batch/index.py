"""The index of a step: one small row a sequence, equal on all ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
import torch.distributed as dist

from ..config.training import Unit
from ..distributed import rank, world_size
from . import images
from .samples import Sample, SampleGroup

ROW = np.dtype(
    [
        ("group", "i4"),
        ("length", "i4"),
        ("response_length", "i4"),
        ("episode_length", "i4"),
        ("turns", "i4"),
        ("reward", "f8"),
        ("truncated", "?"),
        ("oldest_version", "i4"),
        ("version_sum", "i8"),
        ("owner", "i4"),
        ("expert_bytes", "u1"),
        ("images", "i4"),
    ]
)
"""One row of a ``StepIndex`` while it travels: 50 bytes."""


@dataclass(frozen=True, eq=False)
class StepIndex:
    """The S sequences of a step: one row each, ordered by group, then by sample; equal on all ranks.

    Advantages, the choice of groups and the plan of a step follow from it alone, so all ranks agree on them
    without a message.

    Attributes:
        group: (S,) int32 position of the sequence's group in the step; groups are ordered by prompt.
        length: (S,) int32 tokens of prompt and response.
        response_length: (S,) int32 generated tokens.
        episode_length: (S,) int32 tokens after the prompt: generated ones and those of observations.
        turns: (S,) int32 turns, which are runs of generated tokens.
        reward: (S,) float64.
        truncated: (S,) bool; the response reached the token limit.
        oldest_version: (S,) int32 oldest training step whose weights generated a token of the response.
        version_sum: (S,) int64 sum over the response tokens of the training step that generated each.
        owner: (S,) int32 rank that holds the sample.
        expert_bytes: (S,) uint8 bytes of an expert id in the record of routed experts: 1 or 2; 0 = no record.
        images: (S,) int32 number of images in each sequence.
        image_rows: (I,) ``images.ROW`` of these images, in the order of the sequences and of their tokens.
    """

    group: np.ndarray
    length: np.ndarray
    response_length: np.ndarray
    episode_length: np.ndarray
    turns: np.ndarray
    reward: np.ndarray
    truncated: np.ndarray
    oldest_version: np.ndarray
    version_sum: np.ndarray
    owner: np.ndarray
    expert_bytes: np.ndarray
    images: np.ndarray
    image_rows: np.ndarray

    @classmethod
    def gather(cls, mine: Mapping[int, SampleGroup], num_groups: int) -> StepIndex:
        """Return the index of the groups of all ranks. Collective, O(rows).

        Args:
            mine: this rank's groups by their position in the step; each position is on exactly one rank.
            num_groups: number of groups on all ranks.
        """
        sizes = torch.zeros(num_groups, dtype=torch.int64)
        for position, group in mine.items():
            sizes[position] = len(group.samples)
        _add_over_ranks(sizes)
        assert (sizes > 0).all(), "a group is on no rank"
        ends = sizes.cumsum(0).tolist()
        rows = np.zeros(ends[-1] if ends else 0, ROW)
        samples = {
            at: (position, sample)
            for position, group in mine.items()
            for at, sample in enumerate(group.samples, ends[position] - len(group.samples))
        }
        for at, (position, sample) in samples.items():
            rows[at] = _row(position, sample)
        _add_rows(rows)
        image_rows, ends = np.zeros(rows["images"].sum(), images.ROW), rows["images"].cumsum()
        if len(image_rows):  # text sends nothing
            for at, (_, sample) in samples.items():
                image_rows[ends[at] - len(sample.images) : ends[at]] = images.image_rows(sample.images)
            _add_rows(image_rows)
        columns = {name: np.ascontiguousarray(rows[name]) for name in ROW.names or ()}
        return cls(**columns, image_rows=image_rows)

    def __len__(self) -> int:
        return len(self.group)

    @property
    def num_groups(self) -> int:
        """Return the number of groups."""
        return int(self.group[-1]) + 1 if len(self) else 0

    @property
    def group_bounds(self) -> np.ndarray:
        """Return (groups + 1,) int64: the sequences ``bounds[g]`` to ``bounds[g + 1] - 1`` form group g."""
        return np.searchsorted(self.group, np.arange(self.num_groups + 1))

    def rewards_of_groups(self) -> Iterator[np.ndarray]:
        """Yield the rewards of each group, (samples,) float64."""
        return iter(np.split(self.reward, self.group_bounds[1:-1]))

    def without_truncated(self) -> StepIndex:
        """Return an index in which truncated sequences have no response tokens and no turns."""
        return replace(
            self,
            response_length=np.where(self.truncated, np.int32(0), self.response_length),
            turns=np.where(self.truncated, np.int32(0), self.turns),
        )

    def units(self, unit: Unit) -> np.ndarray:
        """Return (S,) int32: how many sequences with response tokens the loss sees in each sequence."""
        return self.turns if unit == "turn" else np.minimum(self.turns, 1)

    def take(self, groups: np.ndarray) -> StepIndex:
        """Return the rows of these ascending positions of groups, which become 0, 1, 2 and so on."""
        rows = np.isin(self.group, groups)
        of_images = np.repeat(rows, self.images)
        kept = {
            f.name: getattr(self, f.name)[of_images if f.name == "image_rows" else rows] for f in fields(self)
        }
        return StepIndex(**kept | {"group": np.searchsorted(groups, kept["group"]).astype(np.int32)})

    @staticmethod
    def joined(parts: list[StepIndex]) -> StepIndex:
        """Return the rows of all parts; the groups of a part follow those of the parts before it."""
        first = np.cumsum([0, *(part.num_groups for part in parts)])
        columns = {f.name: np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(StepIndex)}
        shifts = np.repeat(first[:-1], [len(part) for part in parts])
        return StepIndex(**columns | {"group": (columns["group"] + shifts).astype(np.int32)})


def samples_of(groups: Mapping[int, SampleGroup], index: StepIndex) -> dict[int, Sample]:
    """Return the samples of this rank's groups by their number: their row of the index."""
    bounds = index.group_bounds
    return {
        number: sample
        for position, group in sorted(groups.items())
        for number, sample in enumerate(group.samples, int(bounds[position]))
    }


def _row(group: int, sample: Sample) -> tuple[int | float, ...]:
    """Return the values of ``ROW``."""
    experts = sample.routed_experts
    return (
        group,
        len(sample.tokens),
        sample.response_length,
        sample.episode_length,
        sample.num_turns,
        sample.reward,
        sample.finish_reason == "length",
        sample.policy_version,
        sample.version_sum,
        rank(),
        0 if experts is None else experts.itemsize,
        len(sample.images),
    )


def _add_rows(rows: np.ndarray) -> None:
    """Fill in the rows of other ranks. Only one rank has a row, so the sum of bytes is exact."""
    _add_over_ranks(torch.from_numpy(rows.view(np.uint8)))


def _add_over_ranks(values: torch.Tensor) -> None:
    if world_size() > 1:
        dist.all_reduce(values)
