"""The asynchronous client of a set of SGLang servers: least-loaded choice, retries, restarts, and no answer from old weights.

It lives on the trainer's first rank, in a thread of its own, so that responses come in while the trainer trains. A server is asked for
samples only while it is ``ready``: it answers and has the current weights. Whatever goes wrong makes it not ready; its watcher finds out
what, restarts it where it is ours, and tells the engine once it wants weights.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import ssl
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
import orjson
import pybase64
from anyio.from_thread import start_blocking_portal

from ...batch.samples import narrow_experts
from ...config import SGLangConfig
from ...errors import InputError, ServerError
from ..engine import SamplingParams
from .servers import CONNECT_TIMEOUT_S, KEEPALIVE_S, LocalServers, Server

log = logging.getLogger(__name__)

PROBE_TIMEOUT_S = 5.0
"""Limit for a server to say which weights it has."""
ATTEMPTS = 5
"""Answers that may go wrong, one after the other, before a sample is given up; a full queue does not count."""
_LONGEST_PAUSE_S = 5.0
_OTHER_FILES = 1024


@dataclass
class Response:
    """What the servers made of one prompt, over all requests it took.

    Attributes:
        tokens: R response tokens, the end token included.
        logprobs: R log probabilities, under the temperature but before top-p and top-k.
        versions: R training steps, those whose weights made each token.
        finish_reason: ``stop`` or ``length``.
        routed_experts: (prompt + R - 1, layers * topk) uint8 or int16 expert ids, when asked for.
    """

    tokens: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    logprobs: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))
    versions: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    finish_reason: str = ""
    routed_experts: np.ndarray | None = None


@dataclass(eq=False)
class _Member:
    """A server as the client sees it; ``index`` is its place among all."""

    server: Server
    index: int
    starting: bool = True
    ready: bool = False
    wants_weights: bool = False
    syncing: bool = False  # since ``servers_to_sync`` named it, in the same life
    lost: bool = False
    silent: bool = False  # a request got no answer: it may hang behind a front that answers
    losses: int = 0  # in a row, without a weight sync between
    suspect: asyncio.Event = field(default_factory=asyncio.Event)
    idle: list[httpx.AsyncClient] = field(default_factory=list)  # connections without a request
    posts: dict[asyncio.Task[httpx.Response], str] = field(default_factory=dict)  # to their request ids


class _RetryError(Exception):
    """An answer that did not come or cannot be used, through no fault of the request."""


class RolloutClient:
    """See the module. Methods are called from the trainer's thread unless they are coroutines.

    Args:
        servers: whom to ask.
        local: the processes behind them when they are ours, to be watched and restarted.
        cfg: limits.
        nonce: marks this run's weight versions, ``"{nonce}-{step}"``, among those of other runs on the same servers.
        return_routed_experts: ask for every token's experts.
    """

    def __init__(
        self,
        servers: Sequence[Server],
        local: LocalServers | None,
        cfg: SGLangConfig,
        nonce: str,
        return_routed_experts: bool = False,
    ) -> None:
        self.cfg, self.local, self.nonce = cfg, local, nonce
        self.version = -1
        self.retries = 0
        self.restarts = 0
        self._return_routed_experts = return_routed_experts
        self._problem: ServerError | None = None
        self._waiting_since = time.monotonic()  # for a server to be ready
        self._pending: list[Future[Any]] = []
        _allow_open_files(len(servers) * cfg.max_concurrent_requests)
        if local:
            local.start()
        self._context = start_blocking_portal("asyncio")
        self._portal = self._context.__enter__()
        self._portal.call(self._open, servers)

    async def _open(self, servers: Sequence[Server]) -> None:
        self._tls = ssl.create_default_context()
        self._http = self._connection()
        self._changed = asyncio.Condition()
        self._members = [_Member(server, index) for index, server in enumerate(servers)]
        self._tasks = [asyncio.create_task(self._watch(member)) for member in self._members]

    def _connection(self) -> httpx.AsyncClient:
        """One for each request at a time: what a pool spends on a request grows with the connections in it."""
        return httpx.AsyncClient(
            timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT_S),  # each request has its own limit
            limits=httpx.Limits(keepalive_expiry=KEEPALIVE_S),
            verify=self._tls,
            trust_env=False,
        )

    def close(self) -> None:
        """Ends every request, on foreign servers too, our servers, and the thread."""
        for future in self._pending:
            future.cancel()
        try:
            self._portal.call(self._close)
            if self.local:
                self.local.stop()
        finally:  # the thread would keep the process alive
            self._context.__exit__(None, None, None)

    async def _close(self) -> None:
        for task in self._tasks:
            task.cancel()
        if not self.local:
            await asyncio.gather(
                *(self._abort(m.server, rid) for m in self._members for rid in m.posts.values())
            )
        for http in (self._http, *(idle for member in self._members for idle in member.idle)):
            await http.aclose()

    def cpu_seconds(self) -> float:
        """What the client's thread has computed since it began."""
        return self._portal.call(_thread_time)

    # weights

    def expect(self, version: int) -> None:
        """From now on samples come from the weights of ``version`` only: no server is ready until ``synced`` says so."""
        self._portal.call(self._expect, version)

    async def _expect(self, version: int) -> None:
        self.version, self._waiting_since = version, time.monotonic()
        for member in self._members:
            member.wants_weights |= member.ready
            member.ready = False

    def servers_to_sync(self) -> list[Server]:
        """Those that answer and want the current weights; none while others still start for the first time.

        Raises:
            ServerError: a server cannot be started, or none has answered for ``start_timeout_s``.
        """
        if self._problem:
            raise self._problem
        if self.local and any(member.starting for member in self._members):  # a start has its own limit
            return []
        if any(member.ready or member.wants_weights for member in self._members):
            self._waiting_since = time.monotonic()
        elif (
            not self.local and time.monotonic() - self._waiting_since > self.cfg.start_timeout_s
        ):  # ours have limits of their own
            urls = ", ".join(member.server.url for member in self._members)
            raise ServerError(f"no SGLang server has answered for {self.cfg.start_timeout_s:g} s: {urls}")
        for member in self._members:
            member.syncing = member.wants_weights
        return [member.server for member in self._members if member.syncing]

    def any_ready(self) -> bool:
        return any(member.ready for member in self._members)

    def synced(self, servers: Sequence[Server], failed: Sequence[Server]) -> None:
        """``servers`` were sent the current weights; all but ``failed`` have them."""
        self._portal.call(self._synced, set(servers), set(failed))

    async def _synced(self, servers: set[Server], failed: set[Server]) -> None:
        for member in self._members:
            if member.server not in servers or not member.syncing:  # its watcher has found it dead
                continue
            if member.server in failed:
                self._lose(member, "did not take the weights")
            else:
                member.ready, member.wants_weights, member.losses = True, False, 0
            member.syncing = False
        async with self._changed:
            self._changed.notify_all()

    # samples

    def submit(
        self, prompts: list[list[int]], sampling: SamplingParams, end_ids: Sequence[int]
    ) -> Future[list[list[Response]]]:
        """Starts sampling; the future's result has ``sampling.n`` responses for each prompt, in order. ``end_ids`` end a response.

        Its exception is an InputError for a request the servers refuse, a ServerError for a sample that could not be had.
        """
        parameters = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,
            "stop": list(sampling.stop),
            "stop_token_ids": list(end_ids),
            "ignore_eos": not end_ids,
            "no_stop_trim": True,
            "skip_special_tokens": False,
        }
        self._waiting_since = time.monotonic()
        future = self._portal.start_task_soon(
            self._sample_all, prompts, sampling.n, sampling.max_new_tokens, parameters
        )
        self._pending = [*(other for other in self._pending if not other.done()), future]
        return future

    async def _sample_all(
        self, prompts: list[list[int]], n: int, limit: int, parameters: dict[str, Any]
    ) -> list[list[Response]]:
        responses = await asyncio.gather(
            *(self._sample(prompt, limit, parameters) for prompt in prompts for _ in range(n))
        )
        return [responses[at : at + n] for at in range(0, len(responses), n)]

    async def _sample(self, prompt: list[int], limit: int, parameters: dict[str, Any]) -> Response:
        """One response. What an aborted request has sampled is kept as the beginning of a longer prompt: dropping it would prefer
        short responses, which are seldom caught unfinished."""
        response = Response()
        failures = 0
        while response.finish_reason in ("", "abort") and len(response.tokens) < limit:
            body = {
                "rid": f"{self.nonce}-{uuid.uuid4().hex}",
                "input_ids": prompt + response.tokens.tolist(),
                "sampling_params": parameters | {"max_new_tokens": limit - len(response.tokens)},
                "return_logprob": True,
                "return_routed_experts": self._return_routed_experts,
            }
            try:
                version = self.version
                self._append(response, await self._ask(body))
                if response.finish_reason == "abort" and version == self.version:
                    raise _RetryError("aborted, and not by a weight sync")
            except _RetryError as error:
                self.retries += 1
                failures += 1
                if failures == ATTEMPTS:
                    raise ServerError(f"a sample could not be had in {ATTEMPTS} attempts: {error}") from None
        return response

    async def _ask(self, body: dict[str, Any]) -> dict[str, Any]:
        """One answer of one server with the current weights."""
        pause, refused_since = 0.1, None
        while True:
            member = await self._acquire()
            oldest = self.version
            try:
                reply = await self._post(member, body)
            except httpx.TransportError as error:
                self._doubt(member)
                raise _RetryError(f"{member.server.url}: {error or type(error).__name__}") from error
            except _RetryError:
                self._doubt(member)
                raise
            finally:
                async with self._changed:
                    self._changed.notify()
            if reply.status_code == 200:
                answer = orjson.loads(reply.content)  # a record of routed experts makes it megabytes
                if min(versions_of(answer, self.nonce)) >= oldest:
                    return answer
                self._doubt(member)
                raise _RetryError(f"{member.server.url} answered from old weights")
            if reply.status_code in (401, 403):
                raise InputError(
                    f"{member.server.url} refuses the API key (HTTP {reply.status_code}): set SGLANG_API_KEY to the server's"
                )
            if reply.status_code != 429 and reply.status_code < 500:
                raise InputError(f"{member.server.url} refuses a request: {_message(reply)}")
            refused_since = refused_since or time.monotonic()
            if time.monotonic() > refused_since + self.cfg.request_timeout_s:
                raise ServerError(
                    f"{member.server.url} took no request for {self.cfg.request_timeout_s:g} s: {_message(reply)}"
                )
            self.retries += 1
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)

    async def _acquire(self) -> _Member:
        """The ready server with the fewest requests; waits while all are full or none is ready (``servers_to_sync`` has the limit)."""
        async with self._changed:
            while True:
                free = [
                    m for m in self._members if m.ready and len(m.posts) < self.cfg.max_concurrent_requests
                ]
                if free:
                    return min(free, key=lambda m: len(m.posts))
                await self._changed.wait()

    async def _post(self, member: _Member, body: dict[str, Any]) -> httpx.Response:
        """The server's reply. After the time limit it is asked to abort, and what it has made until then is the reply."""
        http = member.idle.pop() if member.idle else self._connection()
        post = asyncio.create_task(
            http.post(f"{member.server.url}/generate", json=body, headers=member.server.headers)
        )
        member.posts[post] = body["rid"]
        try:
            await asyncio.wait({post}, timeout=self.cfg.request_timeout_s)
            if not post.done():
                await self._abort(member.server, body["rid"])
                await asyncio.wait({post}, timeout=PROBE_TIMEOUT_S)
            if not post.done():
                member.silent = True
                raise _RetryError(
                    f"{member.server.url} did not answer within {self.cfg.request_timeout_s:g} s"
                )
            if post.cancelled():
                raise _RetryError(f"{member.server.url} was lost")
            return post.result()
        finally:
            post.cancel()
            del member.posts[post]
            member.idle.append(http)

    def _append(self, response: Response, answer: dict[str, Any]) -> None:
        about, finish_reason = answer["meta_info"], answer["meta_info"]["finish_reason"]["type"]
        if (
            self._return_routed_experts and finish_reason != "abort"
        ):  # else the longer prompt is routed again, under the newer weights
            flat = narrow_experts(np.frombuffer(pybase64.b64decode(about["routed_experts"]), "<i4"))
            routed = about["prompt_tokens"] + len(answer["output_ids"]) - 1
            if not routed or len(flat) % routed:
                raise _RetryError(f"{len(flat)} routed experts for {routed} tokens")
            response.routed_experts = flat.reshape(routed, -1)
        logprobs = [logprob for logprob, *_ in about["output_token_logprobs"]]
        versions = versions_of(answer, self.nonce)[: len(answer["output_ids"])]
        response.tokens = np.append(response.tokens, np.array(answer["output_ids"], np.int32))
        response.logprobs = np.append(response.logprobs, np.array(logprobs, np.float32))
        response.versions = np.append(response.versions, np.array(versions, np.int32))
        response.finish_reason = finish_reason

    async def _abort(self, server: Server, rid: str) -> None:
        with suppress(httpx.TransportError):  # it is gone, and the request with it
            await self._http.post(
                f"{server.url}/abort_request",
                json={"rid": rid},
                headers=server.admin_headers,
                timeout=PROBE_TIMEOUT_S,
            )

    # servers

    def _doubt(self, member: _Member) -> None:
        """Asks it nothing until its watcher has had a look."""
        member.ready = False
        member.suspect.set()

    def _leave(self, member: _Member, why: str) -> None:
        """Its requests go elsewhere."""
        if not (self.local or member.ready or member.wants_weights or member.posts):
            return  # it has been left before
        log.warning("SGLang server %s %s", member.server.url, why)
        member.ready = member.wants_weights = member.syncing = False
        for post in member.posts:
            post.cancel()

    def _lose(self, member: _Member, why: str) -> None:
        """Ends the server's present life; its watcher starts the next."""
        if member.lost:
            return
        self._leave(member, why)
        member.losses += 1
        member.lost = True
        member.suspect.set()

    async def _watch(self, member: _Member) -> None:
        """A server's lives, one after the other."""
        while member.losses <= self.cfg.max_restarts:
            member.lost = member.silent = False
            try:
                if self.local and member.losses:
                    self.restarts += 1
                    await asyncio.to_thread(self.local.restart, member.index)
                if self.local:
                    await asyncio.to_thread(self.local.wait_ready, member.index)
            except (ServerError, OSError) as error:
                if member.starting:  # the first start: what is wrong will stay wrong
                    self._problem = ServerError(str(error))
                    return
                self._lose(member, f"did not come back ({error})")
                continue
            await self._watch_one_life(member)
        log.error(
            "SGLang server %s was lost %d times without a weight sync between: given up",
            member.server.url,
            member.losses,
        )
        if all(m.losses > self.cfg.max_restarts for m in self._members):
            self._problem = ServerError(
                f"every SGLang server was lost {member.losses} times in a row: see the log of the last, {member.server.url}"
            )

    async def _watch_one_life(self, member: _Member) -> None:
        """Returns when the server is lost."""
        seen = time.monotonic()
        while not member.lost:
            version = await self._weight_version(member.server)
            silence = time.monotonic() - seen
            if (
                version is not None and member.silent
            ):  # the question for its version never reaches what generates
                member.silent = not await asyncio.to_thread(member.server.answers, self.cfg.hang_timeout_s)
            if version is not None and not member.silent:
                seen, member.starting = time.monotonic(), False
                await self._found(member, version)
            elif self.local and not self.local.is_alive(member.index):
                self._lose(member, "died")
            elif silence > self.cfg.hang_timeout_s:
                (self._lose if self.local else self._leave)(
                    member, f"has answered nothing for {silence:.0f} s"
                )
            member.suspect.clear()
            if not member.lost:
                with suppress(TimeoutError):
                    await asyncio.wait_for(member.suspect.wait(), self.cfg.health_interval_s)

    async def _found(self, member: _Member, version: str) -> None:
        """A sign of life, with the weights it has."""
        if member.lost or member.ready or member.wants_weights:
            return
        if (
            version == f"{self.nonce}-{self.version}" and not member.losses
        ):  # what failed a sync may wear its label
            member.ready = True
            async with self._changed:
                self._changed.notify_all()
        else:
            member.wants_weights = True

    async def _weight_version(self, server: Server) -> str | None:
        try:
            reply = await self._http.get(
                f"{server.url}/model_info", headers=server.headers, timeout=PROBE_TIMEOUT_S
            )
        except httpx.TransportError:
            return None
        return str(reply.json().get("weight_version")) if reply.status_code == 200 else None


def _allow_open_files(connections: int) -> None:
    """Raises this process's limit, so that ``connections`` fit beside what else it has open.

    Raises:
        InputError: the system lets it have no more than those.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + _OTHER_FILES
    if soft >= wanted or soft == resource.RLIM_INFINITY:
        return
    if hard != resource.RLIM_INFINITY and hard <= connections:
        raise InputError(
            f"sglang.max_concurrent_requests: {connections} connections to all servers need as many open files, and ulimit -Hn is {hard}: "
            "lower it, or have the limit raised"
        )
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard)
    )


async def _thread_time() -> float:
    return time.thread_time()


def versions_of(answer: dict[str, Any], nonce: str) -> list[int]:
    """The training step behind each output token, -1 for weights that are not this run's; one entry more when there is no token."""
    about, count = answer["meta_info"], len(answer["output_ids"])
    spans = about.get("weight_versions") or [
        {"version": about["weight_version"], "start": 0, "end": max(1, count)}
    ]
    return [_step(span["version"], nonce) for span in spans for _ in range(span["start"], span["end"])] or [
        _step(about["weight_version"], nonce)
    ]


def _step(version: str, nonce: str) -> int:
    run, _, step = version.rpartition("-")
    return int(step) if run == nonce and step.isdigit() else -1


def _message(reply: httpx.Response) -> str:
    return " ".join(reply.text.split())[:300] or f"HTTP {reply.status_code}"
