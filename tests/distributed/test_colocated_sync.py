"""Weight sync to colocated servers on several nodes, emulated by the names of the ranks' nodes.

The servers have no model: they keep the tensors that they map. A "GPU" is a rank's memory on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_gmpo.config import WeightSyncConfig
from megatron_gmpo.distributed import Nodes
from megatron_gmpo.errors import InputError
from megatron_gmpo.rollout.sglang.servers import Server
from megatron_gmpo.rollout.sglang.sync.route import SyncReport
from megatron_gmpo.rollout.sglang.sync.shared import CudaIpcSync, SharedMemorySync
from megatron_gmpo.testing.weight_receiver import WeightReceiver

from ..support.ranks import RankPool

CPU = torch.device("cpu")
NODES = ("a", "a", "b", "b")
SHAPES = [(3, 5), (7,), (40, 4), (2, 2), (1,)]
BUCKET_BYTES = 400  # two buckets of 200 bytes: the tensors take several, and one is larger than a bucket

Outcome = SyncReport | str


def export() -> Iterator[tuple[str, Tensor]]:
    """Yield tensors whose values are this rank's number, so that they show whose memory a server mapped.

    Each is made by a collective of all ranks, as in the export of a model.
    """
    for i, shape in enumerate(SHAPES):
        ranks = torch.empty(dist.get_world_size())
        dist.all_gather_into_tensor(ranks, torch.tensor([float(dist.get_rank())]))
        yield f"weight_{i}", ranks[dist.get_rank()].expand(shape).contiguous()


def sync_on_a_rank(
    nodes: Sequence[str],
    kind: Callable[..., CudaIpcSync | SharedMemorySync],
    syncs: list[list[Server]],
    verify: bool = False,
    export: Callable[[], Iterator[tuple[str, Tensor]]] = export,
) -> list[Outcome]:
    """Sync to each list of servers in turn; return the reports, or the lines of errors."""
    cfg = WeightSyncConfig(bucket_bytes=BUCKET_BYTES, timeout_s=30.0, verify=verify)
    torch.multiprocessing.set_sharing_strategy("file_system")  # descriptors reach child processes only
    sync = kind(cfg, CPU, False, Nodes(nodes[dist.get_rank()], 30.0))
    outcomes: list[Outcome] = []
    for number, servers in enumerate(syncs):
        try:
            outcomes.append(sync.update(servers, export(), f"run-{number}"))
        except InputError as error:
            outcomes.append(str(error))
    return outcomes


@pytest.fixture
def fakes() -> Iterator[Callable[..., WeightReceiver]]:
    """Return ``fake(node, first_gpu, tensor_parallel_size)``; the servers end with the test."""
    made: list[WeightReceiver] = []

    def make(*args: Any) -> WeightReceiver:
        made.append(WeightReceiver(*args))
        return made[-1]

    yield make
    for fake in made:
        fake.close()


def sources(fake: WeightReceiver) -> list[float]:
    """Return the trainer rank whose memory each of the server's ranks mapped."""
    for weights in fake.weights:
        assert [(name, tuple(tensor.shape)) for name, tensor in weights.items()] == [
            (f"weight_{i}", shape) for i, shape in enumerate(SHAPES)
        ]
    values = [{tensor.unique().item() for tensor in weights.values()} for weights in fake.weights]
    return [value for each in values for value in each]


def test_each_server_maps_the_gpus_of_its_own_node(
    ranks: RankPool, fakes: Callable[..., WeightReceiver]
) -> None:
    """Whatever server is ready first, the server on GPU i of a node maps the memory of the node's rank i."""
    of_a, of_b, rest_of_b = fakes("a", 0, 2), fakes("b", 1), fakes("b", 0)
    a, b, rest = of_a.server, of_b.server, rest_of_b.server
    reports = ranks.run(4, sync_on_a_rank, NODES, CudaIpcSync, [[b], [a, b], [rest, b, a]])
    assert sources(of_a) == [0, 1]
    assert sources(of_b) == [3]
    assert sources(rest_of_b) == [2]
    assert all(each == reports[0] for each in reports)
    for report in reports[0]:
        assert report.failed == ()
        assert report.nbytes == sum(tensor.nbytes for tensor in map(torch.zeros, SHAPES))


@pytest.mark.parametrize(
    "nodes", [("a",) * 4, ("a", "a", "b", "b"), ("a", "b", "b", "b"), ("a", "b", "c", "d")], ids="-".join
)
def test_on_a_cpu_the_first_rank_of_each_node_sends(
    nodes: tuple[str, ...], ranks: RankPool, fakes: Callable[..., WeightReceiver]
) -> None:
    servers = {node: [fakes(node, 0, 2), fakes(node)] for node in sorted(set(nodes), reverse=True)}
    everywhere = [fake.server for each in servers.values() for fake in each]
    ranks.run(4, sync_on_a_rank, nodes, SharedMemorySync, [everywhere])
    for node, (two_ranks, one_rank) in servers.items():
        assert sources(two_ranks) == [nodes.index(node)] * 2
        assert sources(one_rank) == [nodes.index(node)]


def test_a_server_that_fails_on_one_node(ranks: RankPool, fakes: Callable[..., WeightReceiver]) -> None:
    good, bad = fakes("a"), fakes("b")
    bad.status = 400
    outcomes = ranks.run(4, sync_on_a_rank, NODES, CudaIpcSync, [[good.server, bad.server]] * 2)
    assert all(report.failed == (bad.server,) for each in outcomes for report in each)
    assert sources(good) == [0]
    assert bad.version == "default"
    for fake in (good, bad):
        assert fake.paths[-1] == "/continue_generation"

    bad.status = 401
    outcomes = ranks.run(4, sync_on_a_rank, NODES, CudaIpcSync, [[good.server, bad.server]])
    assert (
        outcomes
        == [
            [
                f"{bad.server.url} refuses the API key (HTTP 401 to /update_weights_from_tensor): "
                "set SGLANG_ADMIN_API_KEY to the server's key"
            ]
        ]
        * 4
    )
    for fake in (good, bad):
        assert fake.paths[-1] == "/continue_generation"


def same_export() -> Iterator[tuple[str, Tensor]]:
    """Yield tensors that are equal on all ranks."""
    return ((name, torch.ones_like(tensor)) for name, tensor in export())


def test_weights_are_compared_across_nodes(ranks: RankPool, fakes: Callable[..., WeightReceiver]) -> None:
    """No node finds the wrong server among its own; two of three servers are right, but not one of two."""
    first, second, wrong = fakes("a"), fakes("b"), fakes("b")
    wrong.is_wrong = True
    everyone = [first.server, wrong.server, second.server]
    syncs = [everyone, [first.server, wrong.server]]
    for majority, tie in ranks.run(4, sync_on_a_rank, NODES, SharedMemorySync, syncs, True, same_export):
        assert majority.failed == (wrong.server,)
        assert set(tie.failed) == {first.server, wrong.server}
    assert wrong.paths[-3:] == ["/end_weight_update", "/abort_request", "/continue_generation"]


@pytest.mark.parametrize(
    ("servers", "line"),
    [
        (
            [Server("http://c:1", node="c")],
            "rollout server http://c:1 runs on node 'c', and the trainer has ranks on 'a', 'b' only: "
            "start the server there, or set weight_sync.route = 'disk'",
        ),
        (
            [
                Server("http://b:1", node="b"),
                Server("http://b:2", node="b", first_gpu=1, tensor_parallel_size=2),
            ],
            "rollout server http://b:2 uses GPU 2 of node 'b', and the trainer has 2 ranks there: "
            "start fewer servers on each node, or more ranks",
        ),
        (
            [Server("http://a:1", node="a"), Server("http://b:1", node="b"), Server("http://b:2", node="b")],
            "rollout servers http://b:1 and http://b:2 both use GPU 0 of node 'b': "
            "give each server GPUs of its own with --base-gpu-id",
        ),
    ],
    ids=["a node without ranks", "more GPUs than ranks", "two servers on a GPU"],
)
def test_servers_that_match_no_rank_are_refused(ranks: RankPool, servers: list[Server], line: str) -> None:
    assert ranks.run(4, sync_on_a_rank, NODES, CudaIpcSync, [servers]) == [[line]] * 4
