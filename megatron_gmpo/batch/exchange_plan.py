"""The sizes, places and messages of an exchange, which follow from the index of a step."""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .columns import RoutingShape
from .experts import check_experts
from .samples import Sample

ROUND_BYTES = 8 << 20
"""Bytes that a node sends in one round; a longer sequence has a round of its own."""


class Record:
    """The columns of a sequence as bytes, in the order tokens, log probabilities, experts, mask.

    Attributes:
        shape: (layers, topk) of a token's experts; () if they are left out.
        dtypes: the dtype of each column.
        widths: bytes of a token in each column.
    """

    def __init__(self, routing: RoutingShape | None) -> None:
        self._routing = routing
        self.shape = (routing.num_layers, routing.topk) if routing else ()
        experts = np.dtype(np.int16 if routing and routing.num_experts > 256 else np.uint8)
        self.dtypes: list[np.dtype[Any]] = [np.dtype("i4"), np.dtype("f4"), experts, np.dtype("?")]
        self.widths = (4, 4, math.prod(self.shape) * experts.itemsize if routing else 0, 1)

    def check(self, number: int, sample: Sample) -> None:
        """Raise an InputError unless the sample has the experts of this record, see ``check_experts``."""
        if self._routing:
            check_experts(number, sample, self._routing)

    def nbytes(self, lengths: Any) -> Any:
        """Return the bytes of a sequence of each length; its last token has no experts."""
        return lengths * sum(self.widths) - self.widths[2]

    def parts(self, sample: Sample) -> list[Any]:
        """Return the buffers of a sample's columns."""
        experts: Any = b""
        if self.shape:
            assert sample.routed_experts is not None
            experts = sample.routed_experts.astype(self.dtypes[2], copy=False)
        return [sample.tokens, sample.rollout_logprobs, experts, sample.response_mask]

    def split(self, length: int, data: np.ndarray) -> list[np.ndarray]:
        """Cut the (nbytes,) uint8 of a sequence into the buffers of its columns."""
        sizes = length * np.array(self.widths)
        sizes[2] -= self.widths[2]
        return np.split(data, np.cumsum(sizes)[:-1])


class Layout:
    """The places of all columns in the file of a node.

    Attributes:
        nbytes: size of all sections, a multiple of a page.
        sections: start and rows of each replica's section, by replica.
        offsets: (S, 4) where the columns of each sequence start; -1 if the node does not train it.
    """

    def __init__(
        self, lengths: np.ndarray, replica_of: np.ndarray, replicas: Iterable[int], record: Record
    ) -> None:
        widths = np.array(record.widths)
        self.nbytes = 0
        self.sections: dict[int, tuple[int, int]] = {}
        self.offsets = np.full((len(lengths), len(widths)), -1, np.int64)
        for replica in replicas:
            members = np.flatnonzero(replica_of == replica)
            ends = lengths[members].cumsum()
            rows = int(ends[-1]) if len(ends) else 0
            columns = self.nbytes + rows * (widths.cumsum() - widths)
            self.offsets[members] = columns + (ends - lengths[members])[:, None] * widths
            self.sections[replica] = self.nbytes, rows
            pages = -(-rows * int(widths.sum()) // mmap.ALLOCATIONGRANULARITY)
            self.nbytes += pages * mmap.ALLOCATIONGRANULARITY


@dataclass(frozen=True)
class Block:
    """One message: sequences of one node for the same other nodes.

    Attributes:
        source: number of the node that has the samples.
        home: number of the set of nodes that train the sequences.
        targets: these nodes without ``source``.
        numbers: numbers of the sequences.
        nbytes: their bytes.
    """

    source: int
    home: int
    targets: tuple[int, ...]
    numbers: list[int]
    nbytes: int


@dataclass
class Round:
    """The messages of one round that a node sends and receives."""

    sent: list[Block] = field(default_factory=list)
    received: list[Block] = field(default_factory=list)

    @property
    def outbox_bytes(self) -> int:
        return sum(block.nbytes for block in self.sent)


class Routes:
    """The way of every sequence from the node that sampled it to the nodes that train it.

    Args:
        node_of: the number of the node of each rank.
        replicas: the data-parallel replica of each rank.
        here: the number of this node.

    Attributes:
        replicas_here: replicas with a rank on this node, in ascending order.
    """

    def __init__(self, node_of: Sequence[int], replicas: Sequence[int], here: int) -> None:
        self._node_of, self._here = np.array(node_of), here
        self._there = np.zeros((max(replicas) + 1, max(node_of) + 1), np.bool_)
        self._there[replicas, node_of] = True
        self._homes, self._home_of = np.unique(self._there, axis=0, return_inverse=True)
        self.replicas_here: list[int] = np.flatnonzero(self._there[:, here]).tolist()

    def rounds(self, owner: np.ndarray, replica_of: np.ndarray, nbytes: np.ndarray) -> list[Round]:
        """Return the messages of this node, round after round. All nodes have the same number of rounds.

        A node sends first to the nodes after it, so that no node receives from all others at a time.

        Args:
            owner: (S,) rank that has each sequence's sample.
            replica_of: (S,) replica that trains each sequence, or -1.
            nbytes: (S,) bytes of each sequence.
        """
        source = self._node_of[owner]
        elsewhere = self._there.sum(1)[replica_of] > self._there[replica_of, source]
        numbers = np.flatnonzero((replica_of >= 0) & elsewhere)
        home, source = self._home_of[replica_of[numbers]], source[numbers]
        ahead = (self._homes.argmax(1)[home] - source) % self._homes.shape[1]
        order = np.lexsort((numbers, home, ahead, source))
        numbers, home, source = numbers[order], home[order], source[order]
        starts = np.cumsum(nbytes[numbers]) - nbytes[numbers]
        _, first, of = np.unique(source, return_index=True, return_inverse=True)
        turn = (starts - starts[first][of]) // ROUND_BYTES
        rounds = [Round() for _ in range(int(turn.max(initial=-1)) + 1)]
        mine = (source == self._here) | self._homes[home, self._here]
        numbers, key = numbers[mine], np.stack([source, home, turn], axis=1)[mine]
        changes = np.flatnonzero((np.diff(key, axis=0) != 0).any(1)) + 1
        for members, at in zip(np.split(numbers, changes), [0, *changes], strict=True):
            if not len(members):
                continue
            node, place, when = key[at].tolist()
            targets = tuple(int(n) for n in np.flatnonzero(self._homes[place]) if n != node)
            block = Block(node, place, targets, members.tolist(), int(nbytes[members].sum()))
            (rounds[when].sent if node == self._here else rounds[when].received).append(block)
        return rounds
