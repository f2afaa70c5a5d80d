"""The client of SGLang servers against scripted servers.

The tests cover retries, continued responses, restarts, and the version of the weights.
"""

from __future__ import annotations

import asyncio
import base64
import io
import itertools
import random
import resource
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch.distributed as dist
from aiohttp import web
from PIL import Image
from transformers import AutoTokenizer

from megatron_gmpo.batch.images import ImageFolder, ImageRef, digest_of
from megatron_gmpo.batch.samples import Prompt
from megatron_gmpo.config import Config, SGLangConfig
from megatron_gmpo.distributed import Nodes
from megatron_gmpo.errors import InputError, ServerError
from megatron_gmpo.rollout.ending import Ending
from megatron_gmpo.rollout.engine import SamplingParams
from megatron_gmpo.rollout.episode import Generate
from megatron_gmpo.rollout.images import RunImages, StoredImage
from megatron_gmpo.rollout.response import Context, Response
from megatron_gmpo.rollout.sglang import client as rollout_client
from megatron_gmpo.rollout.sglang import sampler
from megatron_gmpo.rollout.sglang.batches import Sampled
from megatron_gmpo.rollout.sglang.client import RolloutClient, _allow_open_files
from megatron_gmpo.rollout.sglang.engine import SGLangEngine
from megatron_gmpo.rollout.sglang.server_state import ServerState
from megatron_gmpo.rollout.sglang.servers import Server
from megatron_gmpo.rollout.sglang.sync import SyncReport
from megatron_gmpo.supervision.records import node_name
from megatron_gmpo.testing.tiny_tokenizers import text_tokenizer

from ..support.fake_sglang import Answer, FakeProcesses, FakeServer, answer_of
from ..support.groups import in_order

NONCE = "run"
PROMPT = [5, 6, 7]
ENDLESS = Ending(None, frozenset())
NUMBERS = itertools.count()
TEXT = text_tokenizer()

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "_FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(sampler, "PROBE_TIMEOUT_S", 0.3)


@pytest.fixture
def fakes() -> Iterator[list[FakeServer]]:
    """Yield two servers that have not been started."""
    made = [FakeServer(), FakeServer()]
    yield made
    for fake in made:
        fake.close()


@pytest.fixture
def client(fakes: list[FakeServer]) -> Iterator[Callable[..., RolloutClient]]:
    """Return ``make(own=False, count=1, experts=False, images=None, **fields of SGLangConfig)``.

    ``make`` starts the servers if they are external, i.e. not ``own``.
    """
    made: list[RolloutClient] = []

    def make(
        own: bool = False,
        count: int = 1,
        experts: bool = False,
        images: RunImages | None = None,
        **fields: Any,
    ) -> RolloutClient:
        cfg = SGLangConfig(**{"health_interval_s": 0.05, "hang_timeout_s": 5.0} | fields)
        local: Any = FakeProcesses(fakes[:count]) if own else None
        if not own:
            for fake in fakes[:count]:
                fake.start()
        made.append(
            RolloutClient(
                [f.server for f in fakes[:count]],
                local,
                cfg,
                NONCE,
                dist.HashStore(),
                (2, 2) if experts else None,
                images,
            )
        )
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def served(client: Callable[..., RolloutClient], fakes: list[FakeServer]) -> RolloutClient:
    """Return a client of the first server, which has the weights of step 0."""
    made = client()
    sync(made, fakes, 0)
    return made


def wait_for(holds: Callable[[], Any], timeout_s: float = 20.0) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (value := holds()):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return value


def states(client: RolloutClient) -> list[ServerState]:
    return [member.state for member in client._watcher.members]


def start_sync(client: RolloutClient) -> list[Server]:
    """Begin a sync to the servers that need it."""
    servers = list(client.standing().outdated)
    client.start_sync(servers)
    return servers


def sync(client: RolloutClient, fakes: list[FakeServer], version: int, failed: tuple[int, ...] = ()) -> None:
    """Wait until every server of the client needs weights, then give them ``version``."""
    client.expect(version)
    count = len(client._watcher.members)
    wait_for(lambda: states(client) == [ServerState.STALE] * count)
    servers = start_sync(client)
    assert servers == [fake.server for fake in fakes[:count]]
    for fake in fakes[:count]:
        fake.weight_version = f"{NONCE}-{version}"
    client.synced(servers, [fakes[i].server for i in failed])


def sample(client: RolloutClient, count: int = 1, n: int = 1, tokens: int = 4) -> list[list[Response]]:
    sampling = SamplingParams(n=n, max_new_tokens=tokens)
    rows = submit(client, [[*PROMPT, i] for i in range(count)], sampling, Ending(None, {2})).result(30)
    return [rows[position] for position in range(count)]


def submit(
    client: RolloutClient, prompts: list[list[int]], sampling: SamplingParams, ending: Ending = ENDLESS
) -> Future[Sampled[Response]]:
    named = [Prompt(str(i), "", input_ids=ids) for i, ids in enumerate(prompts)]
    return client.submit(f"batch{next(NUMBERS)}", named, sampling, ending)


async def hang(body: dict[str, Any]) -> Answer:
    await asyncio.sleep(30)
    return {}


def tokens_from(start: int, count: int) -> list[int]:
    return [100 + start + i for i in range(count)]


def assert_columns(response: Response, tokens: list[int], versions: list[int]) -> None:
    assert [c.dtype for c in (response.tokens, response.logprobs, response.versions)] == ["i4", "f4", "i4"]
    assert response.tokens.tolist() == tokens
    assert np.array_equal(response.logprobs, np.array([-token / 100 for token in tokens], np.float32))
    assert response.versions.tolist() == versions


def test_responses_come_in_order_from_the_least_loaded_server(
    client: Callable[..., RolloutClient], fakes: list[FakeServer]
) -> None:
    """Each server gets at most ``max_concurrent_requests`` at a time."""
    served = client(count=2, max_concurrent_requests=3)
    sync(served, fakes, 0)

    async def generate(body: dict[str, Any]) -> Answer:
        await asyncio.sleep(0.02)
        return answer_of(body, f"{NONCE}-0", count=1 + body["input_ids"][-1] % 3, finish="stop")

    for fake in fakes:
        fake.generate = generate
    rows = sample(served, count=10, n=2)
    assert [len(row) for row in rows] == [2] * 10
    for i, row in enumerate(rows):
        for response in row:
            assert_columns(response, tokens_from(4, 1 + i % 3), [0] * (1 + i % 3))
            assert (response.finish_reason, response.routed_experts) == ("stop", None)
    assert [fake.peak for fake in fakes] == [3, 3]
    assert all(len(fake.bodies) >= 5 for fake in fakes)
    assert sum(len(fake.bodies) for fake in fakes) == 20
    body = fakes[0].bodies[0]
    seeds = [body["sampling_params"].pop("sampling_seed") for fake in fakes for body in fake.bodies]
    assert body["sampling_params"] == {
        "temperature": 1.0, "top_p": 1.0, "top_k": -1, "stop": [], "stop_token_ids": [2], "ignore_eos": False,
        "no_stop_trim": True, "skip_special_tokens": False, "max_new_tokens": 4,
    }  # fmt: skip
    assert len(set(seeds)) == 20
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert body["return_logprob"]
    assert not body["return_routed_experts"]
    assert len({body["rid"] for fake in fakes for body in fake.bodies}) == 20
    assert served.retries == 0


def test_connections_are_kept_and_survive_a_restart_of_the_server(
    client: Callable[..., RolloutClient], fakes: list[FakeServer]
) -> None:
    """No request uses a connection that the server has closed in the meantime."""
    served = client(own=True, max_concurrent_requests=4, health_interval_s=30)
    sync(served, fakes, 0)
    for _ in range(5):
        sample(served, count=4)
    assert len(fakes[0].connections) <= 4
    assert served.local
    served.local.restart(0)
    fakes[0].weight_version = f"{NONCE}-0"
    sample(served, count=4)
    assert served.retries == 0


def test_proxies_of_the_environment_are_ignored(
    client: Callable[..., RolloutClient], fakes: list[FakeServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    served = client()
    sync(served, fakes, 0)
    assert sample(served)[0][0].tokens.tolist() == tokens_from(4, 4)
    assert fakes[0].server.weight_version(5) == f"{NONCE}-0"
    assert fakes[0].server.answers(5)


def sampled_during_a_sync(
    served: RolloutClient, fakes: list[FakeServer], generate: Callable[[dict[str, Any]], Answer]
) -> Response:
    """Return a response of 8 tokens. The server gets version 1 before it sends its first answer."""
    synced = asyncio.Event()

    async def generate_later(body: dict[str, Any]) -> Answer:
        await synced.wait()
        return generate(body)

    fakes[0].generate = generate_later
    future = submit(served, [PROMPT], SamplingParams(max_new_tokens=8))
    wait_for(lambda: fakes[0].bodies)
    sync(served, fakes, 1)
    fakes[0]._loop.call_soon_threadsafe(synced.set)
    return future.result(20)[0][0]


def test_a_response_aborted_by_a_sync_continues_with_the_new_weights(
    served: RolloutClient, fakes: list[FakeServer]
) -> None:
    def generate(body: dict[str, Any]) -> Answer:
        if len(fakes[0].bodies) > 1:
            return answer_of(body, f"{NONCE}-1")
        return answer_of(body, f"{NONCE}-0", count=3, finish="abort")

    response = sampled_during_a_sync(served, fakes, generate)
    assert_columns(response, tokens_from(3, 8), [0] * 3 + [1] * 5)
    assert response.finish_reason == "length"
    first, second = fakes[0].bodies
    assert second["input_ids"] == PROMPT + tokens_from(3, 3)
    assert (first["sampling_params"]["max_new_tokens"], second["sampling_params"]["max_new_tokens"]) == (8, 5)
    assert first["sampling_params"]["sampling_seed"] == second["sampling_params"]["sampling_seed"]
    assert first["sampling_params"]["ignore_eos"]
    assert served.retries == 0


def test_a_response_that_ends_at_the_limit_needs_no_further_request(
    served: RolloutClient, fakes: list[FakeServer]
) -> None:
    async def generate(body: dict[str, Any]) -> Answer:
        return answer_of(body, f"{NONCE}-0", finish="abort" if len(fakes[0].bodies) == 1 else "length")

    fakes[0].generate = generate
    assert sample(served, tokens=5)[0][0].tokens.tolist() == tokens_from(4, 5)
    assert len(fakes[0].bodies) == 1


def scripted(fake: FakeServer, *answers: tuple[list[int], str]) -> None:
    """Let a server give these answers (tokens, finish reason) in turn; the last one again and again."""

    async def generate(body: dict[str, Any]) -> Answer:
        tokens, finish = answers[min(len(fake.bodies), len(answers)) - 1]
        return answer_of(body, f"{NONCE}-0", finish=finish, tokens=tokens)

    fake.generate = generate


def pieces(*texts: str) -> list[int]:
    return [token for text in texts for token in TEXT.encode(text)]


A, B, C, EOS = pieces("a", "b", "c", "<|im_end|>")


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        # SGLang reports an abort before it looks for an end token
        ([([A, EOS], "abort"), ([B, C], "length")], [A, EOS]),
        ([([A], "abort"), ([B, EOS], "abort"), ([C], "length")], [A, B, EOS]),
        ([([EOS], "abort"), ([A], "length")], [EOS]),
        # a stop string that is completed by the next request
        ([([*pieces("x\nEN")], "abort"), ([*pieces("D"), A, B], "length")], pieces("x\nEND")),
        ([(pieces("xE"), "abort"), (pieces("N"), "abort"), (pieces("Dabc"), "length")], pieces("xEND")),
        ([(pieces("xEND"), "abort"), (pieces("Dabc"), "length")], pieces("xEND")),
        # one that is spelt in more tokens than its own encoding, which the server overlooks
        ([(pieces("xENDabcEND"), "length")], pieces("xEND")),
        ([(pieces("xENDabc<|im_end|>"), "stop")], pieces("xEND")),
        # one that is, or contains, a special token
        ([(pieces("a<|im_start|>"), "abort"), (pieces("b"), "length")], pieces("a<|im_start|>")),
        # the first of both
        ([(pieces("ab<|im_end|>END"), "length")], pieces("ab<|im_end|>")),
        ([(pieces("abEND<|im_end|>"), "length")], pieces("abEND")),
    ],
)
def test_a_response_ends_at_its_first_end_token_or_stop_string(
    answers: list[tuple[list[int], str]],
    expected: list[int],
    served: RolloutClient,
    fakes: list[FakeServer],
) -> None:
    """Nothing after it is kept, and nothing more is asked for."""
    scripted(fakes[0], *answers)
    ending = Ending(TEXT, {EOS}, ("END", "<|im_start|>"))
    ((response,),) = submit(served, [PROMPT], SamplingParams(max_new_tokens=20), ending).result(20).values()
    assert response.tokens.tolist() == expected
    assert len(response.logprobs) == len(response.versions) == len(expected)
    assert response.finish_reason == "stop"
    asked = next(n for n in range(1, 4) if sum(len(tokens) for tokens, _ in answers[:n]) >= len(expected))
    assert len(fakes[0].bodies) == asked


def test_a_response_is_continued_while_it_makes_progress(
    served: RolloutClient, fakes: list[FakeServer]
) -> None:
    """The server aborts each request after a token, without a sync, and often before the first token."""
    scripted(fakes[0], *([([A], "abort")] + [([], "abort")] * 4) * 6, ([B], "length"))
    response = sample(served, tokens=7)[0][0]
    assert response.tokens.tolist() == [A] * 6 + [B]
    assert served.retries == 30


def test_a_response_without_progress_is_an_error(served: RolloutClient, fakes: list[FakeServer]) -> None:
    scripted(fakes[0], *[([A], "abort")] * 6, ([], "abort"))
    with pytest.raises(
        ServerError,
        match=r"^a sample failed 5 times in a row, the last time: a server aborted it before its first "
        r"token: raise sglang\.request_timeout_s = 1200 if requests queue longer$",
    ):
        sample(served, tokens=100)
    assert len(fakes[0].bodies) == served.retries == 11


@pytest.mark.parametrize(
    ("tokens", "logprobs", "versions"),
    [(4, 5, 4), (4, 3, 4), (4, 0, 4), (0, 1, 1), (3, 4, 4), (4, 4, 3), (4, 4, 5), (3, 3, 4)],
)
def test_an_answer_whose_counts_differ_is_unusable(
    tokens: int,
    logprobs: int,
    versions: int,
    served: RolloutClient,
    fakes: list[FakeServer],
) -> None:
    """It is counted and asked for again, and ends the run if all answers are like it."""
    usable = [2]

    async def generate(body: dict[str, Any]) -> Answer:
        if len(fakes[0].bodies) in usable:
            return answer_of(body, f"{NONCE}-0")
        answer = answer_of(body, f"{NONCE}-0", count=5)
        answer["output_ids"] = answer["output_ids"][:tokens]
        about = answer["meta_info"]
        about["output_token_logprobs"] = about["output_token_logprobs"][:logprobs]
        about["weight_versions"] = [{"version": f"{NONCE}-0", "start": 0, "end": versions}]
        return answer

    fakes[0].generate = generate
    assert_columns(sample(served)[0][0], tokens_from(4, 4), [0] * 4)
    assert served.retries == 1
    usable.clear()
    url = fakes[0].server.url
    with pytest.raises(ServerError) as error:
        sample(served)
    assert str(error.value) == (
        f"a sample failed 5 times in a row, the last time: {url} answered {tokens} tokens with {logprobs} "
        f"log probabilities and weight versions of {versions} tokens"
    )
    assert served.retries == 6


def test_the_cache_of_older_weights_is_not_reused(served: RolloutClient, fakes: list[FakeServer]) -> None:
    """The key of a request's prefix cache names the weights. Tokens that are newer than it are counted."""

    def generate(body: dict[str, Any]) -> Answer:
        answer = answer_of(body, f"{NONCE}-1", count=8)
        if len(fakes[0].bodies) == 1:
            spans = [(0, 0, 3), (1, 3, 8)]
            answer["meta_info"]["weight_versions"] = [
                {"version": f"{NONCE}-{version}", "start": start, "end": end} for version, start, end in spans
            ]
        return answer

    response = sampled_during_a_sync(served, fakes, generate)
    assert_columns(response, tokens_from(3, 8), [0] * 3 + [1] * 5)
    assert served.old_cache_tokens == 5
    sample(served, tokens=8)
    assert served.old_cache_tokens == 5
    assert [body["extra_key"] for body in fakes[0].bodies] == [f"{NONCE}-0", f"{NONCE}-1"]


def test_answers_from_other_weights_are_discarded(
    client: Callable[..., RolloutClient], fakes: list[FakeServer]
) -> None:
    """Weights of another run, an older step or an incomplete sync cause a new sync of the server."""
    served = client()
    sync(served, fakes, 3)
    for retries, version in enumerate(("other-3", f"{NONCE}-2", "incomplete"), start=1):
        fakes[0].weight_version = version
        future = submit(served, [PROMPT], SamplingParams(max_new_tokens=4))
        wait_for(lambda: states(served) == [ServerState.STALE])
        assert not future.done()
        servers = start_sync(served)
        fakes[0].weight_version = f"{NONCE}-3"
        served.synced(servers, [])
        assert future.result(20)[0][0].versions.tolist() == [3] * 4
        assert served.retries == retries


def test_a_full_queue_and_server_errors_delay_a_request(
    served: RolloutClient, fakes: list[FakeServer]
) -> None:
    async def generate(body: dict[str, Any]) -> Answer:
        status = {1: 429, 2: 503, 3: 500}.get(len(fakes[0].bodies))
        return web.Response(status=status, text="busy") if status else answer_of(body, f"{NONCE}-0")

    fakes[0].generate = generate
    assert sample(served)[0][0].tokens.tolist() == tokens_from(4, 4)
    assert served.retries == 3
    assert states(served) == [ServerState.READY]


def test_a_server_that_accepts_nothing_is_an_error(
    client: Callable[..., RolloutClient], fakes: list[FakeServer]
) -> None:
    served = client(request_timeout_s=0.3)
    sync(served, fakes, 0)

    async def generate(body: dict[str, Any]) -> Answer:
        return web.Response(status=429, text="the queue\nis full")

    fakes[0].generate = generate
    with pytest.raises(
        ServerError,
        match=r"accepted no request within sglang\.request_timeout_s = 0\.3, "
        r"the last reply: the queue is full$",
    ):
        sample(served)


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, r"refuses the API key \(HTTP 401\): set SGLANG_API_KEY to the server's key$"),
        (403, r"refuses the API key \(HTTP 403\): set SGLANG_API_KEY to the server's key$"),
        (400, "refuses a request: longer than the context$"),
    ],
)
def test_a_refused_request_is_the_users_error(
    status: int, message: str, served: RolloutClient, fakes: list[FakeServer]
) -> None:
    async def generate(body: dict[str, Any]) -> Answer:
        return web.Response(status=status, text="longer than\n the context")

    fakes[0].generate = generate
    with pytest.raises(InputError, match=message):
        sample(served)
    assert served.retries == 0


def test_a_late_response_is_aborted_and_continued(
    client: Callable[..., RolloutClient], fakes: list[FakeServer]
) -> None:
    served = client(request_timeout_s=0.2)
    sync(served, fakes, 0)

    async def generate(body: dict[str, Any]) -> Answer:
        if len(fakes[0].bodies) > 1:
            return answer_of(body, f"{NONCE}-0")
        while body["rid"] not in fakes[0].aborted:
            await asyncio.sleep(0.01)
        return answer_of(body, f"{NONCE}-0", count=2, finish="abort")

    fakes[0].generate = generate
    assert sample(served, tokens=6)[0][0].tokens.tolist() == tokens_from(4, 6)
    assert fakes[0].aborted == [fakes[0].bodies[0]["rid"]]
    assert served.retries == 1


def test_a_server_whose_scheduler_hangs_is_restarted(
    client: Callable[..., RolloutClient], fakes: list[FakeServer]
) -> None:
    """The server's HTTP process answers /model_info all the time."""
    served = client(own=True, request_timeout_s=0.2, hang_timeout_s=0.5)
    sync(served, fakes, 0)
    fakes[0].generate, fakes[0].generates = hang, False
    future = submit(served, [PROMPT], SamplingParams(max_new_tokens=4))
    wait_for(lambda: states(served) == [ServerState.SILENT])
    assert served.standing().outdated == ()
    wait_for(lambda: served.restarts == 1)
    fakes[0].generate, fakes[0].generates = fakes[0].answer, True
    wait_for(lambda: states(served) == [ServerState.STALE])
    servers = start_sync(served)
    fakes[0].weight_version = f"{NONCE}-0"
    served.synced(servers, [])
    assert future.result(20)[0][0].versions.tolist() == [0] * 4


def test_a_silent_server_that_generates_again_is_ready(
    client: Callable[..., RolloutClient], fakes: list[FakeServer]
) -> None:
    served = client(request_timeout_s=0.2)
    sync(served, fakes, 0)

    async def generate(body: dict[str, Any]) -> Answer:
        if len(fakes[0].bodies) == 1:
            await asyncio.sleep(30)
        return answer_of(body, f"{NONCE}-0")

    fakes[0].generate = generate
    assert sample(served)[0][0].versions.tolist() == [0] * 4
    assert served.retries == 1
    assert states(served) == [ServerState.READY]


def test_a_server_that_dies_is_restarted_and_synced(
    client: Callable[..., RolloutClient], fakes: list[FakeServer]
) -> None:
    """The other server answers its requests, and a sync from before the restart does not count."""
    served = client(own=True, count=2)
    sync(served, fakes, 0)
    assert served.local
    fakes[0].generate = hang
    future = submit(served, [[*PROMPT, i] for i in range(4)], SamplingParams(max_new_tokens=4))
    wait_for(lambda: fakes[0].bodies)
    served.local.kill(0)  # pyright: ignore[reportAttributeAccessIssue]
    assert [row[0].tokens.tolist() for row in future.result(20).values()] == [tokens_from(4, 4)] * 4
    assert states(served)[1] is ServerState.READY
    wait_for(lambda: states(served)[0] is ServerState.STALE)
    assert (served.restarts, served.retries) == (1, 2)

    before = start_sync(served)
    assert before == [fakes[0].server]
    served.local.kill(0)  # pyright: ignore[reportAttributeAccessIssue]
    wait_for(lambda: served.restarts == 2 and states(served)[0] is ServerState.STALE)
    served.synced(before, [])
    assert states(served)[0] is ServerState.STALE
    served.synced(start_sync(served), [])
    assert states(served) == [ServerState.READY] * 2
    assert [member.life.losses for member in served._watcher.members] == [0, 0]


def test_the_version_of_a_failed_sync_is_not_trusted(
    client: Callable[..., RolloutClient], fakes: list[FakeServer]
) -> None:
    """An external server that failed a sync is synced again, although it reports the new version."""
    served = client(max_restarts=1)
    sync(served, fakes, 0, failed=(0,))
    wait_for(lambda: states(served) == [ServerState.STALE])
    assert not served.standing().ready
    served.synced(start_sync(served), [])
    assert states(served) == [ServerState.READY]
    for _ in range(2):
        served.expect(1)
        wait_for(lambda: start_sync(served))
        served.synced([fakes[0].server], [fakes[0].server])
    wait_for(lambda: states(served) == [ServerState.GIVEN_UP])
    assert served.standing().lost == (
        f"every SGLang server was lost 2 times in a row: see the log of the last one, {fakes[0].server.url}"
    )


def test_servers_that_keep_dying_are_given_up(
    client: Callable[..., RolloutClient], fakes: list[FakeServer]
) -> None:
    """The run continues while one server is left."""
    served = client(own=True, count=2, max_restarts=1)
    sync(served, fakes, 0)
    local: Any = served.local
    local.kill(0)
    wait_for(lambda: served.restarts == 1 and states(served)[0] is ServerState.STALE)
    local.kill(0)
    wait_for(lambda: states(served)[0] is ServerState.GIVEN_UP)
    assert states(served) == [ServerState.GIVEN_UP, ServerState.READY]
    assert served.standing().outdated == ()
    assert sample(served)[0][0].versions.tolist() == [0] * 4
    local.broken = True
    local.kill(1)
    wait_for(lambda: states(served)[1] is ServerState.GIVEN_UP)
    assert served.standing().lost == (
        f"every SGLang server was lost 2 times in a row: see the log of the last one, {fakes[1].server.url}"
    )
    assert served.restarts == 2


def test_a_first_start_that_fails_ends_the_run(
    client: Callable[..., RolloutClient], fakes: list[FakeServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        FakeProcesses, "wait_ready", lambda self, index: (_ for _ in ()).throw(ServerError("no GPU"))
    )
    served = client(own=True, count=2)
    wait_for(lambda: states(served) == [ServerState.GIVEN_UP] * 2)
    with pytest.raises(ServerError, match=r"^no GPU$"):
        served.standing()
    assert served.restarts == 0


def test_no_sync_before_all_of_our_own_servers_are_up(
    client: Callable[..., RolloutClient], fakes: list[FakeServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    up = [True, False]

    def wait_ready(self: FakeProcesses, index: int) -> None:
        wait_for(lambda: up[index])

    monkeypatch.setattr(FakeProcesses, "wait_ready", wait_ready)
    served = client(own=True, count=2)
    served.expect(0)
    wait_for(lambda: states(served) == [ServerState.STALE, ServerState.STARTING])
    assert served.standing().starting
    up[1] = True
    wait_for(lambda: states(served) == [ServerState.STALE] * 2)
    assert len(served.standing().outdated) == 2
    assert not served.standing().starting


def test_external_servers_that_do_not_answer_end_the_run(
    client: Callable[..., RolloutClient], fakes: list[FakeServer], caplog: pytest.LogCaptureFixture
) -> None:
    """The run ends after ``start_timeout_s``; a server that comes back earlier is used again."""
    served = client(start_timeout_s=2.0, hang_timeout_s=0.2)
    sync(served, fakes, 0)
    fakes[0].stop()
    wait_for(lambda: states(served) == [ServerState.CHECKING])
    assert served.standing().outdated == ()
    future = submit(served, [PROMPT], SamplingParams(max_new_tokens=4))
    fakes[0].start()
    assert future.result(20)[0][0].versions.tolist() == [0] * 4
    fakes[0].stop()
    wait_for(lambda: states(served) == [ServerState.CHECKING])
    lost = wait_for(lambda: served.standing().lost)
    assert lost == f"no SGLang server has answered for 2 s: {fakes[0].server.url}"
    assert [
        record.message.startswith(f"SGLang server {fakes[0].server.url} has not answered for")
        for record in caplog.records
    ] == [True, True]


def test_a_bug_in_a_watcher_ends_the_run(served: RolloutClient, fakes: list[FakeServer]) -> None:
    async def fail(member: Any, version: str) -> None:
        raise ZeroDivisionError("a bug")

    served._watcher._found = fail  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ZeroDivisionError, match="a bug"):
        wait_for(lambda: served.standing().lost)


def test_closing_aborts_the_requests_on_external_servers(
    served: RolloutClient, fakes: list[FakeServer]
) -> None:
    fakes[0].generate = hang
    future = submit(served, [PROMPT] * 3, SamplingParams())
    wait_for(lambda: len(fakes[0].bodies) == 3)
    served.close()
    assert future.cancelled()
    assert sorted(fakes[0].aborted) == sorted(body["rid"] for body in fakes[0].bodies)
    assert not served._thread.is_alive()
    served.close = lambda: None  # the fixture must not close it again


@pytest.mark.parametrize("fault", ["a server does not end", "the loop is blocked", "both"])
def test_an_error_keeps_nothing_from_ending(
    fault: str, client: Callable[..., RolloutClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, released = client(own=True), threading.Event()
    processes: Any = one.local
    end_processes = processes.stop

    def stop() -> None:
        end_processes()
        if fault != "the loop is blocked":
            raise ServerError("still exists")

    processes.stop = stop
    if fault != "a server does not end":
        monkeypatch.setattr(rollout_client, "_CALL_S", 0.1)
        one._loop.call_soon_threadsafe(released.wait, 30)
    with pytest.raises(TimeoutError if fault == "the loop is blocked" else ServerError):
        one.close()
    assert processes.alive == [False]
    released.set()
    one._thread.join(30)
    assert not one._thread.is_alive()
    if tasks := asyncio.all_tasks(one._loop):  # of a loop that was blocked
        one._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        one._loop.close()
    one.close = lambda: None  # the fixture must not close it again


@pytest.fixture
def engine(fakes: list[FakeServer], text_model: Path, tmp_path: Path) -> Iterator[Callable[[], SGLangEngine]]:
    """Return a function that makes an engine on the first server. A weight sync changes only the version."""
    made: list[SGLangEngine] = []
    rollout = {"engine": "sglang", "server_urls": [fakes[0].server.url]}
    sections = {"rollout": rollout, "sglang": {"health_interval_s": 0.05}, "model": {"path": str(text_model)}}

    class Sync:
        def update(self, servers: Any, tensors: Any, version: str) -> SyncReport:
            fakes[0].weight_version = version
            return SyncReport(0, 1.0, ())

        closed = False

        def close(self) -> None:
            self.closed = True

    def make() -> SGLangEngine:
        cfg = Config.model_validate({"run_dir": str(tmp_path), **sections})
        sync: Any = Sync()
        made.append(
            SGLangEngine(
                cfg,
                [fakes[0].server],
                None,
                sync,
                AutoTokenizer.from_pretrained(text_model),
                Nodes(node_name()),
            )
        )
        return made[-1]

    fakes[0].start()
    yield make
    for one in made:
        one.close()


def test_an_engine_ends_its_sync_although_its_client_fails(engine: Callable[[], SGLangEngine]) -> None:
    one = engine()
    assert one._client
    close = one._client.close

    def failing() -> None:
        close()
        raise ServerError("still exists")

    one._client.close = failing
    with pytest.raises(ServerError, match="still exists"):
        one.close()
    sync: Any = one._sync
    assert sync.closed
    one.close = lambda: None  # the fixture must not close it again


def test_samples_of_deterministic_servers_differ_and_are_drawn_again_after_a_resume(
    engine: Callable[[], SGLangEngine], fakes: list[FakeServer]
) -> None:
    """The server draws as SGLang does if it infers deterministically, which no real server does on a CPU.

    The noise of a token depends on its seed and position only (sampler.py:multinomial_with_seed). Requests
    without a seed have seed 42 (sampling_batch_info.py), so all samples of a group would be equal.
    """

    async def generate(body: dict[str, Any]) -> Answer:
        answer = answer_of(body, fakes[0].weight_version)
        seed, start = body["sampling_params"].get("sampling_seed", 42), len(body["input_ids"])
        answer["output_ids"] = [random.Random(f"{seed}/{start + i}").randrange(20, 120) for i in range(8)]
        return answer

    fakes[0].generate = generate
    prompts = [Prompt("p", "", input_ids=PROMPT)] * 2

    def draw(engine: SGLangEngine) -> list[tuple[int, ...]]:
        groups = engine.generate(prompts, SamplingParams(n=4, max_new_tokens=8))
        return [tuple(s.tokens) for group in in_order(groups) for s in group.samples]

    def at(engine: SGLangEngine, version: int) -> list[list[tuple[int, ...]]]:
        engine.update_weights([], version)
        return [draw(engine), draw(engine)]

    first = engine()
    steps = [at(first, 5), at(first, 6)]
    assert len({sample for step in steps for drawn in step for sample in drawn}) == 32
    assert at(first, 6) == steps[1]  # samples drawn since, e.g. by an evaluation, have no effect
    assert at(engine(), 6) == steps[1]


def test_a_server_that_shortens_responses_is_an_error(
    engine: Callable[[], SGLangEngine], fakes: list[FakeServer]
) -> None:
    """A real server returns 2036 tokens for prompt 10 and limit 2037 if its context_length is 2048."""

    async def generate(body: dict[str, Any]) -> Answer:
        return answer_of(body, fakes[0].weight_version, count=3)

    fakes[0].generate = generate
    one = engine()
    one.update_weights([], 0)
    with pytest.raises(InputError, match=r"end responses after 3 of 4 tokens: raise context_length or "):
        one.generate([Prompt("p", "", input_ids=PROMPT)], SamplingParams(max_new_tokens=4))


def test_routed_experts_are_decoded(client: Callable[..., RolloutClient], fakes: list[FakeServer]) -> None:
    """The model has two layers with top 2. A record that does not fit the tokens causes a retry."""
    served = client(experts=True)
    sync(served, fakes, 0)
    record = np.arange(7 * 4, dtype="<i4")  # 4 prompt tokens and 4 of the response, the last without experts

    async def generate(body: dict[str, Any]) -> Answer:
        answer = answer_of(body, f"{NONCE}-0")
        cut = record[:-1] if len(fakes[0].bodies) == 1 else record
        answer["meta_info"]["routed_experts"] = base64.b64encode(cut.tobytes()).decode()
        return answer

    fakes[0].generate = generate
    ((response,),) = sample(served)
    assert response.routed_experts is not None
    assert response.routed_experts.dtype == np.uint8
    assert np.array_equal(response.routed_experts, record.reshape(7, 2, 2))
    assert fakes[0].bodies[0]["return_routed_experts"]
    assert served.retries == 1


@pytest.mark.parametrize(("limit", "kept"), [(20, 5), (6, 6)])
def test_routed_experts_of_a_response_that_ends_in_an_aborted_answer(
    limit: int, kept: int, client: Callable[..., RolloutClient], fakes: list[FakeServer]
) -> None:
    """At its end token, or at the token limit: one row for each token before the last."""
    served = client(experts=True)
    sync(served, fakes, 0)
    record = np.arange((3 + 6 - 1) * 4, dtype="<i4")

    async def generate(body: dict[str, Any]) -> Answer:
        first = len(fakes[0].bodies) == 1
        last = [C, C, EOS, B] if limit == 20 else [C, C, C, B]
        answer = answer_of(body, f"{NONCE}-0", finish="abort", tokens=[A, B] if first else last)
        answer["meta_info"]["routed_experts"] = base64.b64encode(record.tobytes()).decode()
        return answer

    fakes[0].generate = generate
    sampling = SamplingParams(max_new_tokens=limit)
    ((response,),) = submit(served, [PROMPT], sampling, Ending(None, {EOS})).result(20).values()
    assert len(response.tokens) == kept
    assert response.finish_reason == ("stop" if limit == 20 else "length")
    assert response.routed_experts is not None
    assert np.array_equal(response.routed_experts, record.reshape(-1, 2, 2)[: 3 + kept - 1])


# --- episodes ---


class ThreeTurns:
    """Player of episodes of three turns of two tokens, with token 99 between them.

    Attributes:
        think: what the environments do after each turn.
        live, most: the episodes that are not finished: now, and at most.
        ended: the contexts of each finished episode's turns, by position and number.
        cancelled: number of episodes that were cancelled.
    """

    def __init__(self, think: Callable[[], Awaitable[None]] | None = None) -> None:
        self.think = think or partial(asyncio.sleep, 0)
        self.live = self.most = self.cancelled = 0
        self.ended: dict[tuple[int, int], list[list[int]]] = {}

    async def play(
        self,
        prompt: Prompt,
        position: int,
        number: int,
        sampling: SamplingParams,
        ending: Ending,
        generate: Generate,
    ) -> Response:
        self.live += 1
        self.most = max(self.most, self.live)
        tokens, contexts, turn = prompt.input_ids, [], Response()
        try:
            for _ in range(3):
                contexts.append(tokens)
                turn = await generate(Context(np.array(tokens, np.int32)), 2)
                tokens = [*tokens, *turn.tokens.tolist(), 99]
                await self.think()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.live -= 1
        self.ended[position, number] = contexts
        return turn


class LaterTurn(ThreeTurns):
    """Player of one turn. The experts of the first two tokens of its context are known."""

    async def play(self, *arguments: Any) -> Response:
        prompt, *_, generate = arguments
        return await generate(Context(np.array(prompt.input_ids, np.int32), recorded=2), 4)


def play(client: RolloutClient, player: ThreeTurns, count: int, n: int = 1) -> Future[Sampled[Any]]:
    prompts = [Prompt(str(i), "", input_ids=[*PROMPT, i]) for i in range(count)]
    sampling, of_turns = SamplingParams(n=n, max_new_tokens=7), cast(Any, player)
    return client.play(f"episodes {next(NUMBERS)}", prompts, sampling, ENDLESS, of_turns)


def prompts_of(fake: FakeServer) -> list[int]:
    """Return the position of the prompt of each request."""
    return [body["input_ids"][3] for body in fake.bodies]


def test_known_experts_are_not_requested(
    client: Callable[..., RolloutClient], fakes: list[FakeServer]
) -> None:
    """A server aborts the turn after two of four tokens; the record comes with the last answer."""
    served = client(experts=True)
    sync(served, fakes, 0)
    record = np.arange((len(PROMPT) + 1 + 4 - 1 - 2) * 4, dtype="<i4")  # play appends a token to the prompt

    async def generate(body: dict[str, Any]) -> Answer:
        if len(fakes[0].bodies) == 1:
            return answer_of(body, f"{NONCE}-0", finish="abort", tokens=[A, B])
        answer = answer_of(body, f"{NONCE}-0")
        answer["meta_info"]["routed_experts"] = base64.b64encode(record.tobytes()).decode()
        return answer

    fakes[0].generate = generate
    ((response,),) = play(served, LaterTurn(), count=1).result(20).values()
    assert [body["routed_experts_start_len"] for body in fakes[0].bodies] == [2, 2]
    assert np.array_equal(response.routed_experts, record.reshape(-1, 2, 2))


def test_the_turns_of_an_episode_stay_on_one_server(
    client: Callable[..., RolloutClient], fakes: list[FakeServer]
) -> None:
    """Also while all episodes of the other server are in their environments, so that it has no request."""
    served = client(count=2)
    sync(served, fakes, 0)

    async def slowly(body: dict[str, Any]) -> Answer:
        await asyncio.sleep(0.05)
        return answer_of(body, f"{NONCE}-0")

    fakes[0].generate = slowly
    player = ThreeTurns()
    play(served, player, count=8).result(20)
    of_first, of_second = map(prompts_of, fakes)
    assert (
        len(of_first) == len(of_second) == 12
    )  # shared evenly, although the second is idle most of the time
    assert not set(of_first) & set(of_second)
    for fake in fakes:
        for body in fake.bodies:
            assert body["sampling_params"]["max_new_tokens"] == 2  # of a turn
    seeds = {body["sampling_params"]["sampling_seed"] for fake in fakes for body in fake.bodies}
    assert len(seeds) == 8  # the turns of an episode have its seed
    contexts = player.ended[5, 0]
    assert contexts[1] == [*PROMPT, 5, 104, 105, 99]
    assert contexts[2] == [*contexts[1], 107, 108, 99]
    assert [b["input_ids"] for f in fakes for b in f.bodies if b["input_ids"][3] == 5] == contexts
    assert [member.episodes for member in served._watcher.members] == [0, 0]


def test_an_episode_starts_on_the_server_with_the_fewest_episodes(
    client: Callable[..., RolloutClient], fakes: list[FakeServer]
) -> None:
    """No server has a request when one starts, because the earlier ones are in their environments."""
    served = client(count=2)
    sync(served, fakes, 0)
    player = ThreeTurns(partial(asyncio.sleep, 30))
    for started in range(1, 5):
        play(served, player, count=1)
        wait_for(lambda count=started: sum(len(fake.bodies) for fake in fakes) == count)
        wait_for(lambda: not any(fake.in_flight for fake in fakes))
    assert [len(fake.bodies) for fake in fakes] == [2, 2]


def test_an_episode_in_its_environment_keeps_its_room(
    client: Callable[..., RolloutClient], fakes: list[FakeServer]
) -> None:
    """So that a server has no more episodes than it may have requests."""
    served = client(count=2, max_concurrent_requests=2)
    sync(served, fakes, 0)
    player = ThreeTurns(partial(asyncio.sleep, 0.03))
    assert len(play(served, player, count=12).result(20)) == 12
    assert player.most == 4


def test_a_server_that_is_lost_in_an_episode(
    client: Callable[..., RolloutClient], fakes: list[FakeServer]
) -> None:
    """Its turn is sampled again on the other server, where the episode stays; the turns before it stay."""
    served = client(own=True, count=2)
    sync(served, fakes, 0)
    assert served.local

    async def hang_in_the_second_turn(body: dict[str, Any]) -> Answer:
        return await (hang(body) if len(fakes[0].bodies) == 2 else fakes[0].answer(body))

    fakes[0].generate = hang_in_the_second_turn
    player = ThreeTurns()
    future = play(served, player, count=1)
    wait_for(lambda: len(fakes[0].bodies) == 2)
    served.local.kill(0)  # pyright: ignore[reportAttributeAccessIssue]
    future.result(20)
    contexts = [[*PROMPT, 0], [*PROMPT, 0, 104, 105, 99], [*PROMPT, 0, 104, 105, 99, 107, 108, 99]]
    assert player.ended == {(0, 0): contexts}
    assert [body["input_ids"] for body in fakes[0].bodies] == contexts[:2]
    assert [body["input_ids"] for body in fakes[1].bodies] == contexts[1:]
    assert [member.episodes for member in served._watcher.members] == [0, 0]


def test_closing_ends_episodes_in_their_environments(
    fakes: list[FakeServer], client: Callable[..., RolloutClient]
) -> None:
    served = client()
    sync(served, fakes, 0)
    player = ThreeTurns(partial(asyncio.sleep, 30))
    future = play(served, player, count=2, n=2)
    wait_for(lambda: len(fakes[0].bodies) == 4 and not fakes[0].in_flight)
    start = time.monotonic()
    served.close()
    assert time.monotonic() < start + 20
    assert future.cancelled()
    assert player.cancelled == 4
    served.close = lambda: None


def test_as_many_files_may_be_open_as_there_are_requests() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = 10**6 if hard == resource.RLIM_INFINITY else hard
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        _allow_open_files(500)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (min(500 + 1024, most), hard)
        _allow_open_files(16)  # the limit is not lowered
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (min(500 + 1024, most), hard)
        if hard != resource.RLIM_INFINITY:
            with pytest.raises(
                InputError,
                match=rf"max_concurrent_requests: {hard} connections .* ulimit -Hn is {hard}: lower it",
            ):
                _allow_open_files(hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# images


def png(width: int) -> bytes:
    encoded = io.BytesIO()
    Image.new("RGB", (width, 1)).save(encoded, "PNG")
    return encoded.getvalue()


IMAGE = 50
"""The image token. An image of a grid of 4 x 6 patches has 6 tokens."""
FILES = [png(1), png(2)]


@pytest.fixture
def run_images(tmp_path: Path) -> RunImages:
    return RunImages(ImageFolder(tmp_path / "images"), IMAGE, 2, cast(Any, None), cast(Any, None))


@pytest.fixture
def pictured(tmp_path: Path) -> Prompt:
    """Return a prompt with an image of 6 tokens and one of 1 token, whose files are elsewhere."""
    images = []
    for content, grid in zip(FILES, ((1, 4, 6), (1, 2, 2)), strict=True):
        ref = ImageRef(digest_of(content), grid, ".png")
        images.append(StoredImage(ref, ImageFolder(tmp_path / "data")))
        images[-1].folder.write(ref, content)
    return Prompt("p", "", input_ids=[5, *[IMAGE] * 6, 6, IMAGE, 7], images=images)


def answers_images(fake: FakeServer, prompt: Prompt, **changes: Any) -> None:
    """Let the server answer as SGLang does, which puts the tokens of images into the prompt."""

    async def generate(body: dict[str, Any]) -> Answer:
        answer = answer_of(body, f"{NONCE}-0")
        surplus = len(prompt.input_ids) - 5
        answer["meta_info"]["prompt_tokens"] = len(body["input_ids"]) + surplus
        if body["return_prompt_token_ids"]:
            answer["prompt_token_ids"] = list(prompt.input_ids)
        answer["meta_info"] |= changes.get("about", {})
        return answer | {name: value for name, value in changes.items() if name != "about"}

    fake.generate = generate


def test_a_request_carries_the_images_of_its_prompt(
    client: Callable[..., RolloutClient], fakes: list[FakeServer], run_images: RunImages, pictured: Prompt
) -> None:
    """Their files are in the run's folder before a server gets them. The server's ids are compared once."""
    served = client(images=run_images)
    sync(served, fakes, 0)
    answers_images(fakes[0], pictured)
    whole = fakes[0].generate

    async def after_the_files(body: dict[str, Any]) -> Answer:
        names = {file.name for file in run_images.folder.folder.iterdir()}
        assert names == {image.ref.name for image in pictured.images}
        return await whole(body)

    fakes[0].generate = after_the_files
    sampling = SamplingParams(n=3, max_new_tokens=2)
    for name in ("first", "second"):
        sampled = served.submit(name, [pictured], sampling, ENDLESS).result(30)
        assert [response.tokens.tolist() for response in sampled[0]] == [[105, 106]] * 3
    urls = [f"data:image/png;base64,{base64.b64encode(part).decode()}" for part in FILES]
    for body in fakes[0].bodies:
        assert body["input_ids"] == [5, IMAGE, 6, IMAGE, 7]
        assert body["image_data"] == urls
    asked = [body["return_prompt_token_ids"] for body in fakes[0].bodies]
    assert (asked[0], asked[3:]) == (True, [False] * 3)


@pytest.mark.parametrize(
    "changes",
    [{"about": {"prompt_tokens": 11}}, {"prompt_token_ids": [5, *[IMAGE] * 7, 6, 7]}],
    ids=["number", "ids"],
)
def test_a_server_that_makes_other_tokens_of_a_prompt_with_images_ends_the_run(
    client: Callable[..., RolloutClient],
    fakes: list[FakeServer],
    run_images: RunImages,
    pictured: Prompt,
    changes: dict[str, Any],
) -> None:
    served = client(images=run_images)
    sync(served, fakes, 0)
    answers_images(fakes[0], pictured, **changes)
    future = served.submit("batch", [pictured], SamplingParams(max_new_tokens=2), ENDLESS)
    with pytest.raises(InputError, match=r"make 1[01] tokens of a prompt with images that has 10, or other"):
        future.result(30)


def test_a_sampled_image_token_is_not_sent_as_an_image(
    client: Callable[..., RolloutClient], fakes: list[FakeServer], run_images: RunImages, pictured: Prompt
) -> None:
    """A response that was aborted after one starts again. A finished one keeps it."""
    served = client(images=run_images)
    sync(served, fakes, 0)
    answers = iter([([8, IMAGE], "abort"), ([9, IMAGE, 9], "length")])

    async def generate(body: dict[str, Any]) -> Answer:
        tokens, finish = next(answers)
        answer = answer_of(body, f"{NONCE}-0", tokens=tokens, finish=finish)
        answer["meta_info"]["prompt_tokens"] = len(pictured.input_ids)
        return answer

    fakes[0].generate = generate
    sampled = served.submit("batch", [pictured], SamplingParams(max_new_tokens=3), ENDLESS).result(30)
    assert sampled[0][0].tokens.tolist() == [9, IMAGE, 9]
    assert [body["input_ids"] for body in fakes[0].bodies] == [[5, IMAGE, 6, IMAGE, 7]] * 2
