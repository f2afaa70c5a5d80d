"""How fast do weights reach an SGLang server on this CPU? A model of 200 MB in bf16 by each route, beside a memcpy of the same bytes.

Run: python -m benchmarks.rollout --only sync   (needs make sglang; about two minutes)

A sync is the whole ``update``: pause, pack, requests, the server's own copy into its parameters, its version checked, continue. The
memcpy is one thread's between two warm buffers, measured in turn with the syncs; of each the best of some rounds counts. The tensor route
is wanted at 0.4 of the memcpy's bandwidth at least. A scheduler that is paused to ``retract`` spins on a core (SGLang's event_loop_normal);
nothing is in flight here, so the syncs pause as for ``abort``, which costs a machine of two cores nothing.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

import torch
import tyro

from megatron_gmpo.checkpoint.safetensors_folder import SafetensorsFolder
from megatron_gmpo.config import SGLangConfig, WeightSyncConfig
from megatron_gmpo.rollout.servers import LocalServers
from megatron_gmpo.rollout.weight_sync import make_weight_sync
from tools.make_tiny_model import make_tiny_model

CPU = torch.device("cpu")
Route = Literal["disk", "distributed", "tensor"]
ROUNDS = 8
TENSOR_LIMIT = 0.4


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measure_sync(folder: Path, bucket_bytes: int) -> None:
    make_tiny_model(folder / "model", family="qwen3", num_layers=8, hidden_size=1024, ffn_hidden_size=4096, dtype=torch.bfloat16)
    model = SafetensorsFolder(folder / "model")
    tensors = [(name, model.get(name)) for name in model.names]
    source = torch.cat([tensor.view(-1).view(torch.uint8) for _, tensor in tensors])
    target = torch.empty_like(source)
    servers = LocalServers(str(folder / "model"), 1, SGLangConfig(), folder / "servers", dtype="bf16", seed=0, device=CPU)
    servers.start()
    routes = {
        route: make_weight_sync(WeightSyncConfig(route=route, bucket_bytes=bucket_bytes, in_flight="abort"), "colocated", CPU, folder)
        for route in get_args(Route)
    }
    try:
        servers.wait_ready()
        taken: dict[str, list[float]] = {name: [] for name in ("memcpy", *routes)}
        for number in range(ROUNDS):
            taken["memcpy"].append(seconds(lambda: target.copy_(source)))
            for name, route in routes.items():
                report = route.update(servers.servers, tensors, f"{name}-{number}")
                assert not report.failed
                assert report.nbytes == len(source)
                taken[name].append(report.seconds)
        for route in routes.values():
            route.close()
    finally:
        servers.stop()
    speed = {name: len(source) / min(times) for name, times in taken.items()}
    for name in taken:
        print(f"{name:12} {speed[name] / 1e9:7.2f} GB/s {speed[name] / speed['memcpy']:7.3f} of memcpy")
    ratios = {name: round(speed[name] / speed["memcpy"], 3) for name in routes}
    result = {
        "benchmark": "weight_sync",
        "megabytes": round(len(source) / 1e6),
        "memcpy_gb_per_s": round(speed["memcpy"] / 1e9, 2),
        "of_memcpy": ratios,
        "within_limit": ratios["tensor"] >= TENSOR_LIMIT,
    }
    print(json.dumps(result))


def main(only: Literal["sync"] = "sync", bucket_megabytes: int = 128) -> None:
    """
    Args:
        only: What to measure.
        bucket_megabytes: ``weight_sync.bucket_bytes``.
    """
    del only
    with tempfile.TemporaryDirectory() as folder:
        measure_sync(Path(folder), bucket_megabytes * 2**20)


if __name__ == "__main__":
    tyro.cli(main, use_underscores=True)
