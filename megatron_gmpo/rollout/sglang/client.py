"""The client of a node's SGLang servers, on the node's first rank. It samples in the background.

The trainer calls ``RolloutClient``; an event loop in another thread runs its ``Batches``, ``Sampler`` and
``Watcher``.
"""

from __future__ import annotations

import asyncio
import resource
import threading
import time
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, TypeVar

import aiohttp
import numpy as np
import torch.distributed as dist

from ...batch.samples import Prompt, Sample
from ...config import SGLangConfig
from ...errors import InputError
from ..ending import Ending
from ..engine import SamplingParams
from ..images import RunImages
from ..player import Player
from ..response import Context, Response
from .batches import Batches, Sampled
from .processes import LocalServers
from .sampler import Sampler
from .servers import CONNECT_TIMEOUT_S, KEEPALIVE_S, Server, certificates
from .watcher import Home, Standing, Watcher

_CALL_S = 60.0
"""Limit for a call of the loop. None waits for a server longer than ``PROBE_TIMEOUT_S``."""

_OTHER_FILES = 1024

T = TypeVar("T")


class RolloutClient:
    """Sample from a node's servers and track their weights. Every method is called from the trainer's thread.

    The clients of all nodes meet before the first ``submit``, because each announces its servers in ``store``
    when it is made.

    Args:
        servers: the node's servers; there may be none.
        local: their processes if the run starts them; the client starts, watches and restarts them.
        cfg: timeouts and limits.
        nonce: prefix of this run's weight versions, ``"{nonce}-{step}"``, which distinguishes them from the
            versions of other runs on the same servers. Equal on all nodes.
        store: a store that all nodes reach, in which they share the prompts of a batch.
        routed_experts: (layers, topk) to record every token's experts, or None.
        images: the images of the run; None for a model without vision.

    Raises:
        InputError: the system's limit on open files is too low.
    """

    def __init__(
        self,
        servers: Sequence[Server],
        local: LocalServers | None,
        cfg: SGLangConfig,
        nonce: str,
        store: dist.Store,
        routed_experts: tuple[int, int] | None = None,
        images: RunImages | None = None,
    ) -> None:
        _allow_open_files(len(servers) * cfg.max_concurrent_requests)
        self.local = local
        if local:
            local.start()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rollout client", daemon=True)
        self._thread.start()
        self._call(self._open(servers, cfg, nonce, store, routed_experts, images))

    async def _open(
        self,
        servers: Sequence[Server],
        cfg: SGLangConfig,
        nonce: str,
        store: dist.Store,
        routed_experts: tuple[int, int] | None,
        images: RunImages | None,
    ) -> None:
        self._http = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S, ssl=certificates()),
            # each request sets its own timeout
            timeout=aiohttp.ClientTimeout(total=None, connect=CONNECT_TIMEOUT_S),
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,  # no proxy between trainer and servers
        )
        self._watcher = Watcher(servers, self.local, cfg, nonce, self._http)
        self._sampler = Sampler(self._watcher, self._http, cfg, nonce, routed_experts, images)
        # a connection of its own, because the main thread may wait in another operation
        own: dist.Store = store.clone()  # pyright: ignore[reportAttributeAccessIssue]
        self._batches = Batches(self._watcher, own)
        self._batches.announce()

    def close(self) -> None:
        """End all requests (also on external servers), the servers started by the run, and the thread.

        An error of one of these does not keep the others from ending.
        """
        with ExitStack() as last_to_first:
            last_to_first.callback(self._end_thread)
            if self.local:
                last_to_first.callback(self.local.stop)
            last_to_first.callback(lambda: self._call(self._close()))

    def _end_thread(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_CALL_S)
        if not self._thread.is_alive():  # else its loop cannot be closed; the process does not wait for it
            self._loop.close()

    async def _close(self) -> None:
        in_flight = [(m.server, rid) for m in self._watcher.members for rid in m.requests.values()]
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if not self.local:
            await asyncio.gather(*(self._sampler.abort(server, rid) for server, rid in in_flight))
        await self._http.close()

    def _call(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(_CALL_S)

    # samples

    def submit(
        self, name: str, prompts: list[Prompt], sampling: SamplingParams, ending: Ending
    ) -> Future[Sampled[Response]]:
        """Start to sample responses in a batch, see ``Batches.sample``, and return at once."""
        seeds = _seeds(sampling, len(prompts))

        def respond(position: int, number: int) -> Coroutine[Any, Any, Response]:
            prompt, seed = prompts[position], seeds[position][number]
            return self._sampler.sample(Context(prompt.input_ids, prompt.images), sampling, seed, ending)

        return self._start(self._batches.sample(name, len(prompts), sampling.n, respond, sampling.report))

    def play(
        self, name: str, prompts: list[Prompt], sampling: SamplingParams, ending: Ending, player: Player
    ) -> Future[Sampled[Sample]]:
        """Start to play episodes in a batch, see ``Batches.sample``, and return at once.

        The turns of an episode go to one server while it is in service. A turn that is lost with its server
        is sampled again on another; the turns before it stay.
        """
        seeds = _seeds(sampling, len(prompts))

        async def play(position: int, number: int) -> Sample:
            home = Home()

            async def generate(context: Context, limit: int) -> Response:
                turn = replace(sampling, max_new_tokens=limit)
                return await self._sampler.sample(context, turn, seeds[position][number], ending, home)

            try:
                return await player.play(prompts[position], position, number, sampling, ending, generate)
            finally:
                home.move(None)

        return self._start(self._batches.sample(name, len(prompts), sampling.n, play, sampling.report))

    def _start(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    # weights

    def expect(self, version: int) -> None:
        """Sample only from servers with the weights of training step ``version`` from now on."""
        self._call(self._watcher.expect(version))

    def standing(self) -> Standing:
        """See ``Watcher.standing``."""
        return self._call(self._watcher.standing())

    def start_sync(self, servers: Sequence[Server]) -> None:
        """Record that a sync to ``servers`` begins."""
        self._call(self._watcher.start_sync(servers))

    def synced(self, servers: Sequence[Server], failed: Sequence[Server]) -> None:
        """Record a sync to ``servers``; all except ``failed`` have the current weights."""
        self._call(self._watcher.synced(set(servers), set(failed)))

    # metrics

    @property
    def retries(self) -> int:
        """Return the number of requests that were sent again, since the start."""
        return self._sampler.retries

    @property
    def old_cache_tokens(self) -> int:
        """See ``Sampler.old_cache_tokens``."""
        return self._sampler.old_cache_tokens

    @property
    def restarts(self) -> int:
        """Return the number of restarts of servers, since the start."""
        return self._watcher.restarts

    def cpu_seconds(self) -> float:
        """Return the CPU seconds of the client's thread, since its start."""
        return self._call(_thread_time())


def _seeds(sampling: SamplingParams, size: int) -> list[list[int]]:
    """Return the seed of every sample of a batch.

    It depends on ``sampling.seed`` and the sample's place in the batch, so that the batch does not depend on
    which node samples what.
    """
    bits = np.random.SeedSequence(sampling.seed).generate_state(size * sampling.n, np.uint64)
    return (bits >> np.uint64(1)).reshape(size, sampling.n).tolist()  # SGLang takes int64


async def _thread_time() -> float:
    return time.thread_time()


def _allow_open_files(connections: int) -> None:
    """Raise this process's limit on open files to ``connections`` plus a margin for other files.

    Raises:
        InputError: the hard limit does not exceed ``connections``.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + _OTHER_FILES
    if soft >= wanted or soft == resource.RLIM_INFINITY:
        return
    if hard != resource.RLIM_INFINITY and hard <= connections:
        raise InputError(
            f"sglang.max_concurrent_requests: {connections} connections to all servers need as many open "
            f"files, and ulimit -Hn is {hard}: lower it, or have the limit raised"
        )
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard)
    )
