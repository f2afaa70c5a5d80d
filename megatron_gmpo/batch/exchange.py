"""Move a step's tokens from the ranks that hold the samples to the nodes that train them.

Every node that has a rank of a sequence's data-parallel replica gets the sequence's columns once, in a file
in shared memory that the ranks of the node map. The file has a section for each replica with a rank on the
node, and a temporary outbox::

    section: tokens | rollout_logprobs | routed_experts | response_mask      outbox: sequence | sequence | ...

The file has no name. The leader of the node makes it with ``tempfile.TemporaryFile``, and the other ranks
open it through the leader's ``/proc/PID/fd``. So the kernel frees it even if every process is killed.

A rank writes its samples into the sections of its node. It writes samples for other nodes into the outbox, in
which the columns of a sequence lie one after another. The leaders send the outbox in rounds, which bounds its
size and that of the leaders' buffers. All sizes and offsets follow from the index, so no metadata is sent.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from io import FileIO
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from .. import files
from ..distributed import Nodes, agreed, all_gather_objects
from ..errors import InputError, disk_full
from .columns import RoutingShape
from .exchange_plan import Block, Layout, Record, Round, Routes
from .index import StepIndex
from .samples import Sample

_SHARED_MEMORY = "/dev/shm"
_TRIM_BYTES = 8 << 20
"""Bytes of samples after which their memory is given back to the system."""


@dataclass(frozen=True)
class Columns:
    """The flat columns of the sequences that one replica trains, in ascending order of their numbers.

    The arrays are mapped from the node's file. A write to an array changes only this process's copy.

    Attributes:
        tokens: (L,) int32.
        response_mask: (L,) bool.
        rollout_logprobs: (L,) float32.
        routed_experts: (L, layers, topk), uint8 if the model has at most 256 experts, else int16; None if
            they are not exchanged. The row of a sequence's last token is 0 and has no meaning.
    """

    tokens: np.ndarray
    response_mask: np.ndarray
    rollout_logprobs: np.ndarray
    routed_experts: np.ndarray | None


def check_folder(folder: str) -> None:
    """Check that this node can write into the folder of an exchange.

    Raises:
        InputError: it cannot.
    """
    with files.writable(f"rollout.exchange_folder = {folder!r}", "choose another folder"):
        tempfile.TemporaryFile(dir=folder or _SHARED_MEMORY).close()


class Exchange:
    """Give every node the columns of the sequences that it trains. The constructor is collective.

    Args:
        nodes: the ranks by node.
        replica: this rank's data-parallel rank.
        folder: folder of the files, on every node; it should be in memory. "" means /dev/shm.
        timeout_s: limit for one message between two nodes.
        routing: the shape of the samples' routed experts; None leaves them out.
    """

    def __init__(
        self, nodes: Nodes, replica: int, folder: str, timeout_s: float, routing: RoutingShape | None = None
    ) -> None:
        self._nodes, self._replica, self._folder = nodes, replica, folder or _SHARED_MEMORY
        self._group, self._leaders = nodes.group, nodes.leaders
        self._leader_of = [ranks[0] for ranks in nodes.ranks.values()]
        self._timeout = timedelta(seconds=timeout_s)
        self._record = Record(routing)
        self._routes = Routes(nodes.of_rank, all_gather_objects(replica), nodes.here)

    def distribute(self, mine: dict[int, Sample], index: StepIndex, replica_of: np.ndarray) -> Columns:
        """Return the columns of the sequences that this rank's replica trains. Collective.

        Args:
            mine: this rank's samples by the number of their sequence. The samples are removed one after
                another, so that their memory is free unless the caller keeps them elsewhere.
            index: the sequences of the step, equal on all ranks.
            replica_of: (S,) the data-parallel rank that trains each sequence, equal on all ranks; -1 if none
                does, and the sequence is not moved.

        Raises:
            InputError: a sample has no record of its routed experts or one that does not fit, or a node has
                too little room for its file. Nothing has been written, and ``mine`` is complete.
            DiskFullError: other processes have filled the folder meanwhile.
        """
        with agreed():
            for number, sample in mine.items():
                if replica_of[number] >= 0:
                    self._record.check(number, sample)
        lengths = index.length.astype(np.int64)
        layout = Layout(lengths, replica_of, self._routes.replicas_here, self._record)
        rounds = self._routes.rounds(index.owner, replica_of, self._record.nbytes(lengths))
        outbox = max((turn.outbox_bytes for turn in rounds), default=0)
        with self._new_file(layout.nbytes + outbox) as file:
            writer = _Writer(file, self._folder, layout, self._record)
            self._move(writer, mine, rounds, lengths)
            with agreed():
                if self._nodes.is_leader:
                    os.ftruncate(file.fileno(), layout.nbytes)
                if writer.failure:
                    raise disk_full(writer.failure) or writer.failure
            return self._columns(file, *layout.sections[self._replica])

    def _move(
        self, writer: _Writer, mine: dict[int, Sample], rounds: list[Round], lengths: np.ndarray
    ) -> None:
        """Write this rank's samples, exchange the others between the leaders, and write what arrives."""
        leaving = {number for turn in rounds for block in turn.sent for number in block.numbers}
        for number in sorted(mine.keys() - leaving):
            writer.put_columns(number, self._record.parts(mine.pop(number)))
        for turn in rounds:
            if turn.sent:
                self._fill_outbox(writer, mine, turn, lengths)
                self._wait_for_node()  # the outbox is complete
            self._exchange(writer, turn, lengths)

    def _fill_outbox(
        self, writer: _Writer, mine: dict[int, Sample], turn: Round, lengths: np.ndarray
    ) -> None:
        """Write this rank's samples of the round into the outbox, and into sections of this node."""
        at = writer.layout.nbytes
        for number in (number for block in turn.sent for number in block.numbers):
            if number in mine:
                parts = self._record.parts(mine.pop(number))
                writer.put(parts, at)
                writer.put_columns(number, parts)
            at += int(self._record.nbytes(lengths[number]))

    def _exchange(self, writer: _Writer, turn: Round, lengths: np.ndarray) -> None:
        """Let the leader send the outbox, and receive and write what arrives in the round."""
        requests, arriving = self._start(turn, writer) if self._nodes.is_leader else ([], [])
        if turn.sent:
            self._wait_for_node()  # the outbox has been read
        for request in requests:
            request.wait(self._timeout)
        for block, data in arriving:
            writer.put_block(block.numbers, lengths, data)

    def _start(self, turn: Round, writer: _Writer) -> tuple[list[Any], list[tuple[Block, np.ndarray]]]:
        """Start the messages of a round; return the requests, and the buffers of the blocks that arrive."""
        requests: list[Any] = []
        arriving: list[tuple[Block, np.ndarray]] = []
        for block in turn.received:
            data = torch.empty(block.nbytes, dtype=torch.uint8)
            requests.append(dist.irecv(data, self._leader_of[block.source], self._leaders, block.home))
            arriving.append((block, data.numpy()))
        at = writer.layout.nbytes
        for block in turn.sent:
            data = torch.from_numpy(writer.read(at, block.nbytes))
            at += block.nbytes
            for node in block.targets:
                requests.append(dist.isend(data, self._leader_of[node], self._leaders, block.home))
        return requests, arriving

    def _columns(self, file: FileIO, start: int, rows: int) -> Columns:
        record = self._record
        nbytes = rows * sum(record.widths)
        data = (
            mmap.mmap(file.fileno(), nbytes, access=mmap.ACCESS_COPY, offset=start) if rows else bytearray()
        )
        columns: list[np.ndarray] = []
        at = 0
        for width, dtype in zip(record.widths, record.dtypes, strict=True):
            columns.append(np.frombuffer(data, dtype, rows * width // dtype.itemsize, at))
            at += rows * width
        tokens, logprobs, experts, mask = columns
        return Columns(tokens, mask, logprobs, experts.reshape(rows, *record.shape) if record.shape else None)

    def _wait_for_node(self) -> None:
        if self._group:
            dist.barrier(self._group)

    def _new_file(self, nbytes: int) -> FileIO:
        """Return a new file of zeros that all ranks of this node have open. Collective.

        Raises:
            InputError: the folder has too little room, or the ranks have different PID namespaces.
        """
        address = torch.zeros(4, dtype=torch.int64)  # process, descriptor, device and inode
        file: Any = None
        with agreed():
            if self._nodes.is_leader:
                free = shutil.disk_usage(self._folder).free
                if free < nbytes:
                    raise InputError(
                        f"rollout.exchange_folder = {self._folder!r} of node {self._nodes.name!r} has "
                        f"{free / 1e6:.3f} MB free, and the tokens of this step need {nbytes / 1e6:.3f} MB: "
                        "enlarge that file system, choose another folder, or lower rollout.prompts_per_step"
                    )
                file = tempfile.TemporaryFile(buffering=0, dir=self._folder)  # noqa: SIM115
                os.ftruncate(file.fileno(), nbytes)
                status = os.fstat(file.fileno())
                address = torch.tensor([os.getpid(), file.fileno(), status.st_dev, status.st_ino])
        if self._group:
            dist.broadcast(address, self._nodes.leader, self._group)
        with agreed():  # the leader keeps its file open until all ranks have opened it
            if not self._nodes.is_leader:
                file = self._open(*address.tolist())
        return file

    def _open(self, process: int, descriptor: int, device: int, inode: int) -> FileIO:
        """Open the file that the leader's process has open."""
        try:
            file = FileIO(f"/proc/{process}/fd/{descriptor}", "r+")
            status = os.fstat(file.fileno())
            if (status.st_dev, status.st_ino) == (device, inode):
                return file
        except OSError:
            pass
        raise InputError(
            f"the ranks of node {self._nodes.name!r} do not see each other's processes: "
            "start all ranks of a node in one container"
        )


class _Writer:
    """Writes into the node's file. After a failure it writes nothing, but the exchange goes on to its end.

    The file is not mapped for writing, because a full file system would then kill the process with SIGBUS.

    Attributes:
        failure: the first error.
    """

    def __init__(self, file: FileIO, folder: str, layout: Layout, record: Record) -> None:
        self.layout = layout
        self._file, self._folder, self._record = file.fileno(), folder, record
        self.failure: OSError | None = None
        self._untrimmed = 0

    def put(self, parts: Sequence[Any], offset: int) -> None:
        """Write buffers one after another."""
        if self.failure:
            return
        try:
            written = os.pwritev(self._file, parts, offset)
        except OSError as error:
            self.failure = OSError(error.errno, error.strerror, self._folder)
        else:
            if written < sum(memoryview(part).nbytes for part in parts):
                self.failure = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._folder)

    def put_columns(self, number: int, parts: Sequence[Any]) -> None:
        """Write the columns of a sequence into their section, if the node trains it."""
        self._trim(sum(memoryview(part).nbytes for part in parts))
        if self.layout.offsets[number, 0] >= 0:
            for part, offset in zip(parts, self.layout.offsets[number].tolist(), strict=True):
                self.put([part], offset)

    def put_block(self, numbers: Iterable[int], lengths: np.ndarray, data: np.ndarray) -> None:
        """Write the columns of the sequences of a message."""
        at = 0
        for number in numbers:
            length = int(lengths[number])
            end = at + int(self._record.nbytes(length))
            self.put_columns(number, self._record.split(length, data[at:end]))
            at = end

    def _trim(self, nbytes: int) -> None:
        """Give back memory of the samples that are written. glibc keeps it while later memory is in use."""
        self._untrimmed += nbytes
        if self._untrimmed > _TRIM_BYTES:
            ctypes.CDLL(None).malloc_trim(0)
            self._untrimmed = 0

    def read(self, offset: int, nbytes: int) -> np.ndarray:
        """Return (nbytes,) uint8."""
        data = np.empty(nbytes, np.uint8)
        os.preadv(self._file, [data.data], offset)
        return data
