"""Check the weights of the servers after a sync by their checksums (``weight_sync.verify``)."""

from __future__ import annotations

import json
from collections import Counter
from hashlib import sha256

from ....errors import InputError
from ..servers import Server
from .session import Session

Checksums = list[dict[str, str]]
"""For each tensor-parallel rank of a server: parameter name in the server -> checksum of the weight."""


class Verification:
    """Check that a sync replaced every weight and that servers with the same layout hold equal weights.

    Before a sync ``scramble`` overwrites all weights with noise. A weight whose checksum is unchanged
    afterwards was not sent, or the server ignored it.

    Attributes:
        left_out: parts of the names of weights and buffers that the syncs do not send. They keep their
            values.
    """

    def __init__(self) -> None:
        # of mRoPE, which SGLang's checker takes for weights
        self.left_out = ["rotary_emb."]
        self._noise: dict[Server, Checksums] = {}
        self._version = ""
        self._agreed: dict[int, str] = {}  # tensor-parallel size -> digest of the weights of ``_version``

    def scramble(self, session: Session) -> None:
        """Overwrite the servers' weights with noise."""
        body = {"action": "reset_tensors", "skip_tensor_list": self.left_out}
        session.request("/weights_checker", body)
        self._noise = _checksums(session)

    def check(self, session: Session) -> dict[Server, str]:
        """Compare the servers' weights with the noise, and return a digest of each server's weights.

        A weight that was not replaced becomes the session's problem.
        """
        checksums = _checksums(session)
        for server, ranks in checksums.items():
            unchanged = _unchanged(self._noise[server], ranks)
            if unchanged := {name for name in unchanged if not any(part in name for part in self.left_out)}:
                names = ", ".join(sorted(unchanged)[:8])
                problem = (
                    f"weight sync: {len(unchanged)} weights of {server.url} are not among the tensors sent, "
                    f"or were ignored: {names}"
                )
                session.drop(server, InputError(problem))
                return {}
        return {server: _digest(ranks) for server, ranks in checksums.items()}

    def differing(self, digests: dict[Server, str], version: str) -> list[Server]:
        """Return the servers whose weights differ from the majority of their layout.

        Servers synced to ``version`` earlier set the majority. Every rank calls this with the digests of all
        nodes, so that all know the same majority.
        """
        if self._version != version:
            self._version, self._agreed = version, {}
        wrong: list[Server] = []
        for size in {server.tensor_parallel_size for server in digests}:
            peers = {server: each for server, each in digests.items() if server.tensor_parallel_size == size}
            agreed = self._agreed.get(size) or _majority(list(peers.values()))
            wrong += [server for server, digest in peers.items() if digest != agreed]
            if agreed:
                self._agreed[size] = agreed
        return wrong


def _checksums(session: Session) -> dict[Server, Checksums]:
    replies = session.request("/weights_checker", {"action": "checksum"})
    return {
        server: [rank["checksums"] for rank in reply.json()["ranks"]] for server, reply in replies.items()
    }


def _unchanged(before: Checksums, after: Checksums) -> set[str]:
    return {name for old, new in zip(before, after, strict=True) for name in new if new[name] == old[name]}


def _digest(checksums: Checksums) -> str:
    return sha256(json.dumps(checksums, sort_keys=True).encode()).hexdigest()


def _majority(items: list[str]) -> str | None:
    """Return the value that more than half of the items equal, or None."""
    value, count = Counter(items).most_common(1)[0]
    return value if 2 * count > len(items) else None
