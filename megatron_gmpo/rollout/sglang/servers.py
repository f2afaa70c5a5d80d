"""The address and keys of an SGLang server, its probes, and checks of servers that are already running."""

from __future__ import annotations

import json
import os
import socket
import ssl
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import httpx

from ...errors import Exit, InputError, ServerError
from ...supervision.records import node_name

CONNECT_TIMEOUT_S = 10.0
PROBE_TIMEOUT_S = 5.0
"""Timeout, in seconds, of requests that do not generate: for the weight version, and to abort."""
KEEPALIVE_S = 2.0
"""Seconds after which idle connections are closed. SGLang closes them after 5 s, even under a new request."""

_REACH_TIMEOUT_S = 30.0
_POLL_S = 0.5


@dataclass(frozen=True)
class Server:
    """Address and keys of a server.

    Attributes:
        url: ``http://host:port``, without a slash at the end.
        api_key: key for ``/generate`` and other user requests; empty if the server has none.
        admin_key: key for weight updates, pauses, aborts and cache flushes.
        tensor_parallel_size: number of the server's ranks, each with a shard of the weights.
        node: name of the server's node, as ``node_name`` gives it there.
        first_gpu: the node's GPU of the server's first rank; the others follow. 0 without GPUs.
    """

    url: str
    api_key: str = field(default="", repr=False)
    admin_key: str = field(default="", repr=False)
    tensor_parallel_size: int = 1
    node: str = field(default_factory=node_name)
    first_gpu: int = 0

    @property
    def gpus(self) -> range:
        """Return the node's GPUs that the server's ranks use."""
        return range(self.first_gpu, self.first_gpu + self.tensor_parallel_size)

    @property
    def headers(self) -> dict[str, str]:
        """Return the headers of a user request."""
        return _bearer(self.api_key)

    @property
    def admin_headers(self) -> dict[str, str]:
        """Return the headers of an admin request."""
        return _bearer(self.admin_key)

    def weight_version(self, timeout_s: float) -> str | None:
        """Return the version of the weights, or None if the HTTP front does not answer within the timeout."""
        try:
            reply = _request("GET", f"{self.url}/model_info", self.headers, timeout_s)
        except httpx.TransportError:
            return None
        return str(reply.json().get("weight_version")) if reply.status_code == 200 else None

    def info(self) -> dict[str, Any]:
        """Return the options with which the server was started, and others."""
        return _request("GET", f"{self.url}/server_info", self.headers, _REACH_TIMEOUT_S).json()

    def answers(self, timeout_s: float) -> bool:
        """Return whether the server generates a token within the timeout.

        A busy server passes as soon as any of its requests makes progress. An idle server needs about a
        second.
        """
        try:
            return _request("GET", f"{self.url}/health_generate", {}, timeout_s).status_code == 200
        except httpx.TransportError:
            return False


def external_servers(urls: Iterable[str]) -> list[Server]:
    """Check running servers and return them. SGLANG_API_KEY and SGLANG_ADMIN_API_KEY hold their keys.

    Raises:
        InputError: a malformed URL, a server that does not answer, or a key that it refuses.
    """
    api_key = os.environ.get("SGLANG_API_KEY", "")
    # a server without an admin key checks the API key instead
    admin_key = os.environ.get("SGLANG_ADMIN_API_KEY", "") or api_key
    return [_external_server(url.rstrip("/"), api_key, admin_key, "rollout.server_urls") for url in urls]


def published_addresses(file: Path, timeout_s: float) -> list[tuple[str, str]]:
    """Wait for ``file``, in which another job step publishes its servers; return their URLs and nodes.

    The file holds ``[{"url", "node"}, ...]``, or ``{"error", "code"}`` (``serve.py``).

    Raises:
        ServerError: the file does not appear within ``timeout_s``, or reports a failed start.
        InputError: the file reports wrong settings.
    """
    deadline = time.monotonic() + timeout_s
    while not file.is_file():
        if time.monotonic() > deadline:
            raise ServerError(
                f"rollout.servers_file = {str(file)!r} did not appear within "
                f"sglang.start_timeout_s = {timeout_s:g}"
            )
        time.sleep(_POLL_S)
    published = json.loads(file.read_text())
    if isinstance(published, dict):
        kind = InputError if published["code"] == Exit.BAD_INPUT else ServerError
        raise kind(f"the rollout servers of the job did not start: {published['error']}")
    return [(entry["url"], entry["node"]) for entry in published]


def published_servers(file: Path, addresses: Iterable[tuple[str, str]]) -> list[Server]:
    """Check these servers of ``file`` and return them.

    The keys ``{"api_key", "admin_key"}`` are in ``server_keys.json`` in the same folder.

    Raises:
        ServerError: a server does not answer.
    """
    keys = json.loads(file.with_name("server_keys.json").read_text())
    try:
        return [
            _external_server(url, keys["api_key"], keys["admin_key"], "rollout.servers_file", node)
            for url, node in addresses
        ]
    except InputError as error:  # the user did not write this file
        raise ServerError(str(error)) from None


def address_towards(host: str) -> str:
    """Return the address that this machine uses in connections to ``host``."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))  # selects a route, sends nothing
        return probe.getsockname()[0]


@cache
def certificates() -> ssl.SSLContext:
    """Return the certificate authorities of the system or SSL_CERT_FILE. Cached, because reading is slow."""
    return ssl.create_default_context()


def node_of(url: str) -> str:
    """Return the name of this node if ``url`` leads to one of its addresses, or else the URL's host."""
    host = httpx.URL(url).host
    try:
        # towards its own address a machine uses that address
        return node_name() if address_towards(host) == socket.gethostbyname(host) else host
    except OSError:  # a host with an IPv6 address only
        return host


def _external_server(url: str, api_key: str, admin_key: str, field: str, node: str | None = None) -> Server:
    named = f"{field}: {url!r}"
    try:
        info = _request("GET", f"{url}/server_info", _bearer(api_key), _REACH_TIMEOUT_S)
        # the server checks the key before the body; an empty body changes nothing
        update = _request("POST", f"{url}/update_weight_version", _bearer(admin_key), _REACH_TIMEOUT_S)
    except (httpx.UnsupportedProtocol, httpx.InvalidURL):
        raise InputError(f"{named} is not a URL: give http://HOST:PORT") from None
    except httpx.TransportError as error:
        raise InputError(
            f"{named} cannot be reached ({error}): start the server or correct the URL"
        ) from None
    for reply, name in ((info, "SGLANG_API_KEY"), (update, "SGLANG_ADMIN_API_KEY")):
        if reply.status_code in (401, 403):
            where = (
                "in server_keys.json"
                if field == "rollout.servers_file"
                else f"in the environment variable {name}"
            )
            raise InputError(f"{named} refuses the key {where}: set the key that the server was started with")
    if info.status_code != 200:
        raise InputError(
            f"{named} replies {info.status_code} to /server_info: give the URL of an SGLang server"
        )
    settings = info.json()
    return Server(url, api_key, admin_key, settings["tp_size"], node or node_of(url), settings["base_gpu_id"])


def _request(method: str, url: str, headers: dict[str, str], timeout_s: float) -> httpx.Response:
    # trust_env: no proxy between trainer and servers
    return httpx.request(
        method, url, headers=headers, timeout=timeout_s, trust_env=False, verify=certificates()
    )


def _bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}
