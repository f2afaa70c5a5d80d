"""The prompts of one batch, from which the clients of all nodes draw."""

from __future__ import annotations

from collections.abc import Iterable

import torch.distributed as dist


class PromptQueue:
    """The positions 0 to ``size - 1`` of a batch, each drawn by one client at a time.

    It lives in a store that all nodes reach: a counter of the positions that were drawn, a list of those that
    were given back, and a counter of those that are finished. Every operation is atomic and takes constant
    time, whatever the number of nodes.

    Args:
        store: the store.
        name: name of the batch, equal on all nodes and used once.
        size: number of prompts.

    Attributes:
        finished: number of positions that are finished on all nodes, as of the last ``finish``.
    """

    def __init__(self, store: dist.Store, name: str, size: int) -> None:
        self._store = dist.PrefixStore(name, store)
        self.size = size
        self.finished = 0
        self._all_drawn = size == 0

    def draw(self, count: int) -> list[int]:
        """Return up to ``count`` positions, which then belong to the caller."""
        positions: list[int] = []
        if count > 0 and not self._all_drawn:
            end = self._store.add("drawn", count)
            positions += range(end - count, min(end, self.size))
            self._all_drawn = end >= self.size
        while len(positions) < count:
            try:
                positions.append(int(self._store.queue_pop("returned", block=False)))
            except dist.QueueEmptyError:
                break
        return positions

    def give_back(self, positions: Iterable[int]) -> None:
        """Return positions that the caller has drawn, for any client to draw."""
        for position in positions:
            self._store.queue_push("returned", str(position))

    def finish(self, count: int = 0) -> bool:
        """Record that ``count`` more positions are finished; return whether all are, on all nodes."""
        self.finished = self._store.add("finished", count)
        return self.finished >= self.size

    def delete(self) -> None:
        """Remove the batch from the store, after all nodes know that it is finished."""
        for key in ("drawn", "finished"):
            self._store.delete_key(key)
