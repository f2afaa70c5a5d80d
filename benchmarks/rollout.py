"""Measure weight syncs of 200 MB to SGLang on this CPU, and the overhead of our client.

Run: python -m benchmarks.rollout [--only sync|client|episodes|answers]   (sync, client and episodes need make
sglang and two to six minutes each)

sync: compares each route with a memcpy of the same bytes. A sync is the whole ``update``: it pauses the
server, packs and sends the weights, waits until the server has copied them into its parameters, checks the
version and continues generation. The memcpy copies between two warm buffers in one thread. ``map_and_copy``
is the minimum that a receiver can do: another process maps the bytes from /dev/shm and copies them once.
The measurements alternate, and the best round of each counts. The tensor route should reach at least 0.4 of
the memcpy's bandwidth. A scheduler that is paused with ``retract`` spins on a core (SGLang's
event_loop_normal). The syncs pause with ``abort`` instead: nothing is in flight, so ``abort`` costs nothing
on a machine with two cores. Then it measures several senders (``benchmarks.weight_sync``) and the export of a
model of 18,867 tensors (``benchmarks.export``).

client: CPU seconds of the client's thread over wall seconds, with 64 in-flight requests to a server of a
tiny model, which spends little time on each request. The target is below 0.05. CPU milliseconds per request
depend less on the server's speed.

episodes: the same with 64 episodes of four turns at a time: the client also renders and encodes the
observations and talks to the processes of the environments. The target is below 0.05. It also measures the
CPU time of a turn with a scripted server, whose speed does not matter.

answers: microseconds per token to read an answer into columns, without and with routed experts of 48 layers
and top-8. The target with routed experts is below 2. orjson alone, which makes Python lists, is the peer.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import orjson
import pybase64
import torch
from torch import multiprocessing

from benchmarks.episodes import measure_episodes
from benchmarks.export import Choices, measure_export
from benchmarks.served import CONCURRENT, served_client
from benchmarks.weight_sync import measure_nodes, measure_senders
from megatron_gmpo.batch.samples import Prompt
from megatron_gmpo.command_line import Options, one_line_errors, parse_options
from megatron_gmpo.config import Positive, SGLangConfig, WeightSyncConfig
from megatron_gmpo.rollout.ending import Ending
from megatron_gmpo.rollout.engine import SamplingParams
from megatron_gmpo.rollout.sglang.answer import parse_answer
from megatron_gmpo.rollout.sglang.processes import LocalServers
from megatron_gmpo.rollout.sglang.sync import make_weight_sync
from megatron_gmpo.testing.tiny_models import make_tiny_model
from megatron_gmpo.testing.tiny_tokenizers import text_tokenizer
from megatron_gmpo.weights.safetensors_folder import SafetensorsFolder

CPU = torch.device("cpu")
Route = Literal["disk", "distributed", "tensor"]
ROUNDS = 12
TENSOR_LIMIT = 0.4
NEW_TOKENS = 64
CLIENT_LIMIT = 0.05
ANSWER_TOKENS, ANSWER_LIMIT = 8000, 2.0


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def map_and_copy(connection: Connection) -> None:
    target = None
    while (shared := connection.recv()) is not None:
        target = torch.empty_like(shared) if target is None else target
        target.copy_(shared)
        del shared
        connection.send(True)


def make_model(folder: Path) -> None:
    """Write a model of 200 MB in bf16."""
    make_tiny_model(
        folder, family="qwen3", num_layers=8, hidden_size=1024, ffn_hidden_size=4096, dtype=torch.bfloat16
    )


def measure_sync(folder: Path, bucket_bytes: int) -> None:
    make_model(folder / "model")
    result = {
        "benchmark": "weight_sync",
        **measure_routes(folder, bucket_bytes),
        **measure_nodes(folder),
        **measure_senders(folder / "model", folder / "senders"),
        "export": measure_export(Choices()),
    }
    print(json.dumps(result))


def measure_routes(folder: Path, bucket_bytes: int) -> dict[str, Any]:
    model = SafetensorsFolder(folder / "model")
    tensors = [(name, model.get(name)) for name in model.names]
    source = torch.cat([tensor.view(-1).view(torch.uint8) for _, tensor in tensors])
    target = torch.empty_like(source)
    shared = source.clone().share_memory_()
    ours, theirs = multiprocessing.Pipe()
    multiprocessing.get_context("spawn").Process(target=map_and_copy, args=(theirs,), daemon=True).start()
    servers = LocalServers(
        str(folder / "model"), 1, SGLangConfig(), folder / "servers", dtype="bf16", seed=0, device=CPU
    )
    servers.start()
    routes = {
        route: make_weight_sync(
            WeightSyncConfig(route=route, bucket_bytes=bucket_bytes, in_flight="abort"),
            "colocated",
            CPU,
            folder,
        )
        for route in get_args(Route)
    }
    try:
        servers.wait_ready()
        taken: dict[str, list[float]] = {name: [] for name in ("memcpy", "map_and_copy", *routes)}
        for number in range(ROUNDS):
            taken["memcpy"].append(seconds(lambda: target.copy_(source)))
            taken["map_and_copy"].append(seconds(lambda: (ours.send(shared), ours.recv())))
            for name, route in routes.items():
                report = route.update(servers.servers, tensors, f"{name}-{number}")
                assert not report.failed
                assert report.nbytes == len(source)
                taken[name].append(report.seconds)
        ours.send(None)
        for route in routes.values():
            route.close()
    finally:
        servers.stop()
    speed = {name: len(source) / min(times) for name, times in taken.items()}
    for name in taken:
        print(f"{name:12} {speed[name] / 1e9:7.2f} GB/s {speed[name] / speed['memcpy']:7.3f} of memcpy")
    ratios = {name: round(speed[name] / speed["memcpy"], 3) for name in taken if name != "memcpy"}
    return {
        "megabytes": round(len(source) / 1e6),
        "memcpy_gb_per_s": round(speed["memcpy"] / 1e9, 2),
        "of_memcpy": ratios,
        "within_limit": ratios["tensor"] >= TENSOR_LIMIT,
    }


def measure_client(folder: Path) -> None:
    prompts = [Prompt(str(i), "", input_ids=[5 + i % 11, 6, 7, *range(5, 15)]) for i in range(4 * CONCURRENT)]
    sampling = SamplingParams(max_new_tokens=NEW_TOKENS)
    ending = Ending(text_tokenizer(), set())
    with served_client(folder) as client:
        # Warm up the server and the connections.
        client.submit("warm up", prompts[:CONCURRENT], sampling, ending).result(600)
        start = time.perf_counter()
        in_client = client.cpu_seconds()
        answers = client.submit("measured", prompts, sampling, ending).result(1800).values()
        total, in_client = time.perf_counter() - start, client.cpu_seconds() - in_client
    tokens = sum(len(response.tokens) for row in answers for response in row)
    assert tokens == len(prompts) * NEW_TOKENS
    share, per_request = in_client / total, in_client / len(prompts)
    print(
        f"{len(prompts)} requests, {CONCURRENT} in flight: {tokens / total:.0f} tokens/s; the client takes "
        f"{in_client:.2f} CPU seconds of {total:.1f} s"
    )
    result = {
        "benchmark": "client_overhead",
        "share": round(share, 4),
        "milliseconds_per_request": round(1e3 * per_request, 3),
        "within_limit": share < CLIENT_LIMIT,
    }
    print(json.dumps(result))


def measure_answers(folder: Path) -> None:
    random = np.random.default_rng(0)
    tokens = random.integers(0, 150_000, ANSWER_TOKENS).tolist()
    logprobs = random.standard_exponential(ANSWER_TOKENS, np.float32).tolist()
    about: dict[str, Any] = {"weight_version": "benchmark-0", "finish_reason": {"type": "length"}}
    about["output_token_logprobs"] = [[-x, token, None] for x, token in zip(logprobs, tokens, strict=True)]
    answer = {"text": "x" * 4 * ANSWER_TOKENS, "output_ids": tokens, "meta_info": about}
    plain = orjson.dumps(answer)
    experts = random.integers(0, 128, ANSWER_TOKENS * 48 * 8).astype("<i4")
    about["routed_experts"] = pybase64.b64encode(experts.tobytes()).decode()
    routed = orjson.dumps(answer)
    result: dict[str, Any] = {"benchmark": "answers"}
    for name, content in (("", plain), ("_r3", routed)):
        readers = {"": partial(parse_answer, content, "benchmark"), "orjson_": partial(orjson.loads, content)}
        for reader, read in readers.items():
            best = min(seconds(read) for _ in range(ROUNDS))
            result[f"{reader}us_per_token{name}"] = round(1e6 * best / ANSWER_TOKENS, 2)
    result["within_limit"] = result["us_per_token_r3"] < ANSWER_LIMIT
    print(json.dumps(result))


class Benchmark(Options):
    """Measure weight syncs and the client's overhead with a server on this CPU."""

    only: Literal["sync", "client", "episodes", "answers"] | None = None
    """Part to measure; None measures all."""
    bucket_megabytes: Positive = 128
    """``weight_sync.bucket_bytes`` in MiB."""


def main(options: Benchmark) -> None:
    for name, measure in (
        ("sync", partial(measure_sync, bucket_bytes=options.bucket_megabytes * 2**20)),
        ("client", measure_client),
        ("episodes", measure_episodes),
        ("answers", measure_answers),
    ):
        if options.only in (None, name):
            with tempfile.TemporaryDirectory() as folder:
                measure(Path(folder))


if __name__ == "__main__":
    with one_line_errors():
        main(parse_options(Benchmark, sys.argv[1:], "python -m benchmarks.rollout"))
