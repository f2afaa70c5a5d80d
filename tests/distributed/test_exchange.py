"""Every rank gets the columns of its replica, on any number of nodes, and faults end all ranks."""

from __future__ import annotations

import os
import shutil
import signal
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_gmpo.batch import exchange_plan
from megatron_gmpo.batch.columns import RoutingShape
from megatron_gmpo.batch.exchange import Exchange, _Writer
from megatron_gmpo.batch.index import StepIndex
from megatron_gmpo.batch.samples import Sample
from megatron_gmpo.distributed import Nodes, rank
from megatron_gmpo.errors import RunError

from ..support.ranks import RankPool
from ..support.small_disk import small_disk

pytestmark = pytest.mark.distributed

TIMEOUT_S = 60
ROUTING = RoutingShape(num_layers=3, moe_layers=(0, 1, 2), num_experts=8, topk=2)
MANY_EXPERTS = RoutingShape(num_layers=3, moe_layers=(0, 1, 2), num_experts=300, topk=2)


def sampled(sequences: int, ranks: int, routing: RoutingShape | None) -> tuple[list[Sample], StepIndex]:
    """Return the step's samples, equal on every rank; the owners are random."""
    random = np.random.default_rng(3)
    samples: list[Sample] = []
    for _ in range(sequences):
        length = int(random.integers(1, 40))
        response = int(random.integers(0, length))
        experts = None
        if routing:
            scores = random.random((length - 1, routing.num_layers, routing.num_experts))
            experts = scores.argsort(-1)[..., : routing.topk]  # no token has the same expert twice
        samples.append(
            Sample.from_response(
                random.integers(1000, size=length - response).tolist(),
                random.integers(1000, size=response, dtype=np.int32),
                random.standard_normal(response),
                text="",
                finish_reason="stop",
                policy_version=0,
                routed_experts=experts,
            )
        )
    return samples, index_of(samples, random.integers(ranks, size=sequences))


def index_of(samples: list[Sample], owner: np.ndarray) -> StepIndex:
    none = np.zeros(len(samples), np.int64)
    lengths = np.array([len(sample.tokens) for sample in samples], np.int32)
    columns = dict.fromkeys((f.name for f in fields(StepIndex)), none)
    return StepIndex(**columns | {"length": lengths, "owner": owner})


def expected(samples: list[Sample], replica_of: np.ndarray, replica: int, shape: tuple[int, ...]) -> Any:
    """Return the columns of a replica, joined without the exchange."""
    mine = [sample for sample, of in zip(samples, replica_of, strict=True) if of == replica]

    def joined(rows: list[np.ndarray], *shape: int) -> np.ndarray:
        return np.concatenate([np.zeros((0, *shape), np.int16), *rows])

    return (
        joined([sample.tokens for sample in mine]),
        joined([sample.response_mask for sample in mine]),
        joined([sample.rollout_logprobs for sample in mine]),
        joined([np.concatenate([sample.routed_experts, np.zeros((1, *shape))]) for sample in mine], *shape)
        if shape
        else None,
    )


def columns_as_expected(
    node_of: list[int], replicas: list[int], routing: RoutingShape | None, folder: str
) -> int:
    """Exchange two steps and compare; return the nodes' number."""
    exchange_plan.ROUND_BYTES = 300  # some sequences are longer
    nodes = Nodes(f"node{node_of[rank()]}", TIMEOUT_S)
    exchange = Exchange(nodes, replicas[rank()], folder, TIMEOUT_S, routing)
    shape = (routing.num_layers, routing.topk) if routing else ()
    for sequences in (30, 1, 0):
        samples, index = sampled(sequences, len(node_of), routing)
        replica_of = np.random.default_rng(4).integers(-1, max(replicas) + 1, size=sequences)
        mine = {number: samples[number] for number in np.flatnonzero(index.owner == rank()).tolist()}
        found = exchange.distribute(mine, index, replica_of)
        assert not mine
        tokens, mask, logprobs, experts = expected(samples, replica_of, replicas[rank()], shape)
        np.testing.assert_array_equal(found.tokens, tokens)
        np.testing.assert_array_equal(found.response_mask, mask)
        np.testing.assert_array_equal(found.rollout_logprobs, logprobs)
        assert (found.tokens.dtype, found.response_mask.dtype) == (np.int32, np.bool_)
        assert found.rollout_logprobs.dtype == np.float32
        if routing:
            assert found.routed_experts is not None
            np.testing.assert_array_equal(found.routed_experts, experts)
            assert found.routed_experts.dtype == (np.uint8 if routing.num_experts <= 256 else np.int16)
        assert not os.listdir(folder)
    return len(nodes)


LAYOUTS = {
    "one rank": ([0], [0]),
    "one node, one replica": ([0, 0], [0, 0]),
    "one node, a replica a rank": ([0, 0, 0], [0, 1, 2]),
    "a replica a node": ([0, 0, 1, 1], [0, 0, 1, 1]),
    "each replica on both nodes": ([0, 0, 1, 1], [0, 1, 0, 1]),
    "overlapping sets of nodes": ([0, 1, 1, 2], [0, 0, 1, 1]),
    "four nodes, alternating ranks": ([0, 1, 2, 3], [1, 0, 1, 0]),
    "ranks of a node apart": ([0, 1, 0, 1], [0, 0, 1, 2]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("routing", [None, ROUTING, MANY_EXPERTS], ids=["dense", "uint8", "int16"])
def test_columns_on_any_number_of_nodes(
    ranks: RankPool, tmp_path: Path, layout: str, routing: RoutingShape | None
) -> None:
    node_of, replicas = LAYOUTS[layout]
    found = ranks.run(len(node_of), columns_as_expected, node_of, replicas, routing, str(tmp_path))
    assert set(found) == {len(set(node_of))}


def exchanged(node_of: list[int], folder: str, length: int, dies: bool = False) -> str:
    """Exchange 8 sequences, 2 of each rank, each trained by the rank after its owner; return the error."""
    exchange_plan.ROUND_BYTES = 300
    here = Exchange(Nodes(f"node{node_of[rank()]}", TIMEOUT_S), rank(), folder, TIMEOUT_S)
    samples = [Sample(np.arange(length), [False] * length, [0.0] * length, "", "stop", 0) for _ in range(8)]
    index = index_of(samples, np.arange(8) // 2)
    mine = {number: samples[number] for number in (2 * rank(), 2 * rank() + 1)}
    if dies and rank() == 1:
        put: Any = _Writer.put
        calls = iter(range(100))
        _Writer.put = lambda *args: put(*args) if next(calls) < 1 else os.kill(os.getpid(), signal.SIGKILL)
    try:
        columns = here.distribute(mine, index, (index.owner + 1) % 4)
    except RunError as error:
        return f"{type(error).__name__} with {len(mine)} samples: {error}"
    assert (columns.tokens.reshape(2, -1) == np.arange(length)).all()
    return ""


def test_too_little_room_is_refused_before_anything_is_written(ranks: RankPool, tmp_path: Path) -> None:
    """A node trains 4 sequences of 50,000 tokens of 9 bytes, and its outbox has room for one more."""
    with small_disk(tmp_path / "small", "1m") as folder:
        errors = set(ranks.run(4, exchanged, [0, 0, 1, 1], str(folder), 50_000))
        assert shutil.disk_usage(folder).used == 0
    (error,) = errors
    assert error == (
        f"InputError with 2 samples: rollout.exchange_folder = '{folder}' of node 'node0' has 1.049 MB "
        "free, and the tokens of this step need 2.252 MB: enlarge that file system, choose another folder, "
        "or lower rollout.prompts_per_step"
    )


def test_a_folder_that_fills_up_ends_all_ranks_with_one_line(ranks: RankPool, tmp_path: Path) -> None:
    """There is room for each of the 4 nodes, but not for all: 4 x (0.9 MB and the outbox)."""
    with small_disk(tmp_path / "small", "2m") as folder:
        errors = set(ranks.run(4, exchanged, [0, 1, 2, 3], str(folder), 50_000))
        assert shutil.disk_usage(folder).used == 0
    (error,) = errors
    assert error.startswith(
        f"DiskFullError with 0 samples: the file system {folder} is full (No space left on device)"
    )


def test_a_killed_rank_ends_the_others_and_leaves_nothing(ranks: RankPool, tmp_path: Path) -> None:
    """Rank 1 is no leader and dies between two writes; the pool waits 5 s for the errors of the others."""
    with small_disk(tmp_path / "small", "4m") as folder:
        with pytest.raises(AssertionError) as error:
            ranks.run(4, exchanged, [0, 0, 1, 1], str(folder), 5_000, True)
        assert shutil.disk_usage(folder).used == 0
        assert not os.listdir(folder)
    assert "rank 1 of 4:\nthe process ended with exit code -9" in str(error.value)
    for other in (0, 2, 3):
        assert f"rank {other} of 4:\nTraceback" in str(error.value), error.value
    assert "gloo" in str(error.value)
