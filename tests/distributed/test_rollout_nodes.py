"""Clients on several nodes share the prompts of a batch, whatever happens to a node's servers.

The nodes are emulated by the names of the ranks' nodes. Their servers are scripted: a response depends on the
prompt and the seed of its sample only, as on a server with deterministic inference.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import torch.distributed as dist
from aiohttp import web
from transformers import AutoTokenizer

from megatron_gmpo.batch.index import StepIndex
from megatron_gmpo.batch.samples import Prompt, Sample, SampleGroup
from megatron_gmpo.config import Config
from megatron_gmpo.distributed import Nodes
from megatron_gmpo.errors import InputError, RunError
from megatron_gmpo.metrics.figures import value_of
from megatron_gmpo.rewards.math import MathReward
from megatron_gmpo.rollout.collect import score
from megatron_gmpo.rollout.engine import SamplingParams
from megatron_gmpo.rollout.player import make_player
from megatron_gmpo.rollout.sglang import start
from megatron_gmpo.rollout.sglang.engine import SGLangEngine
from megatron_gmpo.rollout.sglang.servers import Server
from megatron_gmpo.rollout.sglang.sync import SyncReport

from ..support.fake_sglang import Answer, FakeServer, answer_of
from ..support.ranks import RankPool

NODES = ("a", "a", "b", "b")
PROMPTS = [Prompt(str(i), "", input_ids=[5, 6, 7, 8 + i]) for i in range(12)]
SAMPLING = SamplingParams(n=2, max_new_tokens=6)

Drawn = dict[int, list[tuple[int, ...]]]
"""Responses that a rank sampled, by position."""

pytestmark = pytest.mark.timeout(120)


class Sync:
    """A weight sync that only tells the servers their version, from rank 0."""

    def __init__(self) -> None:
        self.synced: list[list[str]] = []

    def update(self, servers: Sequence[Server], tensors: Iterable[Any], version: str) -> SyncReport:
        self.synced.append([server.url for server in servers])
        if dist.get_rank() == 0:
            for server in servers:
                httpx.post(f"{server.url}/update_weight_version", json={"new_version": version}, timeout=10)
        dist.barrier()
        return SyncReport(0, 1.0, ())

    def close(self) -> None: ...


@dataclass(frozen=True)
class Outcome:
    """The results of one rank.

    Attributes:
        batches: its responses of each batch, by position; the line of an error instead of the last one.
        synced: URLs of the servers in each weight sync.
        metrics: the engine's metrics after the last batch.
    """

    batches: list[Drawn | str]
    synced: list[list[str]]
    metrics: dict[str, float]


def sample_on_a_rank(
    nodes: Sequence[str],
    servers: dict[str, list[Server]],
    model: Path,
    batches: int = 1,
    ahead: bool = False,
    killed_rank: int | None = None,
    sglang: Mapping[str, Any] = {},
    rollout: Mapping[str, Any] = {},
) -> Outcome:
    """Sample ``PROMPTS`` several times; with ``ahead``, submit each batch a step before it is needed."""
    sections = {
        "model": {"path": str(model)},
        "rollout": {"engine": "sglang", **rollout},
        "sglang": {"health_interval_s": 0.05, "hang_timeout_s": 0.3, "max_concurrent_requests": 4, **sglang},
    }
    cfg = Config.model_validate({"run_dir": str(model), **sections})
    name, sync = nodes[dist.get_rank()], Sync()
    here = Nodes(name, 60.0)
    own = servers.get(name, []) if here.is_leader else []
    route: Any = sync
    drawn: list[Drawn | str] = []
    tokenizer = AutoTokenizer.from_pretrained(model)
    player = make_player(cfg, tokenizer, 2048)
    with closing(SGLangEngine(cfg, own, None, route, tokenizer, here, player=player)) as engine:
        tickets = []
        try:
            for step in range(batches):
                engine.update_weights([], step)
                while len(tickets) <= min(step + ahead, batches - 1):
                    tickets.append(engine.submit(PROMPTS, SAMPLING))
                if dist.get_rank() == killed_rank:
                    time.sleep(0.5)  # so that requests are in flight
                    os.kill(os.getpid(), signal.SIGKILL)
                groups = engine.wait(tickets[step])
                assert all(group.prompt == PROMPTS[i] for i, group in groups.items())
                drawn.append({i: [tuple(s.tokens[4:]) for s in group.samples] for i, group in groups.items()})
        except RunError as error:
            drawn.append(f"{type(error).__name__}: {error}")
        metrics = {name: value_of(metric) for name, metric in engine.take_metrics().items()}
    return Outcome(drawn, sync.synced, metrics)


def response(body: dict[str, Any]) -> list[int]:
    """Return the tokens of a request's prompt and seed."""
    drawn = random.Random(f"{body['sampling_params']['sampling_seed']}/{body['input_ids']}")
    return [drawn.randrange(20, 120) for _ in range(body["sampling_params"]["max_new_tokens"])]


def paced(fake: FakeServer, seconds: float) -> Callable[[dict[str, Any]], Awaitable[Answer]]:
    async def generate(body: dict[str, Any]) -> Answer:
        await asyncio.sleep(seconds)
        return answer_of(body, fake.weight_version, tokens=response(body))

    return generate


@pytest.fixture
def fakes() -> Iterator[list[FakeServer]]:
    """Yield four servers that answer after 10 ms. The second one has not been started."""
    made = [FakeServer() for _ in range(4)]
    for number, fake in enumerate(made):
        fake.generate = paced(fake, 0.01)
        if number != 1:
            fake.start()
    yield made
    for fake in made:
        fake.close()


def sample(
    ranks: RankPool,
    nodes: Sequence[str],
    servers: dict[str, list[Server]],
    *arguments: Any,
    rollout: Mapping[str, Any] = {},
    **sglang: Any,
) -> list[Outcome]:
    """Call ``sample_on_a_rank`` on one rank for each name in ``nodes``; ``arguments`` follow ``servers``."""
    defaults = (None, 1, False, None)
    filled = (*arguments, *defaults[len(arguments) :], sglang, rollout)
    return ranks.run(len(nodes), sample_on_a_rank, nodes, servers, *filled)


def merged(outcomes: list[Outcome], nodes: Sequence[str], batch: int = 0) -> list[list[tuple[int, ...]]]:
    """Return the responses of all ranks in order. Each position is on one rank, the first of a node."""
    everyone: Drawn = {}
    for number, outcome in enumerate(outcomes):
        drawn = outcome.batches[batch]
        assert isinstance(drawn, dict), drawn
        assert not drawn or number == nodes.index(nodes[number])
        assert not drawn.keys() & everyone.keys()
        everyone |= drawn
    assert sorted(everyone) == list(range(len(PROMPTS)))
    return [everyone[position] for position in sorted(everyone)]


def of_nodes(fakes: list[FakeServer], *numbers: int) -> dict[str, list[Server]]:
    """Return the servers of the nodes a, b and so on; each has the server of this number."""
    return {name: [fakes[number].server] for name, number in zip("abcd", numbers, strict=False)}


def test_a_batch_does_not_depend_on_who_samples_it(
    ranks: RankPool, fakes: list[FakeServer], text_model: Path
) -> None:
    """On one node, two, and four; a node without a server takes part as well."""
    fakes[1].start()
    contents = []
    for nodes, numbers in (
        (("a", "a", "a", "a"), [0]),
        (NODES, [0, 1]),
        (("a", "b", "c", "d"), [0, 1, 2, 3]),
        (("a", "b", "c", "c"), [0, 1]),
    ):
        outcomes = sample(ranks, nodes, of_nodes(fakes, *numbers), text_model, 2)
        contents.append([merged(outcomes, nodes, batch) for batch in range(2)])
        assert all(outcome.synced == outcomes[0].synced for outcome in outcomes)
        urls = [fakes[number].server.url for number in numbers]
        # each server once a step; in the first one, a server may be ready before the others
        assert sorted(chain.from_iterable(outcomes[0].synced)) == sorted(2 * urls)
    assert all(content == contents[0] for content in contents)
    assert contents[0][0] != contents[0][1]


def test_a_slow_node_takes_fewer_prompts(ranks: RankPool, fakes: list[FakeServer], text_model: Path) -> None:
    """Both hold two prompts at a time, and one answers twenty times as fast."""
    fakes[2].generate = paced(fakes[2], 0.6)
    outcomes = sample(ranks, NODES, of_nodes(fakes, 0, 2), text_model)
    merged(outcomes, NODES)
    fast, slow = (len(outcomes[leader].batches[0]) for leader in (0, 2))
    assert 2 <= slow < fast


def test_a_node_that_draws_first_leaves_the_others_their_share(
    ranks: RankPool, fakes: list[FakeServer], text_model: Path
) -> None:
    """All prompts fit into the servers of one node; one node has twice as many servers as the other."""
    fakes[1].start()
    for fake in fakes:
        fake.generate = paced(fake, 1.0)
    servers = {"a": [fakes[0].server], "b": [fakes[2].server, fakes[3].server]}
    outcomes = sample(ranks, NODES, servers, text_model, max_concurrent_requests=100)
    merged(outcomes, NODES)
    assert [len(outcome.batches[0]) for outcome in outcomes] == [4, 0, 8, 0]


EPISODES = {"environment": "tests.support.games:Echo", "max_new_tokens": 6, "max_episode_tokens": 500}


@pytest.mark.parametrize("rollout", [{}, EPISODES], ids=["responses", "episodes"])
def test_what_a_node_without_servers_leaves_is_sampled_by_the_others(
    ranks: RankPool, fakes: list[FakeServer], text_model: Path, rollout: dict[str, Any]
) -> None:
    """Both servers of node b end in the first batch, and come back while the second one is sampled.

    Episodes that node b has begun start anew elsewhere, with the same seeds.
    """
    a, b, c = fakes[0], fakes[2], fakes[3]
    first, back = threading.Lock(), threading.Lock()

    async def end(body: dict[str, Any]) -> Answer:
        if len(b.bodies) + len(c.bodies) > 4:
            for fake in (b, c) if first.acquire(blocking=False) else ():
                threading.Thread(target=fake.stop).start()
            await asyncio.sleep(30)
        return answer_of(body, b.weight_version, tokens=response(body))

    async def start_others(body: dict[str, Any]) -> Answer:
        second = a.weight_version.endswith("-1")
        for fake in (b, c) if second and back.acquire(blocking=False) else ():
            fake.generate = paced(fake, 0.01)
            fake.weight_version = "default"
            threading.Thread(target=fake.start).start()
        await asyncio.sleep(0.5 if second else 0.05)
        return answer_of(body, a.weight_version, tokens=response(body))

    a.generate, b.generate, c.generate = start_others, end, end
    servers = {"a": [a.server], "b": [b.server, c.server]}
    outcomes = sample(ranks, NODES, servers, text_model, 2, rollout=rollout)
    for fake in fakes:
        fake.generate = paced(fake, 0.01)
    expected = sample(ranks, ("a",), of_nodes(fakes, 0), text_model, 2, rollout=rollout)
    for batch in range(2):
        assert merged(outcomes, NODES, batch) == merged(expected, ("a",), batch)
    assert outcomes[2].batches[1]
    synced = list(chain.from_iterable(outcomes[0].synced))  # the first node may be ready before the other
    for fake in (a, b, c):
        assert synced.count(fake.server.url) >= 2
    assert outcomes[0].metrics == outcomes[3].metrics
    assert outcomes[0].metrics["rollout/retries"] >= 1


def test_a_node_that_joins_late_samples_what_is_left(
    ranks: RankPool, fakes: list[FakeServer], text_model: Path
) -> None:
    a, late, first, joined = fakes[0], fakes[1], threading.Lock(), threading.Event()

    async def start_the_late_one(body: dict[str, Any]) -> Answer:
        if first.acquire(blocking=False):
            threading.Thread(target=late.start).start()
        await asyncio.to_thread(joined.wait, 30)  # so that prompts are left, on a slow machine too
        return answer_of(body, a.weight_version, tokens=response(body))

    async def join(body: dict[str, Any]) -> Answer:
        joined.set()
        return answer_of(body, late.weight_version, tokens=response(body))

    a.generate, late.generate = start_the_late_one, join
    outcomes = sample(ranks, NODES, of_nodes(fakes, 0, 1), text_model, hang_timeout_s=60.0)
    merged(outcomes, NODES)
    assert outcomes[2].batches[0]
    assert outcomes[0].synced == [[a.server.url], [late.server.url]]


def test_only_the_loss_of_all_nodes_ends_the_run(
    ranks: RankPool, fakes: list[FakeServer], text_model: Path
) -> None:
    """Every rank raises the line."""
    first = threading.Lock()

    async def end(body: dict[str, Any]) -> Answer:
        if first.acquire(blocking=False):
            for fake in fakes:
                threading.Thread(target=fake.stop).start()
        await asyncio.sleep(30)
        return {}

    for fake in fakes:
        fake.generate = end
    outcomes = sample(ranks, NODES, of_nodes(fakes, 0, 2), text_model, start_timeout_s=1.0)
    line = f"ServerError: no SGLang server has answered for 1 s: {fakes[0].server.url}"
    assert [outcome.batches for outcome in outcomes] == [
        [f"{line}; none is left on 1 other nodes either"]
    ] * 4


def test_an_error_on_one_node_is_raised_on_every_rank(
    ranks: RankPool, fakes: list[FakeServer], text_model: Path
) -> None:
    async def refuse(body: dict[str, Any]) -> Answer:
        return web.Response(status=400, text="too long")

    fakes[2].generate = refuse
    outcomes = sample(ranks, NODES, of_nodes(fakes, 0, 2), text_model)
    line = f"InputError: {fakes[2].server.url} refuses a request: too long"
    assert [outcome.batches for outcome in outcomes] == [[line]] * 4


def test_a_batch_ahead_is_shared_too(ranks: RankPool, fakes: list[FakeServer], text_model: Path) -> None:
    """Each batch is submitted a step before it is needed; its seeds are those of that step."""
    outcomes = sample(ranks, NODES, of_nodes(fakes, 0, 2), text_model, 3, True)
    for batch in range(3):
        merged(outcomes, NODES, batch)
    both = [fakes[0].server.url, fakes[2].server.url]
    *first, second, third = outcomes[0].synced
    assert [url for urls in first for url in urls] in (both, both[::-1])  # one may be ready before the other
    assert second == third == both


def test_a_killed_client_ends_the_other_ranks(fakes: list[FakeServer], text_model: Path) -> None:
    """The collective of its peers fails at once; it does not wait for its time limit of 60 s."""
    fakes[2].generate = paced(fakes[2], 30)
    pool = RankPool(4)
    start = time.monotonic()
    with pytest.raises(AssertionError) as failure:
        sample(pool, NODES, of_nodes(fakes, 0, 2), text_model, 1, False, 2)
    assert "rank 2 of 4:\nthe process ended with exit code -9" in str(failure.value)
    assert "rank 3 of 4" in str(failure.value)
    assert time.monotonic() < start + 50


def share_on_a_rank(nodes: Sequence[str], file: Path, placement: str) -> list[str]:
    rollout = {"engine": "sglang", "servers_file": str(file), "placement": placement}
    cfg = Config.model_validate({"run_dir": str(file.parent), "model": {"path": "m"}, "rollout": rollout})
    return [s.url for s in start._share_of_running_servers(cfg, Nodes(nodes[dist.get_rank()], 60.0))]


def test_running_servers_are_divided_among_the_nodes(
    ranks: RankPool, fakes: list[FakeServer], tmp_path: Path
) -> None:
    fakes[1].start()
    places = zip((fake.server.url for fake in fakes), "bbba", strict=True)
    file = tmp_path / "servers.json"
    file.write_text(json.dumps([{"url": url, "node": node} for url, node in places]))
    (tmp_path / "server_keys.json").write_text('{"api_key": "user", "admin_key": "admin"}')
    urls = [fake.server.url for fake in fakes]
    assert ranks.run(4, share_on_a_rank, NODES, file, "disaggregated") == [urls[::2], [], urls[1::2], []]
    assert ranks.run(4, share_on_a_rank, NODES, file, "colocated") == [urls[3:], [], urls[:3], []]


def started_on_a_rank(nodes: Sequence[str], run_dir: Path, placement: str, count: int) -> Any:
    rollout = {"engine": "sglang", "num_servers": count, "placement": placement}
    cfg = Config.model_validate(
        {"run_dir": str(run_dir), "model": {"path": "m"}, "rollout": rollout, "seed": 10}
    )
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    here = Nodes(nodes[dist.get_rank()], 60.0)
    address = start._address_of_node(here)
    assert address == "127.0.0.1"  # the nodes are emulated
    try:
        local = start._servers_of_node(cfg, torch.device("cpu"), here, address)
    except InputError as error:
        return str(error)
    seeds = [options["random_seed"] for options in local._options]
    return seeds, [server.first_gpu for server in local.servers], str(local._log_dir.relative_to(run_dir))


def test_servers_of_the_run_are_divided_among_the_nodes(ranks: RankPool, tmp_path: Path) -> None:
    """Disaggregated ones use GPUs after those of the node's ranks."""
    found = ranks.run(4, started_on_a_rank, NODES, tmp_path, "disaggregated", 3)
    assert found[::2] == [([10, 11], [2, 3], "servers/a"), ([12], [2], "servers/b")]
    found = ranks.run(4, started_on_a_rank, NODES, tmp_path, "colocated", 4)
    assert found[::2] == [([10, 11], [0, 1], "servers/a"), ([12, 13], [0, 1], "servers/b")]
    found = ranks.run(2, started_on_a_rank, NODES, tmp_path, "colocated", 1)
    assert found == [([10], [0], "servers")] * 2
    line = "rollout.num_servers = 3 cannot be divided among 2 nodes: choose a multiple of 2"
    assert ranks.run(4, started_on_a_rank, NODES, tmp_path, "colocated", 3) == [line] * 4


def score_on_a_rank(texts: dict[int, list[str]]) -> tuple[int, list[float]]:
    """Score responses of the ranks by position; return the timeouts and the rewards of all ranks."""
    mine = {
        dist.get_rank(): SampleGroup(
            Prompt("p", "72"),
            [Sample([1], [True], [0.0], text, "stop", 0) for text in texts.get(dist.get_rank(), [])],
        )
    }
    mine = {position // 2: group for position, group in mine.items() if group.samples}
    with MathReward(timeout_s=2, workers=2) as reward:
        timeouts = score(mine, reward)
    return timeouts, StepIndex.gather(mine, 2).reward.tolist()


@pytest.mark.slow
def test_a_reward_that_hangs_on_one_node(ranks: RankPool) -> None:
    """It counts as wrong there; nothing else is lost."""
    right, endless = "\\boxed{72}", "\\boxed{\\pi^{\\pi^{\\pi^{\\pi^{\\pi}}}}}"
    found = ranks.run(4, score_on_a_rank, {0: [right, right], 2: [endless, right, "no"]})
    assert found == [(1, [1.0, 1.0, 0.0, 1.0, 0.0])] * 4
