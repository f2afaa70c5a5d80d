"""Every sequence is sent once to every other node of its replica, in rounds of bounded size."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_gmpo.batch import exchange_plan
from megatron_gmpo.batch.columns import RoutingShape
from megatron_gmpo.batch.exchange_plan import Layout, Record, Routes
from megatron_gmpo.batch.samples import Sample
from megatron_gmpo.errors import InputError

ROUTING = RoutingShape(num_layers=3, moe_layers=(0, 1, 2), num_experts=8, topk=2)


@given(data=st.data())
def test_every_node_gets_each_sequence_it_trains_once(data: st.DataObject) -> None:
    nodes = data.draw(st.integers(1, 5))
    node_of = [*range(nodes), *data.draw(st.lists(st.integers(0, nodes - 1), max_size=6))]
    replicas = [data.draw(st.integers(0, 3)) for _ in node_of]
    used = sorted(set(replicas))
    replicas = [used.index(replica) for replica in replicas]
    rows = data.draw(st.integers(0, 20))
    numbers = st.lists(st.integers(0, len(node_of) - 1), min_size=rows, max_size=rows)
    owner = np.array(data.draw(numbers), np.int32)
    choice = st.lists(st.integers(-1, len(used) - 1), min_size=rows, max_size=rows)
    replica_of = np.array(data.draw(choice), np.int32)
    nbytes = np.array(data.draw(st.lists(st.integers(9, 90), min_size=rows, max_size=rows)), np.int64)

    limit = 100
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exchange_plan, "ROUND_BYTES", limit)
        plans = [Routes(node_of, replicas, node).rounds(owner, replica_of, nbytes) for node in range(nodes)]

    assert len({len(plan) for plan in plans}) == 1
    arrived: Counter[tuple[int, int]] = Counter()
    for turns in zip(*plans, strict=True):
        sent = [(t, b.source, b.home, b.numbers) for turn in turns for b in turn.sent for t in b.targets]
        received = [(n, b.source, b.home, b.numbers) for n, turn in enumerate(turns) for b in turn.received]
        assert sorted(sent) == sorted(received)
        assert len({block[:3] for block in sent}) == len(sent)  # gloo matches messages by these numbers
        assert max(turn.outbox_bytes for turn in turns) < limit + nbytes.max()
        arrived.update((node, number) for node, _, _, numbers in received for number in numbers)
    trained = {(node_of[r], n) for r, of in enumerate(replicas) for n in range(rows) if replica_of[n] == of}
    here = {(node_of[rank], number) for number, rank in enumerate(owner)}
    assert arrived == Counter(trained - here)


def test_the_messages_of_a_round_go_to_different_nodes() -> None:
    """Each of 8 nodes has 8 sequences, one for each node. A node that received from all 7 would be slow."""
    owner = np.arange(64) // 8
    plans = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exchange_plan, "ROUND_BYTES", 10)
        for node in range(8):
            plans.append(Routes(range(8), range(8), node).rounds(owner, np.arange(64) % 8, np.full(64, 10)))
    for turns in zip(*plans, strict=True):
        assert [len(turn.received) for turn in turns] == [1] * 8


@pytest.mark.parametrize("routing", [None, ROUTING])
def test_columns_of_a_node_do_not_overlap(routing: RoutingShape | None) -> None:
    record = Record(routing)
    lengths = np.array([3, 1, 4, 1, 5])
    layout = Layout(lengths, np.array([2, 0, 2, -1, 1]), [0, 2], record)
    assert (layout.offsets[[3, 4]] == -1).all()  # trained by nobody, and by another node
    assert {replica: rows for replica, (_, rows) in layout.sections.items()} == {0: 1, 2: 7}
    taken = np.zeros(layout.nbytes, np.int64)
    for number in (0, 1, 2):
        for offset, width in zip(layout.offsets[number], record.widths, strict=True):
            taken[offset : offset + width * lengths[number]] += 1
            assert offset % max(width, 1) == 0 or width > 4
    assert taken.max() == 1
    assert taken.sum() == 8 * sum(record.widths)
    starts = [start for start, _ in layout.sections.values()]
    assert all(start % 4096 == 0 for start in starts)


@pytest.mark.parametrize(
    ("experts", "line"),
    [
        (None, "sample 7 has no record of its routed experts: generate with rollout.routed_experts = true"),
        (
            np.zeros((2, 3, 1), np.uint8),
            "sample 7: routed experts of shape (2, 3, 1), not (2, 3, 2) (tokens - 1, layers, topk): generate "
            "with the model of model.path",
        ),
        (
            np.full((2, 3, 2), 256),
            "sample 7: routed expert 256 of 8: generate with the model of model.path",
        ),
    ],
)
def test_records_that_do_not_fit_are_refused(experts: np.ndarray | None, line: str) -> None:
    sample = Sample([1, 2, 3], [False] * 3, [0.0] * 3, "", "stop", 0, routed_experts=experts)
    Record(None).check(7, sample)
    with pytest.raises(InputError, match=f"^{re.escape(line)}$"):
        Record(ROUTING).check(7, sample)
