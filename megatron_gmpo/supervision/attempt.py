"""One attempt at a run, from its start to the record of its end."""

from __future__ import annotations

import faulthandler
import logging
import os
import re
import shutil
import signal
import sys
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import torch
import torch.distributed as dist

from ..command_line import report_to_torchrun
from ..config import Config
from ..distributed import agreed, rank
from ..errors import CollectiveError, Exit, InputError, NodeError, RunError, StopRequest, disk_full, printable
from . import signals
from .heartbeat import Heartbeat
from .lock import LOCK, RunLock
from .node_check import check_nodes
from .records import OUTCOME, Outcome, append_event, node_name, outcome_after, rank_file, write_outcome
from .stop import StopVote

log = logging.getLogger(__name__)

_CAUSE_S = 10.0
"""Seconds that a rank which lost another one waits for the cause, before it ends."""

_LAST_LINE_S = 2 * _CAUSE_S
"""Seconds that one thread waits for another one, which has begun to report why this process ends."""


class Attempt:
    """One attempt at a run: ``with Attempt(cfg) as attempt: ...``, which calls ``attempt.start(...)``.

    Rank 0 locks the run folder, on entry if the folder exists, else in ``start``. On exit the outcome is
    written. If another rank was lost, the block ends with ``CollectiveError``. After a stop request it ends
    with ``StopRequest``.

    Raises:
        InputError: another run uses the run folder.
    """

    def __init__(self, cfg: Config) -> None:
        self._cfg, self._run_dir = cfg, Path(cfg.run_dir)
        self._first = os.environ.get("RANK", "0") == "0"  # needed before the process group exists
        self._several_nodes = os.environ.get("LOCAL_WORLD_SIZE") != os.environ.get("WORLD_SIZE")
        self._lock: RunLock | None = None
        self._heartbeat: Heartbeat | None = None
        self._stop = ""
        # Held by the thread that reports why this process ends: an error, a signal and a hang may coincide.
        self._ending = threading.Lock()

    def __enter__(self) -> Attempt:
        if self._first and self._run_dir.is_dir():
            self._lock = RunLock(self._run_dir)
        return self

    def start(self, device: torch.device, needed_bytes: int, why: str) -> None:
        """Remove the last attempt's records, start the heartbeat, and check the nodes. Collective.

        ``cfg.supervision.node_check`` determines whether nodes are checked.

        Args:
            device: this rank's device.
            needed_bytes: bytes that the run's checkpoints will add to the run folder. If
                ``cfg.supervision.min_free_disk_gb`` is set, it replaces this number.
            why: phrase that states why the run needs them.

        Raises:
            InputError: another run uses the run folder; its disk has too little space.
            NodeError: see ``check_nodes``.
        """
        supervision = self._cfg.supervision
        with agreed():
            if self._first:
                self._take_run_folder()
                self._check_space(needed_bytes, why)
        self._errors = rank_file(self._run_dir, "errors", rank()).open("wb", buffering=0)
        faulthandler.enable(self._errors)
        self._heartbeat = Heartbeat(
            self._run_dir, rank(), supervision.heartbeat_interval_s, supervision.hang_timeout_s, self._hung
        )
        self._vote = StopVote(supervision.stop_margin_s)
        signals.before_exit, signals.on_request = self._terminated, self._requested
        if signals.received:
            self._requested(signals.received)
        if self._several_nodes if supervision.node_check is None else supervision.node_check:
            self.enter("node_check")
            rollout = self._cfg.rollout
            shared_gpus = rollout.placement == "colocated" and bool(
                rollout.servers_file or rollout.server_urls
            )
            check_nodes(supervision, self._run_dir, device, shared_gpus=shared_gpus)
            self._event("node_check", nodes=int(os.environ.get("GROUP_WORLD_SIZE", "1")))
            self.enter("start")

    def enter(self, phase: str) -> None:
        """Record the start of a phase. Phases are the names of the run's ``Timer``."""
        assert self._heartbeat
        if self._heartbeat.phase == "checkpoint":
            self._vote.paused(time.time() - self._heartbeat.since)
        self._heartbeat.enter(phase)

    def wrote_checkpoint(self, seconds: float) -> None:
        """Record how long a save took, from its start to the complete checkpoint."""
        self._vote.saved(seconds)

    def stops(self, step: int, *, saving: bool = False) -> bool:
        """Return whether the run must save and end after ``step`` completed steps. Collective.

        Args:
            saving: whether a save is in progress.

        Raises:
            InputError: the run folder was removed.
        """
        assert self._heartbeat
        if self._first and not (self._run_dir / LOCK).exists():
            raise self._removed()
        self._heartbeat.step = step
        self._stop = self._vote.reason(saving=saving)
        if self._stop:
            self._event("stop_requested", step=step, reason=self._stop)
        return bool(self._stop)

    def saved(self, step: int) -> None:
        """Record that a stopping run has saved everything. Later signals are ignored."""
        signals.active = False
        self._event("saved_for_requeue", step=step, reason=self._stop)
        self._record_once(Exit.REQUEUE, self._stopped())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        full = disk_full(error)
        try:
            self._end(full or error)
        finally:
            if self._lock:
                self._lock.release()
        if full:
            raise full from None

    def _take_run_folder(self) -> None:
        self._run_dir.mkdir(parents=True, exist_ok=True)
        self._lock = self._lock or RunLock(self._run_dir)
        self._lock.sign()
        (self._run_dir / OUTCOME).unlink(missing_ok=True)
        for folder in ("heartbeats", "stacks", "errors"):
            shutil.rmtree(self._run_dir / folder, ignore_errors=True)
            (self._run_dir / folder).mkdir(exist_ok=True)  # NFS may keep the folder for a file that was open

    def _check_space(self, needed_bytes: int, why: str) -> None:
        free, wanted = shutil.disk_usage(self._run_dir).free / 1e9, needed_bytes / 1e9
        setting = self._cfg.supervision.min_free_disk_gb
        if setting is not None:
            wanted, why = setting, f"supervision.min_free_disk_gb = {setting:g}"
        if free < wanted:
            raise InputError(
                f"run_dir = {str(self._run_dir)!r} has {free:.3g} GB of disk space left, and {why}: "
                "make room, or choose another run_dir"
            )

    def _end(self, error: BaseException | None) -> None:
        if self._heartbeat is None:
            if error and self._lock:  # an existing outcome is from an earlier attempt
                (self._run_dir / OUTCOME).unlink(missing_ok=True)
                self._record(_exit_code(error), _one_line(error))
        elif not self._run_dir.is_dir():
            raise self._removed() from None
        elif error is None:
            self._heartbeat.step = self._heartbeat.step if self._stop else self._cfg.train.num_steps
            self._heartbeat.stop()
            self._close_errors()
            if self._stop:
                raise StopRequest(self._stopped())
            self._record_once(Exit.DONE, "all steps are done")
        elif isinstance(error, KeyboardInterrupt):
            where = self._heartbeat.where
            reason = f"interrupted by SIGINT in {where}; the steps after the last checkpoint are lost"
            self._record(Exit.INTERRUPTED, reason)
            raise KeyboardInterrupt(reason) from None
        elif isinstance(error, NodeError):
            self._record_once(error.exit, str(error), error.node)
        elif isinstance(error, RunError):
            if error.__cause__:  # of a user's function
                self._write_traceback(error.__cause__)
            self._record(error.exit, str(error))
        else:
            self._crashed(error)

    def _crashed(self, error: BaseException) -> None:
        assert self._heartbeat
        self._ending.acquire(timeout=_LAST_LINE_S)
        self._write_traceback(error)
        where = f"rank {rank()} on {node_name()}, in {self._heartbeat.where}"
        if not _is_collective_error(error):
            self._record(Exit.FAILED, f"{where}: {_one_line(error)}")
            return
        lost = CollectiveError(
            f"{self._heartbeat.lost_ranks()}{where}: a collective with other ranks failed "
            f"({_one_line(error)}); see {self._errors.name}"
        )
        if "timed out" in str(error).lower():
            lost.exit = Exit.HUNG
        first = self._record(lost.exit, str(lost), consequence=True)
        # If this rank ends first, Slurm may kill the torchrun of another node before it records the cause.
        outcome = outcome_after(self._run_dir, _CAUSE_S if self._several_nodes else 0)
        if outcome and not (first and outcome.consequence):
            if outcome.node == node_name():  # a process of this node has already printed it
                raise SystemExit(outcome.code) from None
            lost = CollectiveError(outcome.reason)
        raise lost from None

    def _write_traceback(self, error: BaseException) -> None:
        with suppress(OSError):  # the outcome and the error line must follow
            self._errors.write("".join(traceback.format_exception(error)).encode())

    def _hung(self, reason: str) -> None:
        assert self._heartbeat
        if not self._ending.acquire(timeout=_LAST_LINE_S):
            signals.exit_with_children(Exit.HUNG)
        self._heartbeat.dump_stacks()
        append_event(self._run_dir, "hang", step=self._heartbeat.step, rank=rank(), reason=reason)
        self._last_line(
            Exit.HUNG, f"{reason}; the stacks are in {self._run_dir / 'stacks'}", consequence=False
        )
        signals.exit_with_children(Exit.HUNG)

    def _requested(self, number: signal.Signals) -> None:
        """Print what the run waits for before it ends, and how long torchrun lets it."""
        assert self._heartbeat
        if not self._first:
            return
        line = f"{number.name} in {self._heartbeat.where}: saving and ending before the next step; "
        line += f"a step takes {self._vote.durations}"
        with suppress(OSError):  # an error, as of a full disk, would end the thread that waits for signals
            if limit := signals.torchrun_limit_s(number):
                line += f"; torchrun kills the ranks {limit:g} s after the signal"
                line += " (TORCH_ELASTIC_SHUTDOWN_TIMEOUT)"
            print(line, file=sys.stderr, flush=True)

    def _terminated(self, reason: str) -> None:
        assert self._heartbeat
        if not self._ending.acquire(timeout=_LAST_LINE_S):
            return
        self._heartbeat.dump_stacks()
        where = f"rank {rank()} on {node_name()}, in {self._heartbeat.where}"
        self._last_line(Exit.FAILED, f"{self._heartbeat.lost_ranks()}{where}: {reason}", consequence=True)

    def _last_line(self, code: Exit, reason: str, *, consequence: bool) -> None:
        """Record the outcome, and print the reason if this rank has written it."""
        if self._record(code, reason, consequence=consequence):
            print(line := f"error: {printable(reason)}", file=sys.stderr, flush=True)
            report_to_torchrun(line)

    def _record_once(self, code: Exit, reason: str, node: str = "") -> None:
        """Record an outcome that all ranks share; rank 0 writes it."""
        if self._first:
            self._record(code, reason, node=node)

    def _record(self, code: Exit, reason: str, *, node: str = "", consequence: bool = False) -> bool:
        step = self._heartbeat.step if self._heartbeat else 0
        number = int(os.environ.get("RANK", "0"))
        outcome = Outcome(code, reason, step, number, node or node_name(), time.time(), consequence)
        try:
            return write_outcome(self._run_dir, outcome)
        except OSError as error:
            if self._first:
                log.warning(f"warning: {self._run_dir / OUTCOME} cannot be written ({error.strerror})")
            return not consequence

    def _event(self, name: str, **fields: object) -> None:
        if self._first:
            append_event(self._run_dir, name, **fields)

    def _stopped(self) -> str:
        assert self._heartbeat
        steps = f"{self._heartbeat.step} of {self._cfg.train.num_steps} steps"
        return (
            f"stopped by {self._stop} after {steps}, with everything saved: start the same command to go on"
        )

    def _removed(self) -> InputError:
        return InputError(
            f"run_dir = {str(self._run_dir)!r} was removed while the run used it: start the run again"
        )

    def _close_errors(self) -> None:
        faulthandler.disable()
        self._errors.close()
        if Path(self._errors.name).stat().st_size == 0:
            Path(self._errors.name).unlink()


def _exit_code(error: BaseException) -> Exit:
    if isinstance(error, RunError):
        return error.exit
    return Exit.INTERRUPTED if isinstance(error, KeyboardInterrupt) else Exit.FAILED


def _is_collective_error(error: BaseException) -> bool:
    """Return whether ``error`` is a failed collective. gloo's RuntimeErrors name one of its source files."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _one_line(error: BaseException) -> str:
    """Return ``ValueError: ...`` in one line, without the source file and advice of gloo's messages."""
    text = " ".join(str(error).split())
    text = re.sub(r"^\[[^]]*gloo[^]]*\] ", "", text).partition(". This is typically")[0]
    return text if isinstance(error, RunError) else f"{type(error).__name__}: {text}"
