"""Measure weight syncs from several senders: a part of ``python -m benchmarks.rollout --only sync``.

nodes: two processes are the ranks of two nodes, and two are servers without a model, one a node, which map
and copy the buckets. The time of a colocated sync to both servers is compared with that to one server on one
node. A node sends to its own servers, so the time must not grow. But two cores cannot send and copy for both
nodes at once. So the servers are first as fast as the cores let them be, and beside their ratio stands that
of a floor: two processes, and one, that only map and copy the same bytes. Then each takes as long as a copy
with 0.2 GB/s, as if the cores were its own, again beside the floor.

senders: two processes are two pipeline stages of a model, and one real SGLang server receives it by the
route ``distributed``. With one sender, the second stage hands its tensors to the first, which sends all.
With two, each sends its own. ``sent_gb_per_s`` counts the bytes of the model. The server loads one bucket at
a time, whoever sent it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from functools import partial
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
from megatron_gmpo.rollout.sglang.sync import WeightSync, make_weight_sync
from megatron_gmpo.testing.weight_receiver import WeightReceiver

CPU = torch.device("cpu")
RANKS, ROUNDS = 2, 8
NODES = ("a", "b")
TENSORS, TENSOR_BYTES = 32, 4 * 2**20
RECEIVED_PER_S = 0.2e9
BUCKET_BYTES = 64 * 2**20
TIMEOUT_S = 300.0


def measure_nodes(folder: Path) -> dict[str, Any]:
    """Return the time of a colocated sync of several servers on two nodes over that of one, and its floor."""
    spawning = multiprocessing.get_context("spawn")
    pipes = [spawning.Pipe() for _ in NODES]
    processes = [
        spawning.Process(target=receive, args=(node, theirs), daemon=True)
        for node, (_, theirs) in zip(NODES, pipes, strict=True)
    ]
    for process in processes:
        process.start()
    receivers = [ours for ours, _ in pipes]
    servers = [receiver.recv() for receiver in receivers]
    result: dict[str, Any] = {"n_servers": len(servers), "load_average": round(os.getloadavg()[0], 1)}
    for suffix, rate in (("_of_shared_cores", float("inf")), ("", RECEIVED_PER_S)):
        for receiver in receivers:
            receiver.send(rate)
        one, several = on_ranks(folder, sync_nodes, servers)
        floors = best(*(partial(copy_on, to) for to in (receivers[:1], receivers)))
        print(
            f"colocated on two nodes, servers that receive at most {rate / 1e9:g} GB/s: "
            f"{len(servers)} servers {several:.3f} s, one {one:.3f} s; "
            f"only mapped and copied: {floors[1]:.3f} s and {floors[0]:.3f} s"
        )
        result[f"n_servers_over_one{suffix}"] = round(several / one, 2)
        result[f"n_copies_over_one{suffix}"] = round(floors[1] / floors[0], 2)
    for process in processes:
        process.terminate()
    return result


def receive(node: str, connection: Connection) -> None:
    """Serve as a server of a node. A number sets its speed; a message None maps and copies the weights."""
    torch.set_num_threads(1)
    receiver = WeightReceiver(node)
    connection.send(receiver.server)
    size = BUCKET_BYTES // 2  # one of two buckets
    memory = os.memfd_create("bucket")
    os.truncate(memory, size)
    target = torch.zeros(size, dtype=torch.uint8)
    while True:
        message = connection.recv()
        if message is not None:
            receiver.bytes_per_second = message
            continue
        for _ in range(TENSORS * TENSOR_BYTES // size):
            end = time.monotonic() + size / receiver.bytes_per_second
            target.copy_(torch.from_file(f"/proc/self/fd/{memory}", True, size, dtype=torch.uint8))
            time.sleep(max(0.0, end - time.monotonic()))  # the time that a receiver of this speed needs
        connection.send(None)


def copy_on(receivers: list[Connection]) -> None:
    """Let servers map and copy as many bytes as a sync sends to each, all at once."""
    for receiver in receivers:
        receiver.send(None)
    for receiver in receivers:
        receiver.recv()


def sync_nodes(servers: list[Server]) -> list[float]:
    """Return the best seconds of a sync of the first server, and of all."""
    tensors = [(f"weight_{i}", torch.zeros(TENSOR_BYTES, dtype=torch.uint8)) for i in range(TENSORS)]
    cfg = WeightSyncConfig(bucket_bytes=BUCKET_BYTES)
    sync = make_weight_sync(cfg, "colocated", CPU, Path("unused"), nodes=Nodes(NODES[rank()]))
    return best(*(partial(update, sync, to, tensors) for to in (servers[:1], servers)))


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
    weights = (Complete(export), export)
    syncs = [make_weight_sync(sync_cfg, "disaggregated", CPU, Path("unused")) for _ in weights]
    taken = best(*(partial(update, *each) for each in zip(syncs, [servers] * 2, weights, strict=True)))
    for sync in syncs:
        sync.close()
    return [sum(tensor.nbytes for _, tensor in export), *taken]


class Complete:
    """The complete export, which every rank gets and rank 0 sends."""

    def __init__(self, export: Any) -> None:
        self._export = export

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self._export)


def update(sync: WeightSync, servers: list[Server], weights: Any) -> None:
    """Sync once."""
    if sync.update(servers, weights, "benchmark").failed:
        raise RuntimeError("a server failed")


def best(*runs: Callable[[], object]) -> list[float]:
    """Return the least seconds of each of several runs, which alternate."""
    taken = [[seconds(run) for run in runs] for _ in range(ROUNDS)]
    return [min(each) for each in zip(*taken, strict=True)]


def seconds(run: Callable[[], object]) -> float:
    """Return the seconds of a run."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


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
