"""Watch a set of SGLang servers: their health, restarts, and weight versions."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import orjson

from ...config import SGLangConfig
from ...errors import ServerError
from .processes import LocalServers
from .server_state import Lifecycle, ServerEvent, ServerState
from .servers import PROBE_TIMEOUT_S, Server

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Member:
    """A server of the set.

    Attributes:
        index: its number in the set.
        requests: its in-flight requests with their ids.
        episodes: number of unfinished episodes that have their ``Home`` here.
        in_service: False from its loss until it answers again.
    """

    server: Server
    index: int
    life: Lifecycle
    in_service: bool = True
    requests: dict[asyncio.Task[Any], str] = field(default_factory=dict)
    episodes: int = 0
    check_now: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def state(self) -> ServerState:
        return self.life.state


class Home:
    """The server that generates an episode's turns, so that a turn finds the earlier turns in its cache.

    Attributes:
        member: the server; None before the first turn and after the episode.
    """

    member: Member | None = None

    def move(self, member: Member | None) -> None:
        """Go to another server, or to none."""
        if self.member:
            self.member.episodes -= 1
        if member:
            member.episodes += 1
        self.member = member


@dataclass(frozen=True)
class Standing:
    """The state of one node's servers, as the node sends it to the others.

    Attributes:
        outdated: servers that answer and need the current weights.
        ready: whether a server has the current weights.
        starting: whether a server of the run's own starts for the first time; no sync begins before, so that
            one sync updates all.
        lost: the line that ends the run if no other node has a server; "" while a server is left.
    """

    outdated: tuple[Server, ...]
    ready: bool
    starting: bool
    lost: str


class Watcher:
    """Keep the state of every server, with one task for each. All methods run in the event loop's thread.

    A server receives requests only while it is ``READY``. A failure moves it to another state. Its task then
    finds the cause, restarts the server if the run started it, and marks it ``STALE`` when it answers.

    Args:
        servers: the servers of the set.
        local: their processes if the run starts them; they are watched and restarted.
        cfg: timeouts and limits.
        nonce: prefix of this run's weight versions, ``"{nonce}-{step}"``.
        http: session for the probes.

    Attributes:
        version: training step of the current weights.
        restarts: number of restarts since the start.
    """

    def __init__(
        self,
        servers: Sequence[Server],
        local: LocalServers | None,
        cfg: SGLangConfig,
        nonce: str,
        http: aiohttp.ClientSession,
    ) -> None:
        first = ServerState.STARTING if local else ServerState.CHECKING
        self.members = [Member(server, i, Lifecycle(first)) for i, server in enumerate(servers)]
        self.version = -1
        self.restarts = 0
        self._local, self._cfg, self._nonce, self._http = local, cfg, nonce, http
        self._changed = asyncio.Condition()  # a server became ready or finished a request
        self._problem: BaseException | None = None
        self._all_given_up = ""
        self._nothing_answers_since = time.monotonic()
        self._tasks = [asyncio.create_task(self._watch(member)) for member in self.members]
        for task in self._tasks:
            task.add_done_callback(self._record_bug)

    # requests

    async def acquire(self, home: Home | None = None) -> Member:
        """Return the server of ``home`` if it is ready, else the one with the fewest episodes and requests.

        Wait while all are full or none is ready. The wait has no timeout: ``standing`` tells when no server
        answers.

        Args:
            home: an episode's; it moves to the server that is returned.
        """
        limit = self._cfg.max_concurrent_requests
        async with self._changed:
            while True:
                free = [m for m in self.members if m.state is ServerState.READY and len(m.requests) < limit]
                if home and home.member in free:
                    return home.member
                if free:
                    # an episode that is in its environment has no request, and comes back
                    member = min(free, key=lambda m: (m.episodes, len(m.requests)))
                    if home:
                        home.move(member)
                    return member
                await self._changed.wait()

    async def release(self) -> None:
        """Notify one waiting ``acquire`` after a request has finished."""
        async with self._changed:
            self._changed.notify()

    @property
    def capacity(self) -> int:
        """Return the number of requests that the ready servers take at a time."""
        ready = sum(member.state is ServerState.READY for member in self.members)
        return ready * self._cfg.max_concurrent_requests

    @property
    def in_service(self) -> int:
        """Return the number of servers that are not lost."""
        return sum(member.in_service for member in self.members)

    def report(self, member: Member, event: ServerEvent) -> None:
        """Record a failed request and check the server immediately."""
        member.life.apply(event)
        member.check_now.set()

    # weights

    async def expect(self, version: int) -> None:
        """Make ``version`` the current weights. No server is ready until ``synced`` reports it."""
        self.version, self._nothing_answers_since = version, time.monotonic()
        for member in self.members:
            member.life.apply(ServerEvent.NEW_VERSION)

    def expect_answers(self) -> None:
        """Restart the timeout within which a server must answer."""
        self._nothing_answers_since = time.monotonic()

    async def standing(self) -> Standing:
        """Return the standing of this node's servers.

        Raises:
            ServerError: a server cannot be started.
        """
        if self._problem:
            raise self._problem
        states = {member.state for member in self.members}
        if states & {ServerState.STARTING, ServerState.READY, ServerState.STALE, ServerState.SYNCING}:
            self._nothing_answers_since = time.monotonic()
        return Standing(
            outdated=tuple(
                m.server for m in self.members if m.state in (ServerState.STALE, ServerState.SYNCING)
            ),
            ready=ServerState.READY in states,
            starting=ServerState.STARTING in states,
            lost=self._loss(),
        )

    def _loss(self) -> str:
        """Return the line of ``Standing.lost``."""
        limit = self._cfg.start_timeout_s
        # the run's own servers have timeouts of their own
        if self._all_given_up or self._local or time.monotonic() - self._nothing_answers_since <= limit:
            return self._all_given_up
        urls = ", ".join(member.server.url for member in self.members)
        return f"no SGLang server has answered for {limit:g} s: {urls}"

    async def start_sync(self, servers: Sequence[Server]) -> None:
        """Record that a sync to ``servers`` begins."""
        for member in self.members:
            if member.server in servers and member.state in (ServerState.STALE, ServerState.SYNCING):
                member.life.apply(ServerEvent.SYNC_STARTED)

    async def synced(self, servers: set[Server], failed: set[Server]) -> None:
        """Record a sync to ``servers``; all except ``failed`` have the current weights."""
        for member in self.members:
            # a server that is not SYNCING was lost in the meantime, and may have restarted with other weights
            if member.server not in servers or member.state is not ServerState.SYNCING:
                continue
            if member.server in failed:
                self._remove(member, ServerEvent.SYNC_FAILED, "failed its weight sync")
                member.check_now.set()
            else:
                member.life.apply(ServerEvent.SYNC_SUCCEEDED)
        await self._wake_all()

    # the task of one server

    async def _watch(self, member: Member) -> None:
        """Watch ``member`` and restart it each time it is lost, until it is given up."""
        try:
            await self._wait_ready(member)
        except (ServerError, OSError) as error:  # a restart would fail for the same reason
            member.life.apply(ServerEvent.GAVE_UP)
            self._problem = ServerError(str(error))
            return
        await self._check_until_lost(member)
        while member.life.losses <= self._cfg.max_restarts:
            member.life.apply(ServerEvent.RESTARTED)
            try:
                await self._restart(member)
            except (ServerError, OSError) as error:
                self._remove(member, ServerEvent.DIED, f"did not restart ({error})")
                continue
            await self._check_until_lost(member)
        member.life.apply(ServerEvent.GAVE_UP)
        url, losses = member.server.url, member.life.losses
        log.error(
            "SGLang server %s was lost %d times without a weight sync in between: given up", url, losses
        )
        if all(other.state is ServerState.GIVEN_UP for other in self.members):
            self._all_given_up = (
                f"every SGLang server was lost {losses} times in a row: see the log of the last one, {url}"
            )

    async def _restart(self, member: Member) -> None:
        if self._local:
            self.restarts += 1
            await asyncio.to_thread(self._local.restart, member.index)
        await self._wait_ready(member)

    async def _wait_ready(self, member: Member) -> None:
        if self._local:
            await asyncio.to_thread(self._local.wait_ready, member.index)

    async def _check_until_lost(self, member: Member) -> None:
        """Check the server every ``health_interval_s``, and immediately after a failed request or sync."""
        last_answer, unreachable = time.monotonic(), False
        while True:
            member.check_now.clear()
            version = await self._weight_version(member)
            if version and member.state is ServerState.SILENT and await self._generates(member):
                member.life.apply(ServerEvent.GENERATED)
            if member.state is ServerState.LOST:  # a sync failed in the meantime
                return
            silence = time.monotonic() - last_answer
            if version and member.state is not ServerState.SILENT:
                last_answer, unreachable = time.monotonic(), False
                await self._found(member, version)
            elif self._local and not self._local.is_alive(member.index):
                return self._remove(member, ServerEvent.DIED, self._local.end_of(member.index))
            elif silence > self._cfg.hang_timeout_s and not unreachable:
                unreachable = True
                event = ServerEvent.DIED if self._local else ServerEvent.UNREACHABLE
                self._remove(member, event, f"has not answered for {silence:.0f} s")
            if member.state is ServerState.LOST:
                return
            with suppress(TimeoutError):
                # asyncio.wait_for of Python 3.11 loses a cancellation that comes together with the event
                async with asyncio.timeout(self._cfg.health_interval_s):
                    await member.check_now.wait()

    async def _found(self, member: Member, version: str) -> None:
        # a server that failed during a sync may already report the new version
        member.in_service = True
        current = version == f"{self._nonce}-{self.version}" and not member.life.losses
        member.life.apply(ServerEvent.FOUND_CURRENT if current else ServerEvent.FOUND_STALE)
        await self._wake_all()

    def _remove(self, member: Member, event: ServerEvent, why: str) -> None:
        """Take the server out of service. Its requests are sent to other servers."""
        log.warning("SGLang server %s %s", member.server.url, why)
        member.in_service = False
        member.life.apply(event)
        for request in member.requests:
            request.cancel()

    async def _weight_version(self, member: Member) -> str | None:
        """Return the server's weight version, or None if it does not answer within ``PROBE_TIMEOUT_S``."""
        info = await self._get(member.server, "/model_info", PROBE_TIMEOUT_S)
        return None if info is None else str(orjson.loads(info).get("weight_version"))

    async def _generates(self, member: Member) -> bool:
        return await self._get(member.server, "/health_generate", self._cfg.hang_timeout_s) is not None

    async def _get(self, server: Server, path: str, timeout_s: float) -> bytes | None:
        """Return the body of an answer with status 200, or None."""
        try:
            async with self._http.get(
                server.url + path, headers=server.headers, timeout=aiohttp.ClientTimeout(timeout_s)
            ) as reply:
                return await reply.read() if reply.status == 200 else None
        except (aiohttp.ClientError, TimeoutError):
            return None

    async def _wake_all(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    def _record_bug(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception():
            self._problem = task.exception()
