"""Measure weight syncs from several senders: a part of ``python -m benchmarks.rollout --only sync``.

nodes: two processes are the ranks of two nodes. The time of a colocated sync of several servers on both nodes
is compared with that of one server on one node. The servers have no model: they map and copy the buckets, and
take as long as a copy with 0.5 GB/s, because two cores cannot copy for all of them at once. A node sends to
its own servers, so the time must not grow.

senders: two processes are two pipeline stages of a model, and one real SGLang server receives it by the
route ``distributed``. With one sender, the second stage hands its tensors to the first, which sends all.
With two, each sends its own. ``sent_gb_per_s`` counts the bytes of the model. The server loads one bucket at
a time, whoever sent it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing

from megatron_gmpo.config import Config, SGLangConfig, WeightSyncConfig
from megatron_gmpo.distributed import Nodes, rank
from megatron_gmpo.errors import RunError
from megatron_gmpo.models.description import describe_model
from megatron_gmpo.platform import prepare_megatron
from megatron_gmpo.policy.parallel import start_model_parallel
from megatron_gmpo.policy.policy import Policy
from megatron_gmpo.rollout.sglang.processes import LocalServers
from megatron_gmpo.rollout.sglang.servers import Server
from megatron_gmpo.rollout.sglang.sync import make_weight_sync
from megatron_gmpo.testing.weight_receiver import WeightReceiver

CPU = torch.device("cpu")
RANKS, ROUNDS = 2, 5
NODES, SERVERS_PER_NODE = ("a", "b"), 2
TENSORS, TENSOR_BYTES = 64, 4 * 2**20
RECEIVED_PER_S = 0.5e9
BUCKET_BYTES = 64 * 2**20
TIMEOUT_S = 300.0


def measure_nodes(folder: Path) -> dict[str, Any]:
    """Return seconds of a colocated sync of one server, and of several on two nodes."""
    receivers = [
        WeightReceiver(node, bytes_per_second=RECEIVED_PER_S)
        for node in NODES
        for _ in range(SERVERS_PER_NODE)
    ]
    servers = [receiver.server for receiver in receivers]
    one, several = on_ranks(folder, sync_nodes, servers)
    for receiver in receivers:
        receiver.close()
    print(f"colocated on two nodes: {len(servers)} servers {several:.2f} s, one server {one:.2f} s")
    return {"n_servers": len(servers), "n_servers_over_one": round(several / one, 2)}


def sync_nodes(servers: list[Server]) -> list[float]:
    """Return the best seconds of a sync of the first server, and of all."""
    tensors = [(f"weight_{i}", torch.zeros(TENSOR_BYTES, dtype=torch.uint8)) for i in range(TENSORS)]
    cfg = WeightSyncConfig(bucket_bytes=BUCKET_BYTES)
    sync = make_weight_sync(cfg, "colocated", CPU, Path("unused"), nodes=Nodes(NODES[rank()]))
    return [best(lambda to=to: sync.update(to, tensors, "benchmark")) for to in (servers[:1], servers)]


def measure_senders(model: Path, folder: Path) -> dict[str, Any]:
    """Return the speed of a sync with one and with two senders."""
    local = LocalServers(str(model), 1, SGLangConfig(), folder / "servers", dtype="bf16", seed=0, device=CPU)
    local.start()
    try:
        local.wait_ready()
        nbytes, one, two = on_ranks(folder, sync_stages, local.servers, model)
    finally:
        local.stop()
    print(
        f"distributed, {nbytes / 1e6:.0f} MB of two stages: one sender {one:.2f} s, two senders {two:.2f} s "
        f"({one / two:.2f} times as fast)"
    )
    return {
        "sent_gb_per_s": [round(nbytes / one / 1e9, 2), round(nbytes / two / 1e9, 2)],
        "two_senders_speedup": round(one / two, 2),
    }


def sync_stages(servers: list[Server], model: Path) -> list[float]:
    """Return the bytes of the model, and the best seconds of a sync with one sender and with two."""
    cfg = Config.model_validate(
        {"model": {"path": str(model)}, "parallel": {"pipeline_model_parallel_size": RANKS}}
    )
    prepare_megatron(CPU)
    groups = start_model_parallel(cfg.parallel, cfg.seed, cfg.distributed_timeout_s)
    policy = Policy(cfg, describe_model(cfg, RANKS, CPU), groups, CPU, trainable=False)
    export = policy.export_hf()
    sync_cfg = WeightSyncConfig(bucket_bytes=BUCKET_BYTES, in_flight="abort")
    taken: list[float] = []
    for weights in (Complete(export), export):
        sync = make_weight_sync(sync_cfg, "disaggregated", CPU, Path("unused"))
        taken.append(best(lambda w=weights, s=sync: s.update(servers, w, "benchmark")))
        sync.close()
    return [sum(tensor.nbytes for _, tensor in export), *taken]


class Complete:
    """The complete export, which every rank gets and rank 0 sends."""

    def __init__(self, export: Any) -> None:
        self._export = export

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self._export)


def best(update: Callable[[], Any]) -> float:
    """Return the fastest of some syncs, in seconds."""
    seconds = []
    for _ in range(ROUNDS):
        dist.barrier()
        start = time.perf_counter()
        if update().failed:
            raise RuntimeError("a server failed")
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def on_ranks(folder: Path, function: Callable[..., list[float]], *args: Any) -> list[float]:
    """Return the result of rank 0 of two processes that call ``function``."""
    processes = multiprocessing.get_context("spawn")
    ours, theirs = processes.Pipe()
    store = str(folder / function.__name__)
    ranks = [
        processes.Process(target=run_rank, args=(index, store, function, args, theirs), daemon=True)
        for index in range(RANKS)
    ]
    for process in ranks:
        process.start()
    if not ours.poll(TIMEOUT_S):
        raise RunError(f"{function.__name__} took more than {TIMEOUT_S:.0f} s")
    result = ours.recv()
    for process in ranks:
        process.join()
    return result


def run_rank(
    index: int, store: str, function: Callable[..., list[float]], args: Any, results: Connection
) -> None:
    """Call ``function`` as rank ``index``; rank 0 sends its result."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=index, world_size=RANKS)
    found = function(*args)
    if index == 0:
        results.send(found)
    dist.destroy_process_group()
