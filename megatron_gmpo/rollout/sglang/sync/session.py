"""The servers of a weight sync, as the trainer's first rank speaks to them."""

from __future__ import annotations

import logging
import ssl
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache
from typing import Any

import httpx

from ....errors import InputError
from ..servers import CONNECT_TIMEOUT_S, KEEPALIVE_S, Server

log = logging.getLogger(__name__)

FAREWELL_TIMEOUT_S = 5.0
"""Limit for requests whose failure changes nothing."""


class SyncError(Exception):
    """Why a server cannot take part any longer."""


class NoAnswerError(SyncError):
    """It does not answer at all."""


class Session:
    """The servers of one sync, as the first rank sees them. One that fails leaves and the others go on.

    Attributes:
        servers: those still taking part.
        problem: what no retry can mend.
    """

    def __init__(self, servers: Sequence[Server], timeout_s: float) -> None:
        self.servers = list(servers)
        self.problem: InputError | None = None
        self._everyone = tuple(servers)
        self._http = httpx.Client(
            timeout=httpx.Timeout(timeout_s, connect=min(timeout_s, CONNECT_TIMEOUT_S)),
            limits=httpx.Limits(max_connections=None, keepalive_expiry=KEEPALIVE_S),
            trust_env=False,  # no proxy stands between trainer and servers
            verify=_certificates(),
        )
        self._threads = ThreadPoolExecutor(
            len(servers) + 2
        )  # a request to each server, a broadcast, and the one that waits for them

    @property
    def failed(self) -> tuple[Server, ...]:
        return tuple(server for server in self._everyone if server not in self.servers)

    def run(self, function: Callable[..., Any], *args: Any) -> Future[Any]:
        return self._threads.submit(function, *args)

    def start(self, path: str, body: Any) -> dict[Server, Future[httpx.Response]]:
        """Sends a request to every server: a POST of ``body``, or of ``body(server)``, or a GET when it is None."""
        return {
            server: self.run(self._request, server, path, body(server) if callable(body) else body)
            for server in self.servers
        }

    def ask(self, path: str, body: Any = None) -> dict[Server, httpx.Response]:
        """As ``start``; the answers of those that took it."""
        replies = self.start(path, body)
        for server, reply in replies.items():
            if error := reply.exception():
                self.drop(server, error)
        return {server: reply.result() for server, reply in replies.items() if server in self.servers}

    def attempt(self, servers: Iterable[Server], *requests: tuple[str, dict[str, Any]]) -> None:
        """POSTs one after the other to each server at once; what comes of them does not matter."""
        wait([self.run(self._attempt, server, requests) for server in servers])

    def drop(self, server: Server, error: BaseException | str) -> None:
        """Goes on without it. An InputError ends the sync for all."""
        if isinstance(error, InputError):
            self.problem = self.problem or error
            self.servers.clear()
        elif isinstance(error, SyncError | str):
            log.warning("weight sync: SGLang server %s %s", server.url, error)
            self.servers = [other for other in self.servers if other != server]
        else:
            raise error

    def close(self) -> None:
        """Lets every server generate again; a failed one first gives up the sync and the requests it would answer from odd weights."""
        self.attempt(
            self.failed,
            ("/end_weight_update", {}),
            ("/abort_request", {"abort_all": True}),
            ("/continue_generation", {}),
        )
        self.attempt(self.servers, ("/continue_generation", {}))
        self.release()

    def release(self) -> None:
        """Gives up threads and connections."""
        self._threads.shutdown(wait=False)
        self._http.close()

    def _request(self, server: Server, path: str, body: Any, **options: Any) -> httpx.Response:
        method, headers = ("GET", server.headers) if body is None else ("POST", server.admin_headers)
        try:
            reply = self._http.request(method, f"{server.url}{path}", json=body, headers=headers, **options)
        except httpx.TransportError as error:
            raise NoAnswerError(f"gave no answer to {path}: {error or type(error).__name__}") from None
        if reply.status_code in (401, 403):
            key = "SGLANG_API_KEY" if body is None else "SGLANG_ADMIN_API_KEY"
            raise InputError(
                f"{server.url} refuses the API key (HTTP {reply.status_code} to {path}): set {key} to the server's"
            )
        if reply.status_code == 404:
            raise InputError(f"{server.url} does not know {path}: it must be SGLang 0.5.23 or newer")
        if reply.status_code != 200:
            raise SyncError(
                f"refused {path} (HTTP {reply.status_code}): {' '.join(reply.text.split())[:300]}"
            )
        return reply

    def _attempt(self, server: Server, requests: Iterable[tuple[str, dict[str, Any]]]) -> None:
        for path, body in requests:
            try:
                self._request(server, path, body, timeout=FAREWELL_TIMEOUT_S)
            except NoAnswerError:
                return
            except (SyncError, InputError):
                continue


@cache
def _certificates() -> ssl.SSLContext:
    return httpx.create_ssl_context()  # reading them takes as long as a small sync
