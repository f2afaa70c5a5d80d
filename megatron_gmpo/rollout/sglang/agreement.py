"""Exchange news between the rollout clients of all nodes while the ranks wait for samples or weights."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from ...distributed import Nodes
from ...errors import RunError, ServerError
from .servers import Server
from .watcher import Standing

_POLL_S = 0.2
"""Interval at which a client and the store are asked for news."""
_NEWS_S = 20.0
"""Maximum seconds between two rounds, so that the waiting ranks' collective does not time out."""


@dataclass(frozen=True)
class News:
    """The state of one node's rollout client, as it sends it to the other nodes.

    Attributes:
        standing: standing of its servers; None if it has none.
        sampled: whether the awaited batch is finished, on all nodes.
        error: an error that ends the run.
    """

    standing: Standing | None = None
    sampled: bool = False
    error: RunError | None = None


@dataclass(frozen=True)
class Agreed:
    """The conclusion from the news of all nodes, equal on all ranks.

    Attributes:
        sampled: whether the awaited batch is finished.
        ready: whether a server has the current weights.
        outdated: the servers to sync now.
    """

    sampled: bool
    ready: bool
    outdated: list[Server]


def agree(everyone: list[News]) -> Agreed:
    """Return what follows from the news of all nodes' clients.

    Raises:
        RunError: a client has an error, or no node has a server left.
    """
    for news in everyone:
        if news.error:
            raise news.error
    standings = [news.standing for news in everyone if news.standing]
    if all(standing.lost for standing in standings):
        first, others = standings[0].lost, len(standings) - 1
        raise ServerError(f"{first}; none is left on {others} other nodes either" if others else first)
    outdated = [server for standing in standings for server in standing.outdated]
    return Agreed(
        sampled=any(news.sampled for news in everyone),
        ready=any(standing.ready for standing in standings),
        outdated=[] if any(standing.starting for standing in standings) else outdated,
    )


class Rounds:
    """Rounds in which the nodes' leaders exchange their news, and all ranks learn them.

    A round begins when some client has news, which its leader notes in the store, or after ``_NEWS_S``.

    Args:
        nodes: the nodes of the ranks.
        store: a store that all leaders reach.
    """

    def __init__(self, nodes: Nodes, store: dist.Store) -> None:
        self._nodes, self._store = nodes, store
        self._count = 0

    def wait(
        self, look: Callable[[], News] | None, told: News | None, pending: Future[Any] | None
    ) -> list[News]:
        """Return the news of all clients, in the order of the nodes. Collective.

        Args:
            look: return the news of this rank's client; None without a client.
            told: what this client told in the round before; different news begin a round.
            pending: the awaited batch on a rank with a client. Its end is noticed at once.
        """
        self._count += 1
        mine = self._own_news(look, told, pending) if look else None
        everyone = self._nodes.from_leaders(mine)
        if self._nodes.here == 0 and self._nodes.is_leader:  # all leaders have left the round before
            self._store.delete_key(self._key(self._count - 1))
        return everyone

    def _own_news(self, look: Callable[[], News], told: News | None, pending: Future[Any] | None) -> News:
        deadline = time.monotonic() + _NEWS_S
        while True:
            mine = look()
            if mine != told:
                self._store.set(self._key(self._count), "")
                return mine
            if self._store.check([self._key(self._count)]) or time.monotonic() > deadline:
                return mine
            if pending and not pending.done():
                wait([pending], _POLL_S)
            else:
                time.sleep(_POLL_S)  # the store has no wait that news of this client could end

    def _key(self, count: int) -> str:
        return f"news/{count}"
