"""What the ranks of a data-parallel group write of a checkpoint, and in which order."""

from __future__ import annotations

import random
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from megatron_gmpo.policy.optimizer_state import Slot, _in_rounds, _Writer
from megatron_gmpo.weights.torch_dist_writer import Chunk, write_chunks


def part(row: int, rows: int = 1) -> Chunk:
    """Return rows of a tensor of four rows."""
    return Chunk("weight", (4, 3), (row, 0), (rows, 3), torch.float32)


@pytest.mark.parametrize(
    ("chunks", "line"),
    [
        ([part(0), part(2, 2)], "12 elements, and the ranks write 9 at 2 places in 2 chunks"),
        ([part(0), part(0), part(2, 2)], "12 elements, and the ranks write 12 at 2 places in 3 chunks"),
        ([part(0, 2), part(1), part(2, 2)], "12 elements, and the ranks write 15 at 3 places in 3 chunks"),
        ([part(0), part(1), part(2, 2)], None),
    ],
    ids=["missing", "twice", "overlap", "complete"],
)
def test_a_tensor_that_is_not_written_once_is_an_error(
    chunks: list[Chunk], line: str | None, tmp_path: Path
) -> None:
    with nullcontext() if line is None else pytest.raises(RuntimeError, match=line):
        write_chunks(tmp_path, chunks, (torch.zeros(chunk.sizes) for chunk in chunks), {})


def slot(numel: int) -> Slot:
    return Slot(torch.nn.Parameter(torch.empty(numel)), 0, 0, {}, ("exp_avg", "main"), None)


def test_the_ranks_of_a_group_write_in_the_same_rounds() -> None:
    """A rank that waits for others' sums while they write would make the group as slow as one rank."""
    draw = random.Random(0)
    slots = [
        (
            slot(draw.randrange(1, 100)),
            _Writer(draw.choice([0, 1, 2, None]), mine=False, expert=number % 3 == 0),
        )
        for number in range(60)
    ]
    rounds = _in_rounds(slots)
    for items in rounds:
        assert len({writer.expert for *_, writer in items}) == 1
        indices = [writer.index for *_, writer in items]
        assert indices == sorted({*indices})  # each rank at most once
    written = [key for items in rounds for key, *_ in items]
    wanted = [
        f"{name}.{i}"
        for i, (each, writer) in enumerate(slots)
        if writer.index is not None
        for name in each.names
    ]
    assert sorted(written) == sorted(wanted)
    for expert in (False, True):
        shares = [
            sum(writer.index == index and writer.expert == expert for items in rounds for *_, writer in items)
            for index in range(3)
        ]
        assert sum(items[0][-1].expert == expert for items in rounds) == max(shares)
