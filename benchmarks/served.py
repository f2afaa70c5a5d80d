"""A rollout client with one server of a tiny model on this CPU, for the benchmarks of the client."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerFast

from megatron_gmpo.config import SGLangConfig
from megatron_gmpo.rollout.sglang.client import RolloutClient
from megatron_gmpo.rollout.sglang.processes import LocalServers
from megatron_gmpo.testing.tiny_models import make_tiny_model

CONCURRENT = 64
"""Responses or episodes at a time."""


@contextmanager
def served_client(folder: Path, tokenizer: PreTrainedTokenizerFast | None = None) -> Iterator[RolloutClient]:
    """Start a server and yield its client, with the weights that the server has read.

    The model spends little time on a request, so that the client's share of the time is high.
    """
    make_tiny_model(folder / "model", family="qwen3", tokenizer=tokenizer, dtype=torch.bfloat16)
    cfg = SGLangConfig(max_concurrent_requests=CONCURRENT)
    local = LocalServers(
        str(folder / "model"), 1, cfg, folder / "servers", dtype="bf16", seed=0, device=torch.device("cpu")
    )
    client = RolloutClient(local.servers, local, cfg, "benchmark", dist.HashStore())
    try:
        local.wait_ready()
        client.expect(0)
        while not (servers := client.standing().outdated):
            time.sleep(0.1)  # interval of the question whether the client has found the server
        client.start_sync(servers)
        update = {"new_version": "benchmark-0", "abort_all_requests": False}
        server = local.servers[0]
        httpx.post(
            f"{server.url}/update_weight_version", json=update, headers=server.admin_headers, timeout=60
        ).raise_for_status()
        client.synced(servers, [])
        yield client
    finally:
        client.close()
