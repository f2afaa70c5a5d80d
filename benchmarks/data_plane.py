"""Measure the way of a step's tokens from the ranks that hold the samples to the ranks that train them.

Processes of one machine act as nodes of two ranks. Every rank is a data-parallel replica and holds synthetic
groups. A quarter of the sequences is trained on the node after the one that sampled them. The measured part
of a step gathers the index, moves the columns (``batch/exchange.py``) and reads them once.

- Time is the CPU time of a node's processes, divided by the tokens that the node trains.
- Memory is the peak of the private memory of a node's processes and of the node's file, above the private
  memory before the samples exist, divided by the same tokens. It includes the samples.
- Growth is the CPU time of a process on four nodes, divided by that on two nodes with half of the tokens,
  minus 1.

The peer, also on two nodes, has samples of Python lists with routed experts in int16, gathered
as pickled objects on all ranks, each of which joins all of them.

Run: python -m benchmarks.data_plane [--extrapolate]    (about a minute)
"""

from __future__ import annotations

import gc
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from megatron_gmpo.batch.columns import RoutingShape
from megatron_gmpo.batch.exchange import Exchange
from megatron_gmpo.batch.index import StepIndex, samples_of
from megatron_gmpo.batch.samples import Prompt, Sample, SampleGroup
from megatron_gmpo.command_line import Options, one_line_errors, parse_options
from megatron_gmpo.config import Positive
from megatron_gmpo.distributed import Nodes, all_gather_objects, rank, world_size

R3 = RoutingShape(num_layers=48, moe_layers=tuple(range(48)), num_experts=128, topk=8)
RANKS, SAMPLES, PROMPT, VOCABULARY = 2, 8, 100, 151_936
TIMEOUT_S = 120
LIMITS = {
    "us_per_token": 0.3,
    "bytes_per_token": 30,
    "us_per_token_r3": 1.5,
    "bytes_per_token_r3": 450,
    "growth": 0.1,
}
_POLL_S = 0.005


class Choices(Options):
    """Measure the time and the memory of a token between rollout and training."""

    tokens: Positive = 4_000_000
    """Tokens that a node trains, without routed experts."""
    tokens_r3: Positive = 1_000_000
    """Tokens that a node trains, with routed experts."""
    length: Positive = 2000
    """Mean length of a sequence."""
    rounds: Positive = 3
    """Steps; the fastest counts."""
    extrapolate: bool = False
    """Print what the measured figures mean for the example configs and for a step of 82 million tokens."""


@dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
        nodes: number of nodes.
        groups: groups of a rank.
        trained: False if no replica trains the sequences.
        lists: True for the peer.
    """

    nodes: int
    groups: int
    length: int
    rounds: int
    routing: RoutingShape | None
    trained: bool = True
    lists: bool = False

    @property
    def tokens(self) -> int:
        """Return the tokens that a node samples, and trains."""
        return RANKS * self.groups * SAMPLES * self.length


class Cost(NamedTuple):
    """CPU microseconds and bytes of a node for each token that it trains; mean CPU seconds of a process."""

    us: float
    nbytes: float
    process_s: float


@dataclass
class ListSample:
    """A sample of Python lists, for the peer."""

    tokens: list[int]
    response_mask: list[bool]
    rollout_logprobs: list[float]
    token_versions: list[int]
    routed_experts: np.ndarray | None


def lengths_of(case: Case) -> Iterator[int]:
    """Yield half of the mean length and one and a half times it, in turns."""
    for number in range(case.groups * SAMPLES):
        yield case.length // 2 * (1 + number % 2 * 2)


def sampled(case: Case, random: np.random.Generator) -> Iterator[tuple[Any, ...]]:
    """Yield tokens, log probabilities and routed experts of this rank's samples."""
    for length in lengths_of(case):
        experts = None
        if case.routing:
            count, topk = case.routing.num_experts, case.routing.topk
            first = random.integers(count, size=(length - 1, case.routing.num_layers, 1), dtype=np.uint8)
            experts = (first + np.arange(0, count, count // topk, dtype=np.uint8)) % np.uint8(count)
        yield (
            random.integers(VOCABULARY, size=length, dtype=np.int32),
            -random.random(length - PROMPT, dtype=np.float32),
            experts,
        )


def groups_of(case: Case, random: np.random.Generator) -> dict[int, SampleGroup]:
    """Return this rank's groups by their position in the step."""
    samples = [
        Sample.from_response(
            tokens[:PROMPT].tolist(),
            tokens[PROMPT:],
            logprobs,
            text="",
            finish_reason="stop",
            policy_version=0,
            routed_experts=experts,
        )
        for tokens, logprobs, experts in sampled(case, random)
    ]
    return {
        group * world_size() + rank(): SampleGroup(Prompt("p", ""), samples[group * SAMPLES :][:SAMPLES])
        for group in range(case.groups)
    }


def lists_of(case: Case, random: np.random.Generator) -> list[ListSample]:
    return [
        ListSample(
            tokens.tolist(),
            [False] * PROMPT + [True] * len(logprobs),
            [0.0] * PROMPT + logprobs.tolist(),
            [-1] * PROMPT + [1000] * len(logprobs),
            None if experts is None else experts.astype(np.int16),
        )
        for tokens, logprobs, experts in sampled(case, random)
    ]


class ByExchange:
    """A step with ``Exchange``."""

    def __init__(self, case: Case, folder: str) -> None:
        self.case = case
        nodes = Nodes(f"node{rank() // RANKS}", TIMEOUT_S)
        self._exchange = Exchange(nodes, rank(), folder, TIMEOUT_S, case.routing)

    def make(self, random: np.random.Generator) -> Any:
        return groups_of(self.case, random)

    def step(self, groups: dict[int, SampleGroup]) -> int:
        """Return the bytes of the columns in this node's file that this rank reads."""
        index = StepIndex.gather(groups, self.case.groups * world_size())
        mine = samples_of(groups, index)
        groups.clear()
        # each replica trains as many sequences as its rank has sampled
        ahead = np.where(np.arange(len(index)) % 4, 0, RANKS)
        replica_of = (index.owner + ahead) % world_size() if self.case.trained else np.full(len(index), -1)
        columns = self._exchange.distribute(mine, index, replica_of)
        kept = [column for column in vars(columns).values() if column is not None]
        for column in kept:
            column.max(initial=0)
        return sum(column.nbytes for column in kept)


class ByLists:
    """A step of the peer, with Python lists."""

    def __init__(self, case: Case, folder: str) -> None:
        self.case = case

    def make(self, random: np.random.Generator) -> Any:
        return lists_of(self.case, random)

    def step(self, mine: list[ListSample]) -> int:
        samples = [sample for part in all_gather_objects(mine) for sample in part]
        kept = [
            torch.tensor(list(chain.from_iterable(getattr(sample, name) for sample in samples)), dtype=dtype)
            for name, dtype in (
                ("tokens", torch.int64),
                ("response_mask", torch.bool),
                ("rollout_logprobs", torch.float32),
            )
        ]
        if routing := self.case.routing:
            stacked = np.full((len(kept[0]), routing.num_layers, routing.topk), -1, np.int16)
            start = 0
            for sample in samples:
                stacked[start : start + len(sample.tokens) - 1] = sample.routed_experts
                start += len(sample.tokens)
            kept.append(torch.from_numpy(stacked))
        return 0


def private_bytes(process: int) -> int:
    """Return the private memory of a process."""
    status = Path(f"/proc/{process}/status").read_text()
    (kilobytes,) = re.findall(r"^RssAnon:\s+(\d+) kB$", status, re.MULTILINE)
    return 1024 * int(kilobytes)


def file_bytes(process: int, folder: str) -> int:
    """Return the memory of the files without a name that a process has open in ``folder``."""
    total = 0
    for link in Path(f"/proc/{process}/fd").iterdir():
        try:
            if os.readlink(link).startswith(folder):
                total += 512 * link.stat().st_blocks
        except FileNotFoundError:  # closed meanwhile
            continue
    return total


def work(connection: Connection, case: Case, number: int, folder: str) -> None:
    """Take steps as rank ``number``. Send the private memory at the start, and the figures at the end."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=number, world_size=case.nodes * RANKS
    )
    way = ByLists(case, folder) if case.lists else ByExchange(case, folder)
    random = np.random.default_rng(number)
    gc.collect()
    connection.send(private_bytes(os.getpid()))
    seconds = []
    used = 0
    for _ in range(case.rounds):
        made = way.make(random)
        dist.barrier()
        start = time.process_time()
        columns = way.step(made)
        seconds.append(time.process_time() - start)
        used = max(used, private_bytes(os.getpid()) + columns)
        dist.barrier()
    connection.send((min(seconds), used))
    dist.barrier()
    dist.destroy_process_group()


def measure(case: Case) -> Cost:
    """Run a case and return its cost, of the node with the highest."""
    context = get_context("fork")
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="data_plane_") as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(case.nodes * RANKS)]
        workers = [
            context.Process(target=work, args=(sender, case, number, folder), daemon=True)
            for number, (_, sender) in enumerate(pipes)
        ]
        for worker in workers:
            worker.start()
        for _, sender in pipes:
            sender.close()
        before = [receiver.recv() for receiver, _ in pipes]
        peak = [0] * case.nodes
        members = [range(node * RANKS, (node + 1) * RANKS) for node in range(case.nodes)]
        done: dict[int, tuple[float, int]] = {}
        while len(done) < len(workers):
            for number, (receiver, _) in enumerate(pipes):
                if number not in done and receiver.poll():
                    done[number] = receiver.recv()
            for node, ranks in enumerate(members):
                pids = [workers[r].pid or 0 for r in ranks]
                now = sum(private_bytes(p) for p in pids) + file_bytes(pids[0], folder + "/#")
                peak[node] = max(peak[node], now)
            time.sleep(_POLL_S)  # interval of the samples of memory
        for worker in workers:
            worker.join()
    costs = [
        Cost(
            us=1e6 * sum(done[r][0] for r in ranks) / case.tokens,
            nbytes=(max(peak[node], sum(done[r][1] for r in ranks)) - sum(before[r] for r in ranks))
            / case.tokens,
            process_s=sum(seconds for seconds, _ in done.values()) / len(done),
        )
        for node, ranks in enumerate(members)
    ]
    return max(costs)


class Scenario(NamedTuple):
    """A step of a large run: nodes of the trainer, nodes of a replica, sequences, tokens, layers x topk."""

    name: str
    nodes: int
    nodes_of_replica: int
    sequences: int
    mean_length: int
    slots: int


SCENARIOS = (
    # lengths as in `megatron-gmpo plan`: a quarter of the longest prompt, half of the longest response
    Scenario("deepseek_r1_distill_qwen_7b", 1, 1, 128 * 8, 256 + 1500, 0),
    Scenario("qwen3_30b_a3b", 4, 1, 128 * 16, 256 + 4096, 48 * 8),
    Scenario("qwen3_235b_a22b", 8, 2, 64 * 16, 256 + 4096, 94 * 8),
    Scenario("8,192 x 10,000 tokens", 64, 1, 8192, 10_000, 48 * 8),
)


def extrapolate(costs: dict[str, Cost]) -> None:
    """Print memory and CPU time of a node with 8 ranks. Both are linear in a token's bytes of experts."""
    per_slot = R3.num_layers * R3.topk

    def at(way: str, slots: int) -> tuple[float, float]:
        plain, r3 = costs[way], costs[f"{way}_r3"]
        share = slots / per_slot
        return plain.us + share * (r3.us - plain.us), plain.nbytes + share * (r3.nbytes - plain.nbytes)

    columns = f"{'tokens':>8} {'memory':>9} {'CPU':>8}    formerly {'memory':>9} {'CPU':>9}"
    print(f"{'a node of 8 ranks':28} {columns}")
    for name, nodes, nodes_of_replica, sequences, mean_length, slots in SCENARIOS:
        total = sequences * mean_length
        share = total * nodes_of_replica / nodes
        us, nbytes = at("exchange", slots)
        # the measured nodes have 2 ranks, each of which gets the tokens of 2 nodes
        old_us, old_bytes = (value / (2 * RANKS) * 8 * total for value in at("lists", slots))
        print(
            f"{name:28} {share / 1e6:6.2f} M {nbytes * share / 1e9:6.2f} GB {us * share / 1e6:6.1f} s"
            f"    {'':8} {old_bytes / 1e9:6.0f} GB {old_us / 1e6:7.0f} s"
        )


def main() -> None:
    with one_line_errors():
        choices = parse_options(Choices, sys.argv[1:], "python -m benchmarks.data_plane")

    def case(nodes: int, tokens: int, routing: RoutingShape | None, **others: bool) -> Case:
        groups = max(1, tokens // (RANKS * SAMPLES * choices.length))
        return Case(nodes, groups, choices.length, choices.rounds, routing, **others)

    costs: dict[str, Cost] = {}
    growths: list[float] = []
    for name, routing, tokens in (("", None, choices.tokens), ("_r3", R3, choices.tokens_r3)):
        costs["exchange" + name] = two = measure(case(2, tokens, routing))
        four = measure(case(4, tokens, routing))
        growths.append(four.process_s / two.process_s - 1)
        costs["untrained" + name] = measure(case(2, tokens, routing, trained=False))
        costs["lists" + name] = measure(case(2, max(1, tokens // 10), routing, lists=True))
        for way in ("exchange", "untrained", "lists"):
            cost = costs[way + name]
            print(f"{way + name:14} {cost.us:8.3f} us {cost.nbytes:8.1f} bytes")
        print(f"{'growth' + name:14} {growths[-1]:8.1%} time {four.nbytes / two.nbytes - 1:8.1%} memory")
    if choices.extrapolate:
        extrapolate(costs)
    result = {
        "us_per_token": round(costs["exchange"].us, 4),
        "bytes_per_token": round(costs["exchange"].nbytes, 1),
        "us_per_token_r3": round(costs["exchange_r3"].us, 3),
        "bytes_per_token_r3": round(costs["exchange_r3"].nbytes, 1),
        "growth": round(max(growths), 3),
    }
    for end in ("", "_r3"):
        result[f"lists_us_per_token{end}"] = round(costs["lists" + end].us, 2)
        result[f"lists_bytes_per_token{end}"] = round(costs["lists" + end].nbytes)
    within = all(result[name] <= limit for name, limit in LIMITS.items())
    print(json.dumps({"benchmark": "data_plane", **result, "within_limits": within}))


if __name__ == "__main__":
    main()
