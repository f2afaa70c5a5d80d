"""Measure a weight sync by CUDA IPC between two processes on one GPU, and the memory that it gives back.

Run: python -m benchmarks.gpu_sync [--out FOLDER]

The trainer's side is ``rollout.sglang.sync`` with ``weight_sync.route = "tensor"``. The receiver is another
process with a ``testing.weight_receiver``, which maps and copies the buckets as SGLang does. After the last
sync, a checksum shows that the receiver has every byte. On a CPU the buckets are shared memory instead.

floor        two copies of the weights, into a bucket and into the parameters, at the GPU's bandwidth:
             4 bytes of memory traffic for every byte.
not returned GPU memory that is still missing after the sync, when the trainer has emptied its caches.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, multiprocessing

from benchmarks.gpu import Report, hardware_of, median_seconds
from megatron_gmpo.command_line import Options, one_line_errors, parse_options
from megatron_gmpo.config import Positive, WeightSyncConfig
from megatron_gmpo.errors import RunError
from megatron_gmpo.platform import choose_device, start_process_group
from megatron_gmpo.rollout.sglang.servers import Server
from megatron_gmpo.rollout.sglang.sync import make_weight_sync
from megatron_gmpo.testing.weight_receiver import WeightReceiver

START_S = 120.0


class GpuSync(Options):
    """Measure a weight sync by CUDA IPC between two processes on one GPU."""

    tensors: Positive = 256
    """Number of bf16 tensors."""
    rows: Positive = 4096
    """Rows of a tensor."""
    columns: Positive = 2048
    """Columns of a tensor."""
    bucket_bytes: Positive | None = None
    """See ``weight_sync.bucket_bytes``."""
    rounds: Positive = 5
    """Measured syncs."""
    device: Literal["cuda", "cpu"] = "cuda"
    """``cpu`` only tests the benchmark, with shared memory instead of CUDA IPC."""
    out: Path = Path("runs/gpu_sync")
    """Folder that receives the figures."""


def receive(connection: Connection, device: str) -> None:
    """Serve until the trainer asks for the checksum of the parameters."""
    choose_device(device)
    receiver = WeightReceiver()
    connection.send(receiver.server.url)
    connection.recv()
    connection.send(checksum(sorted(receiver.weights[0].items())))
    receiver.close()


def checksum(named: list[tuple[str, Tensor]]) -> int:
    """Return a number that depends on every byte and on the place of its tensor."""
    return sum(
        place * int(tensor.view(torch.int16).long().sum()) for place, (_, tensor) in enumerate(named, 1)
    )


def free_bytes(device: torch.device) -> int:
    """Return the GPU's free memory when this process has emptied its caches."""
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize()
    torch.cuda.ipc_collect()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def main(options: GpuSync) -> None:
    report, device = Report("gpu_sync", options.out), choose_device(options.device)
    if device.type != "cuda":
        report.skip("weight sync by CUDA IPC")
    ours, theirs = multiprocessing.Pipe()
    processes: Any = multiprocessing.get_context("spawn" if device.type == "cuda" else "fork")
    receiver = processes.Process(target=receive, args=(theirs, options.device), daemon=True)
    receiver.start()
    if not ours.poll(START_S):
        raise RunError(f"the receiver did not start within {START_S:.0f} s")
    start_process_group(device, START_S)
    shape = (options.rows, options.columns)
    named = [
        (f"layers.{index:04}.weight", torch.randn(shape, dtype=torch.bfloat16, device=device))
        for index in range(options.tensors)
    ]
    server = Server(ours.recv())
    cfg = WeightSyncConfig(route="tensor", bucket_bytes=options.bucket_bytes, timeout_s=START_S)
    sync = make_weight_sync(cfg, "colocated", device, options.out)
    versions: Iterator[str] = (f"run-{index}" for index in range(10**6))

    def update() -> None:
        if sync.update([server], named, next(versions)).failed:
            raise RunError("the receiver failed")

    update()  # the receiver allocates its parameters
    before = free_bytes(device)
    seconds = median_seconds(update, device, options.rounds)
    missing = before - free_bytes(device)
    ours.send("checksum")
    equal = ours.poll(START_S) and ours.recv() == checksum(named)
    nbytes = sum(tensor.nbytes for _, tensor in named)
    floor = 4 * nbytes / hardware_of(device).bandwidth
    report.add(
        "Weight sync between two processes",
        {
            "route": "CUDA IPC" if device.type == "cuda" else "shared memory",
            "GB": nbytes / 1e9,
            "s": seconds,
            "GB/s": nbytes / seconds / 1e9,
            "floor s": floor,
            "over floor": seconds / floor,
            "bytes equal": equal,
            "not returned MB": missing / 1e6,
        },
    )
    sync.close()
    receiver.join(10)
    if not equal:
        raise RunError("the receiver's weights differ from the trainer's")


if __name__ == "__main__":
    with one_line_errors():
        main(parse_options(GpuSync, sys.argv[1:], "python -m benchmarks.gpu_sync"))
