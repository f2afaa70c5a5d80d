"""Measure how full and how balanced packed microbatches are, compared with sequential filling and padding.

Run: python -m benchmarks.packing
"""

from __future__ import annotations

import json
import math
import time

import numpy as np

from megatron_gmpo.batch.packing import cost, plan_microbatches

MAX_TOKENS = 8192
SEQUENCES, DATA_PARALLEL_SIZE, SEEDS = 1024, 8, 20
MANY_SEQUENCES = 8192

Plan = list[list[list[int]]]


def lognormal_lengths(count: int, seed: int) -> list[int]:
    """Draw lognormal response lengths: median 500 tokens, sigma 1, at most ``MAX_TOKENS``."""
    lengths = np.random.default_rng(seed).lognormal(math.log(500), 1.0, count)
    return np.clip(lengths, 1, MAX_TOKENS).astype(int).tolist()


def sequential_fill(lengths: list[int]) -> Plan:
    """Fill microbatches in order of arrival and assign them to the ranks round-robin (the peer).

    A microbatch ends when the next sequence would overflow it.
    """
    bins: list[list[int]] = []
    room = 0
    for i, length in enumerate(lengths):
        if length > room:
            bins.append([])
            room = MAX_TOKENS
        bins[-1].append(i)
        room -= length
    bins += [[] for _ in range(-len(bins) % DATA_PARALLEL_SIZE)]
    return [bins[rank::DATA_PARALLEL_SIZE] for rank in range(DATA_PARALLEL_SIZE)]


def fill(lengths: list[int], plan: Plan) -> float:
    """Return tokens over token slots."""
    return sum(lengths) / (sum(len(microbatches) for microbatches in plan) * MAX_TOKENS)


def imbalance(lengths: list[int], plan: Plan) -> tuple[float, float]:
    """Return the cost of a step over the mean cost of a rank, without and with waits at every microbatch.

    Without waits, the cost of a step is that of the most expensive rank. Under expert parallelism the ranks
    also wait for each other at every microbatch.
    """
    costs = np.array(
        [[sum(cost(lengths[i]) for i in members) for members in microbatches] for microbatches in plan]
    )
    mean = costs.sum() / len(plan)
    return costs.sum(axis=1).max() / mean, costs.max(axis=0).sum() / mean


def main() -> None:
    rows = []
    for seed in range(SEEDS):
        lengths = lognormal_lengths(SEQUENCES, seed)
        plan = plan_microbatches(lengths, max_tokens=MAX_TOKENS, data_parallel_size=DATA_PARALLEL_SIZE)
        peer = sequential_fill(lengths)
        padded_fill = sum(lengths) / (len(lengths) * max(lengths))
        rows.append(
            [
                fill(lengths, plan),
                *imbalance(lengths, plan),
                fill(lengths, peer),
                *imbalance(lengths, peer),
                padded_fill,
            ]
        )
    mean, worst = np.mean(rows, axis=0), np.min(rows, axis=0)
    many = lognormal_lengths(MANY_SEQUENCES, 0)
    start = time.perf_counter()
    plan_microbatches(many, max_tokens=MAX_TOKENS, data_parallel_size=DATA_PARALLEL_SIZE)
    seconds = time.perf_counter() - start
    print(
        json.dumps(
            {
                "benchmark": "packing",
                "fill": round(mean[0], 4),
                "fill_worst": round(worst[0], 4),
                "fill_over_sequential": round(mean[0] / mean[3], 3),
                "fill_over_padded": round(mean[0] / mean[6], 2),
                "rank_imbalance": round(mean[1], 4),
                "rank_imbalance_sequential": round(mean[4], 4),
                "step_imbalance": round(mean[2], 4),
                "step_imbalance_sequential": round(mean[5], 4),
                f"seconds_{MANY_SEQUENCES}_sequences": round(seconds, 3),
            }
        )
    )
    print(
        f"{SEQUENCES} sequences on {DATA_PARALLEL_SIZE} ranks, {SEEDS} seeds: "
        f"fill {mean[0]:.1%} (worst {worst[0]:.1%}), "
        f"{mean[0] / mean[3]:.2f} x sequential fill, {mean[0] / mean[6]:.1f} x padding to the longest; "
        f"most expensive rank {mean[1]:.3f} x the mean (sequential {mean[4]:.3f}), "
        f"with a wait at every microbatch {mean[2]:.3f} "
        f"({mean[5]:.3f}); {MANY_SEQUENCES} sequences planned in {seconds * 1000:.0f} ms"
    )


if __name__ == "__main__":
    main()
