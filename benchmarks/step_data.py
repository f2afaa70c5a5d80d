"""Measure memory, pickle round trip and assembly of tokens between the rollout engine and a TrainBatch.

The peer holds the same samples as Python lists with routed experts in int16. It assembles them through one
flat list per column.

Run: python -m benchmarks.step_data
"""

from __future__ import annotations

import json
import pickle
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch

from megatron_gmpo.batch.assembly import whole_batch
from megatron_gmpo.batch.columns import RoutingShape
from megatron_gmpo.batch.experts import check_experts
from megatron_gmpo.batch.samples import Prompt, Sample, SampleGroup, version_spans_of

QWEN3_30B_A3B = RoutingShape(num_layers=48, moe_layers=tuple(range(48)), num_experts=128, topk=8)
PROMPT, VOCABULARY, ROUNDS = 100, 151_936, 5


@dataclass
class ListSample:
    """Sample that consists of Python lists."""

    tokens: list[int]
    response_mask: list[bool]
    rollout_logprobs: list[float]
    token_versions: list[int]
    routed_experts: np.ndarray | None


def lists(length: int, routing: RoutingShape | None, generator: np.random.Generator) -> ListSample:
    """Make a random sample of ``length`` tokens, generated under two versions of the weights."""
    response = length - PROMPT
    experts = None
    if routing:
        scores = generator.random((length - 1, routing.num_layers, routing.num_experts), dtype=np.float32)
        experts = scores.argpartition(routing.topk)[..., : routing.topk].astype(np.int16)
    return ListSample(
        generator.integers(VOCABULARY, size=length).tolist(),
        [False] * PROMPT + [True] * response,
        [0.0] * PROMPT + (-generator.random(response, dtype=np.float32)).tolist(),
        [-1] * PROMPT + [int(version) for version in np.sort(generator.integers(1000, 1002, size=response))],
        experts,
    )


def arrays(sample: ListSample) -> Sample:
    """Convert the sample to the numpy columns of this project."""
    return Sample.from_response(
        sample.tokens[:PROMPT],
        sample.tokens[PROMPT:],
        sample.rollout_logprobs[PROMPT:],
        text="",
        finish_reason="stop",
        policy_version=1000,
        version_spans=version_spans_of(sample.token_versions[PROMPT:], start=PROMPT),
        routed_experts=sample.routed_experts,
    )


def assemble_lists(samples: list[ListSample], routing: RoutingShape | None) -> list[torch.Tensor]:
    """Return the peer's flat columns."""
    flat = [
        torch.tensor(list(chain.from_iterable(getattr(sample, name) for sample in samples)), dtype=dtype)
        for name, dtype in (
            ("tokens", torch.int64),
            ("response_mask", torch.bool),
            ("rollout_logprobs", torch.float32),
        )
    ]
    if routing:
        flat.append(torch.cat([torch.tensor(sample.routed_experts) for sample in samples]))
    return flat


def assemble_arrays(samples: list[Sample], routing: RoutingShape | None) -> Any:
    if routing:
        for number, sample in enumerate(samples):
            check_experts(number, sample, routing)
    return whole_batch([SampleGroup(Prompt("p", ""), samples)])


def bytes_of(make: Callable[[], Any]) -> int:
    """Return the memory in bytes that the result of ``make`` takes."""
    tracemalloc.start()
    kept = make()
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    del kept
    return size


def measure(
    samples: list[Any], assemble: Callable[..., Any], routing: RoutingShape | None
) -> dict[str, float]:
    """Return bytes and microseconds per token; times are the minimum over ``ROUNDS``."""
    tokens = sum(len(sample.tokens) for sample in samples)
    message = pickle.dumps(samples)
    round_trip, assembly = [], []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        received = pickle.loads(pickle.dumps(samples))
        middle = time.perf_counter()
        assemble(received, routing)
        round_trip.append(middle - start)
        assembly.append(time.perf_counter() - middle)
    return {
        "bytes": round(bytes_of(lambda: pickle.loads(message)) / tokens, 1),
        "pickled_bytes": round(len(message) / tokens, 1),
        "pickle_round_trip_us": round(1e6 * min(round_trip) / tokens, 4),
        "assembly_us": round(1e6 * min(assembly) / tokens, 4),
    }


def main() -> None:
    torch.set_num_threads(1)
    for name, routing, count, length in (
        ("dense", None, 256, 2000),
        ("48 layers, top-8", QWEN3_30B_A3B, 16, 1000),
    ):
        generator = np.random.default_rng(0)
        peer = [lists(length, routing, generator) for _ in range(count)]
        ours = [arrays(sample) for sample in peer]
        found = {
            "lists": measure(peer, assemble_lists, routing),
            "arrays": measure(ours, assemble_arrays, routing),
        }
        print(json.dumps({"model": name, "tokens": count * length, **found}))


if __name__ == "__main__":
    main()
