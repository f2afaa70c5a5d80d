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
from typing import Any

import aiohttp
import torch.distributed as dist

from ...config import SGLangConfig
from ...errors import InputError
from ..ending import Ending
from ..engine import SamplingParams
from .batches import Batches, Responses
from .processes import LocalServers
from .sampler import Sampler
from .servers import CONNECT_TIMEOUT_S, KEEPALIVE_S, Server, certificates
from .watcher import Standing, Watcher

_OTHER_FILES = 1024


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
        return_routed_experts: request the experts of every token.

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
        return_routed_experts: bool = False,
    ) -> None:
        _allow_open_files(len(servers) * cfg.max_concurrent_requests)
        self.local = local
        if local:
            local.start()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rollout client", daemon=True)
        self._thread.start()
        self._call(self._open(servers, cfg, nonce, store, return_routed_experts))

    async def _open(
        self,
        servers: Sequence[Server],
        cfg: SGLangConfig,
        nonce: str,
        store: dist.Store,
        return_routed_experts: bool,
    ) -> None:
        self._http = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S, ssl=certificates()),
            # each request sets its own timeout
            timeout=aiohttp.ClientTimeout(total=None, connect=CONNECT_TIMEOUT_S),
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,  # no proxy between trainer and servers
        )
        self._watcher = Watcher(servers, self.local, cfg, nonce, self._http)
        self._sampler = Sampler(self._watcher, self._http, cfg, nonce, return_routed_experts)
        # a connection of its own, because the main thread may wait in another operation
        own: dist.Store = store.clone()  # pyright: ignore[reportAttributeAccessIssue]
        self._batches = Batches(self._watcher, self._sampler, own)
        self._batches.announce()

    def close(self) -> None:
        """End all requests (also on external servers), the servers started by the run, and the thread."""
        self._call(self._close())
        if self.local:
            self.local.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
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
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    # samples

    def submit(
        self, name: str, prompts: list[list[int]], sampling: SamplingParams, ending: Ending
    ) -> Future[Responses]:
        """Start ``Batches.sample`` and return at once."""
        return asyncio.run_coroutine_threadsafe(
            self._batches.sample(name, prompts, sampling, ending), self._loop
        )

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
