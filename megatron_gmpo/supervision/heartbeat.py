"""A thread in each rank that periodically writes the rank's phase to a file, and detects hangs."""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

from .. import files
from .records import node_name, rank_file

log = logging.getLogger(__name__)


class Heartbeat:
    """Write a heartbeat every ``interval_s``, and detect phases that take too long.

    The file is ``heartbeats/rank_00003.json``, with rank, node, pid, ``step`` (completed steps), ``phase``,
    ``since`` (Unix time at which the phase began), ``time`` (Unix time of the write) and ``memory`` (resident
    bytes of the process).

    Args:
        run_dir: the run folder.
        rank: rank of this process.
        interval_s: seconds between two writes.
        hang_timeout_s: seconds in one phase after which ``hung`` is called. If the main thread is in a
            collective, it is called two intervals later, so that the rank for which the others wait reports
            first.
        hung: function called in the heartbeat thread with one line that names the rank without progress.
    """

    def __init__(
        self, run_dir: Path, rank: int, interval_s: float, hang_timeout_s: float, hung: Callable[[str], None]
    ) -> None:
        self.step = 0
        self._run_dir, self._rank, self._interval_s, self._hang_timeout_s, self._hung = (
            run_dir,
            rank,
            interval_s,
            hang_timeout_s,
            hung,
        )
        self.enter("start")
        self._file = rank_file(run_dir, "heartbeats", rank, ".json")
        self._warned = False
        # unbuffered, so that nothing is left to write at the end of the process if the disk is full now
        self._stacks = rank_file(run_dir, "stacks", rank).open("wb", buffering=0)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._write()
        self._thread.start()

    @property
    def where(self) -> str:
        """Return the current phase and step, such as ``phase rollout of step 3``."""
        return f"phase {self.phase} of step {self.step + 1}"

    def enter(self, phase: str) -> None:
        """Record the start of a phase."""
        self.phase, self.since, self._entered = phase, time.time(), time.monotonic()

    def stop(self) -> None:
        """Stop the thread and write a last heartbeat with the phase ``end``."""
        self._ended.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        self.enter("end")
        self._write()
        self._stacks.close()
        if Path(self._stacks.name).stat().st_size == 0:
            Path(self._stacks.name).unlink()

    def dump_stacks(self) -> None:
        """Write the stacks of all threads to ``stacks/rank_00003.txt``. Any thread may call it."""
        age = time.monotonic() - self._entered
        headline = f"rank {self._rank} on {node_name()}, in {self.where} for {age:.0f} s\n"
        with suppress(OSError):  # the process must end although its stacks cannot be written
            self._stacks.write(headline.encode())
            faulthandler.dump_traceback(self._stacks, all_threads=True)

    def lost_ranks(self) -> str:
        """Return a phrase that names the ranks of this node whose processes are gone, or an empty string."""
        gone = []
        for file in sorted(self._file.parent.glob("rank_*.json")):
            with suppress(OSError):  # this rank must report even if the file system fails
                beat = json.loads(file.read_text())
                if beat["node"] == node_name() and beat["phase"] != "end" and not _runs(beat["pid"]):
                    gone.append(f"rank {beat['rank']} (process {beat['pid']})")
        if not gone:
            return ""
        return (
            f"{', '.join(gone)} on {node_name()} ended without a message, as after a kill by the kernel when "
            "host memory runs out (see dmesg); "
        )

    def _beat(self) -> None:
        while not self._ended.wait(self._interval_s):
            self._write()
            # Code that never releases the GIL, such as a regular expression, also stops this thread.
            # faulthandler's thread does not need the GIL: it dumps the stacks and ends the process with exit
            # code 1, after the waiting ranks have reported.
            faulthandler.dump_traceback_later(
                self._hang_timeout_s + 4 * self._interval_s, file=self._stacks, exit=True
            )
            if reason := self._why_hung():
                self._hung(reason)

    def _write(self) -> None:
        beat = {
            "rank": self._rank,
            "node": node_name(),
            "pid": os.getpid(),
            "step": self.step,
            "phase": self.phase,
            "memory": psutil.Process().memory_info().rss,
        }
        content = json.dumps(beat | {"since": self.since, "time": time.time()})
        try:
            files.write(self._file, content, durable=False)
        except OSError as error:  # the file system may be full or briefly unavailable
            if not self._warned:
                log.warning(f"warning: {self._file} cannot be written ({error.strerror}); the run goes on")
            self._warned = True

    def _why_hung(self) -> str:
        age = time.monotonic() - self._entered
        waits = _in_collective()
        if age < self._hang_timeout_s + (2 * self._interval_s if waits else 0):
            return ""
        place = f"{self.where} for {age:.0f} s"
        if not waits:
            return f"rank {self._rank} on {node_name()} has been in {place}"
        return f"{self._missing()}rank {self._rank} on {node_name()} has waited for others in {place}"

    def _missing(self) -> str:
        """Return a phrase that names the first rank whose heartbeat has stopped, or an empty string."""
        for file in sorted(self._file.parent.glob("rank_*.json")):
            try:
                beat = json.loads(file.read_text())
            except OSError:  # this rank must report even if the file system fails
                continue
            silent = time.time() - beat["time"]
            if silent > self._hang_timeout_s / 2:
                return f"rank {beat['rank']} on {beat['node']} has given no heartbeat for {silent:.0f} s; "
        return ""


def _runs(pid: int) -> bool:
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def _in_collective() -> bool:
    """Return whether the main thread is in torch.distributed. With NCCL it may also wait for the GPU."""
    frame = sys._current_frames()[threading.main_thread().ident or 0]
    while frame:
        if f"{os.sep}torch{os.sep}distributed{os.sep}" in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    return False
