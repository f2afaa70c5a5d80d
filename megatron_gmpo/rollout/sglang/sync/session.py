"""HTTP requests from a rank to the servers that it leads in a weight sync."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import httpx

from ....errors import InputError
from ..servers import CONNECT_TIMEOUT_S, KEEPALIVE_S, Server, certificates

log = logging.getLogger(__name__)

BEST_EFFORT_TIMEOUT_S = 5.0
"""Timeout, in seconds, of requests whose errors are ignored."""

Body = dict[str, Any] | Callable[[Server], dict[str, Any]] | None
"""JSON body of a POST, equal for all servers or made per server; None sends a GET."""


class SyncError(Exception):
    """A server failed during a sync; the message completes the sentence "SGLang server URL ..."."""


class NoAnswerError(SyncError):
    """The server is unreachable or did not answer within the timeout."""


class Session:
    """The servers of one sync. A server that fails is dropped, and the sync continues with the others.

    Args:
        servers: the servers that this rank leads.
        timeout_s: timeout of one request.

    Attributes:
        servers: servers that have not failed.
        problem: an error that a retry cannot fix; the caller raises it after ``finish``.
    """

    def __init__(self, servers: Sequence[Server], timeout_s: float) -> None:
        self.servers = list(servers)
        self.problem: InputError | None = None
        self._all_servers = tuple(servers)
        self._timeout = httpx.Timeout(timeout_s, connect=min(timeout_s, CONNECT_TIMEOUT_S))
        self._http = httpx.Client(
            limits=httpx.Limits(max_connections=None, keepalive_expiry=KEEPALIVE_S),
            trust_env=False,  # requests to the servers must not go through a proxy
            verify=certificates(),
        )
        # one thread per server, one for a broadcast, and one that waits for both
        self._threads = ThreadPoolExecutor(len(servers) + 2)

    @property
    def failed(self) -> tuple[Server, ...]:
        """Return the servers dropped so far, in the order they were given."""
        return tuple(server for server in self._all_servers if server not in self.servers)

    def submit(self, function: Callable[..., Any], *args: Any) -> Future[Any]:
        """Run a function in one of the session's threads."""
        return self._threads.submit(function, *args)

    def send(self, path: str, body: Body) -> dict[Server, Future[httpx.Response]]:
        """Start a request to every remaining server and return the pending responses."""
        return {
            server: self.submit(
                self._request, server, path, body(server) if callable(body) else body, self._timeout
            )
            for server in self.servers
        }

    def request(self, path: str, body: Body = None) -> dict[Server, httpx.Response]:
        """Send a request to every remaining server, drop servers that fail, return the other responses."""
        replies = self.send(path, body)
        for server, reply in replies.items():
            if error := reply.exception():
                self.drop(server, error)
        return {server: reply.result() for server, reply in replies.items() if server in self.servers}

    def attempt(self, servers: Iterable[Server], *requests: tuple[str, dict[str, Any]]) -> None:
        """POST each ``(path, body)`` in order, to all ``servers`` in parallel, and ignore errors."""
        wait([self.submit(self._attempt, server, requests) for server in servers])

    def drop(self, server: Server, error: BaseException | str) -> None:
        """Continue without a server. An InputError is recorded in ``problem`` and drops all servers.

        Raises:
            BaseException: ``error`` itself when it is neither a SyncError nor an InputError.
        """
        if isinstance(error, InputError):
            self.problem = self.problem or error
            self.servers.clear()
        elif isinstance(error, SyncError | str):
            log.warning("weight sync: SGLang server %s %s", server.url, error)
            self.servers = [other for other in self.servers if other != server]
        else:
            raise error

    def finish(self) -> None:
        """Resume generation on every server and close the session.

        A failed server first ends its weight update and aborts its requests, because its weights may be a mix
        of old and new weights.
        """
        self.attempt(
            self.failed,
            ("/end_weight_update", {}),
            ("/abort_request", {"abort_all": True}),
            ("/continue_generation", {}),
        )
        self.attempt(self.servers, ("/continue_generation", {}))
        self.close()

    def close(self) -> None:
        """Close threads and connections."""
        self._threads.shutdown(wait=False)
        self._http.close()

    def _request(
        self, server: Server, path: str, body: dict[str, Any] | None, timeout: httpx.Timeout | float
    ) -> httpx.Response:
        method, headers = ("GET", server.headers) if body is None else ("POST", server.admin_headers)
        try:
            reply = self._http.request(
                method, f"{server.url}{path}", json=body, headers=headers, timeout=timeout
            )
        except httpx.TransportError as error:
            raise NoAnswerError(f"gave no answer to {path}: {error or type(error).__name__}") from None
        if reply.status_code in (401, 403):
            key = "SGLANG_API_KEY" if body is None else "SGLANG_ADMIN_API_KEY"
            raise InputError(
                f"{server.url} refuses the API key (HTTP {reply.status_code} to {path}): "
                f"set {key} to the server's key"
            )
        if reply.status_code == 404:
            raise InputError(f"{server.url} has no route {path}: use SGLang 0.5.23 or newer")
        if reply.status_code != 200:
            raise SyncError(
                f"refused {path} (HTTP {reply.status_code}): {' '.join(reply.text.split())[:300]}"
            )
        return reply

    def _attempt(self, server: Server, requests: Iterable[tuple[str, dict[str, Any]]]) -> None:
        for path, body in requests:
            try:
                self._request(server, path, body, BEST_EFFORT_TIMEOUT_S)
            except NoAnswerError:
                return
            except (SyncError, InputError):
                continue
