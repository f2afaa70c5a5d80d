"""Release and resume the memory of servers that share the trainer's GPUs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Literal

import httpx

from ...errors import ServerError
from .servers import Server
from .sync.session import NoAnswerError, Session, SyncError

log = logging.getLogger(__name__)


def release_memory(servers: Sequence[Server], timeout_s: float) -> None:
    """Make idle servers free the memory of weights and cache. SGLang exits if a request is unfinished.

    Servers that do not answer, or have not been synced since their start, are skipped.

    Raises:
        ServerError: a server refuses.
    """
    body = {"tags": ["kv_cache", "weights"]}
    _responses(_synced(servers, timeout_s), "/release_memory_occupation", body, timeout_s)


def resume_memory(
    servers: Sequence[Server], tags: Sequence[Literal["weights", "kv_cache"]], timeout_s: float
) -> tuple[Server, ...]:
    """Make servers allocate the memory again that ``release_memory`` freed. The weights' values are lost.

    Returns:
        The servers that had released memory, without servers that started since. Only these may resume other
        tags after a sync, because SGLang exits when it resumes memory that it has not released.

    Raises:
        ServerError: a server refuses.
    """
    released = _synced(servers, timeout_s)
    _responses(released, "/resume_memory_occupation", {"tags": list(tags)}, timeout_s)
    return released


def _synced(servers: Sequence[Server], timeout_s: float) -> tuple[Server, ...]:
    """Return the servers that were synced since their start."""
    replies = _responses(servers, "/model_info", None, timeout_s)
    return tuple(server for server, reply in replies.items() if reply.json()["weight_version"] != "default")


def _responses(
    servers: Sequence[Server], path: str, body: dict[str, Any] | None, timeout_s: float
) -> dict[Server, httpx.Response]:
    """Send a request to every server and return the responses of those that answer."""
    session = Session(servers, timeout_s)
    responses = {}
    try:
        for server, reply in session.send(path, body).items():
            try:
                responses[server] = reply.result()
            except NoAnswerError as error:
                log.warning("SGLang server %s %s", server.url, error)
            except SyncError as error:
                raise ServerError(f"SGLang server {server.url} {error}") from None
    finally:
        session.close()
    return responses
