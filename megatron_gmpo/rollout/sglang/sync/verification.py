"""Check the weights of the servers after a sync by their checksums (``weight_sync.verify``)."""

from __future__ import annotations

from typing import Any

from ....errors import InputError
from ..servers import Server
from .session import Session

Checksums = list[dict[str, str]]
"""For each tensor-parallel rank of a server: parameter name in the server -> checksum of the weight."""


class Verification:
    """Check that a sync replaced every weight and that servers with the same layout hold equal weights.

    Before a sync ``scramble`` overwrites all weights with noise. A weight whose checksum is unchanged
    afterwards was not sent, or the server ignored it.
    """

    def __init__(self) -> None:
        self._noise: dict[Server, Checksums] = {}
        self._version = ""
        self._agreed: dict[int, Checksums] = {}  # tensor-parallel size -> checksums for ``_version``

    def scramble(self, session: Session) -> None:
        """Overwrite the servers' weights with noise."""
        session.request("/weights_checker", {"action": "reset_tensors"})
        self._noise = _checksums(session)

    def check(self, session: Session, version: str) -> None:
        """Compare the servers' weights with the noise, each other, and earlier syncs of ``version``.

        A server that differs from the majority of its layout is dropped. A weight that was not replaced
        becomes the session's problem.
        """
        checksums = _checksums(session)
        for server, ranks in checksums.items():
            if unchanged := _unchanged(self._noise[server], ranks):
                names = ", ".join(sorted(unchanged)[:8])
                problem = (
                    f"weight sync: {len(unchanged)} weights of {server.url} are not among the tensors sent, "
                    f"or were ignored: {names}"
                )
                return session.drop(server, InputError(problem))
        if self._version != version:
            self._version, self._agreed = version, {}
        for size in {server.tensor_parallel_size for server in checksums}:
            peers = {s: ranks for s, ranks in checksums.items() if s.tensor_parallel_size == size}
            agreed = self._agreed.get(size) or _majority(list(peers.values()))
            for server in [server for server, ranks in peers.items() if ranks != agreed]:
                session.drop(server, "has other weights than its peers after the sync")
            if agreed:
                self._agreed[size] = agreed


def _checksums(session: Session) -> dict[Server, Checksums]:
    replies = session.request("/weights_checker", {"action": "checksum"})
    return {
        server: [rank["checksums"] for rank in reply.json()["ranks"]] for server, reply in replies.items()
    }


def _unchanged(before: Checksums, after: Checksums) -> set[str]:
    return {name for old, new in zip(before, after, strict=True) for name in new if new[name] == old[name]}


def _majority(items: list[Any]) -> Any:
    """Return the value that more than half of the items equal, or None."""
    return next((item for item in items if 2 * items.count(item) > len(items)), None)
