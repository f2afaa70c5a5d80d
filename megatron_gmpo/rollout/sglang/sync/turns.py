"""Turns of several ranks that send weights to the same servers.

A server handles one update request at a time: SGLang's tokenizer manager holds a lock during a request
(managers/tokenizer_control_mixin.py), and its scheduler receives and loads a bucket in one thread. A
broadcast needs all servers at once. If the requests of two senders reached two servers in different orders,
the two servers would wait for each other, each in another broadcast. So one sender after the other sends a
bucket, while the others gather and quantize theirs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ....distributed import rank
from ..servers import Server


@dataclass
class Turn:
    """The right to send, passed from sender to sender, with what the senders must know of each other.

    Attributes:
        waiting: senders that have buckets left, in the order of their turns.
        versions: weight versions of the servers before the sync.
        failed: servers that failed in this sync.
        is_over: whether an error of a sender ended the sync; nothing is sent any more.
    """

    waiting: list[int]
    versions: set[str] = field(default_factory=set)
    failed: tuple[Server, ...] = ()
    is_over: bool = False


class Turns:
    """The senders and the way of the turn among them. Collective: every rank makes one together.

    Args:
        senders: ranks that send. The first one opens and closes a sync.
        timeout_s: limit for the wait for a turn.
    """

    def __init__(self, senders: Sequence[int], timeout_s: float) -> None:
        self.senders = list(senders)
        self.is_sender, self.is_first = rank() in senders, rank() == senders[0]
        self._group: Any = None
        if len(senders) > 1:
            self._group = dist.new_group(self.senders, timedelta(seconds=timeout_s), backend="gloo")
        self._kept: Turn | None = None
        self._has_buckets = False

    def join(self) -> None:
        """Take part in a new sync. The first sender has the first turn."""
        self._has_buckets = True
        self._kept = Turn(list(self.senders)) if self.is_first else None

    @contextmanager
    def turn(self, *, last: bool) -> Iterator[Turn]:
        """Wait for this sender's turn; pass it on after the block. ``last``: no further turn is needed."""
        turn = self._take()
        try:
            yield turn
        except BaseException:
            turn.is_over = True
            raise
        finally:
            self._has_buckets = not (last or turn.is_over)
            turn.waiting.remove(rank())
            if self._has_buckets:
                turn.waiting.append(rank())
            self._give(turn)

    @property
    def is_over(self) -> bool:
        """Return whether this sender gets no further turn in this sync."""
        return not self._has_buckets

    def leave(self) -> Turn | None:
        """Give up the turns that are left, after an error.

        Returns:
            On the first sender, the last turn of all senders; None on the others.
        """
        if self._has_buckets:
            with self.turn(last=True) as turn:
                turn.is_over = True
        if not self.is_first:
            return None
        self._kept = self._take()
        return self._kept

    def close(self) -> None:
        """End the group of the senders."""
        if self._group and self.is_sender:
            dist.destroy_process_group(self._group)
        self._group = None

    def _take(self) -> Turn:
        if self._kept is None:
            received: list[Turn] = [Turn([])]
            giver = dist.recv(torch.empty(1), src=None, group=self._group)
            dist.recv_object_list(received, src=giver, group=self._group)
            return received[0]
        turn, self._kept = self._kept, None
        return turn

    def _give(self, turn: Turn) -> None:
        """Pass the turn to the next sender, or to the first one when no sender has buckets left."""
        receiver = turn.waiting[0] if turn.waiting else self.senders[0]
        if receiver == rank():
            self._kept = turn
        else:
            dist.send(torch.zeros(1), dst=receiver, group=self._group)  # names the giver
            dist.send_object_list([turn], dst=receiver, group=self._group)
