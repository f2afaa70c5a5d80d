"""Run several trials at a time, record how each ended, and end all of them when the lab ends."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import IO, Any, Literal

from pydantic import BaseModel
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from .. import files
from ..command_line import load_config
from ..errors import InputError, printable
from ..metrics.progress import duration
from .study import Trial, flatten

POLL_S = 0.5
GRACE_S = 45.0
"""Seconds between SIGTERM and SIGKILL for a trial; torchrun gives its ranks 30 s."""

RECORD = "trial.json"
LOG = "log.txt"
_PACKAGES = ("megatron_gmpo", "megatron-core", "torch", "transformers", "numpy")


class Record(BaseModel):
    """The outcome of a trial.

    Attributes:
        outcome: a ``stopped`` run ended itself with a reason, such as a loss that is not finite, which is a
            result of the study. A ``failed`` run ended before its last step for any other reason and is run
            again.
        reason: reason why the trial did not finish, else empty.
        seconds: wall time of the process, including its start; for a resumed trial, of the last process.
    """

    outcome: Literal["finished", "stopped", "failed"]
    reason: str = ""
    seconds: float
    started: str
    machine: str
    versions: dict[str, str]


def read_record(trial: Trial) -> Record | None:
    """Return the record of a trial, or None if it has not ended."""
    path = trial.folder / RECORD
    return Record.model_validate_json(path.read_text()) if path.exists() else None


def check_folders(trials: Sequence[Trial]) -> None:
    """Check that no folder of the trials holds another run.

    Raises:
        InputError: a folder holds a run whose config differs from the study's.
    """
    for trial in trials:
        _check_folder(trial)


def unfinished(trials: Sequence[Trial]) -> list[Trial]:
    """Return the trials that have not ended or have failed."""
    return [t for t in trials if (record := read_record(t)) is None or record.outcome == "failed"]


def run_trials(
    trials: Sequence[Trial], *, processes: int, at_once: int, timeout_s: float, console: Console
) -> list[Record]:
    """Run trials, ``at_once`` at a time, and show their progress.

    A trial resumes from the newest checkpoint in its folder, or starts over if there is none. A failed trial
    does not end the other trials. An exception in this process, such as an interrupt, ends all trials.

    Args:
        processes: number of ranks per trial.
        timeout_s: time limit of a trial.

    Raises:
        InputError: another process is running a trial.
    """
    records: list[Record] = []
    running: list[_Running] = []
    with ExitStack() as locks:
        waiting = deque((trial, locks.enter_context(_lock(trial))) for trial in trials)
        with _Board(len(trials), at_once, console) as board:
            try:
                while waiting or running:
                    while waiting and len(running) < at_once:
                        running.append(_start(*waiting.popleft(), processes))
                        board.started(running[-1])
                    time.sleep(POLL_S)
                    for process in running:
                        board.update(process)
                        if record := process.ended(timeout_s):
                            records.append(record)
                            board.ended(process, record)
                    running = [process for process in running if not process.done]
            finally:
                for process in running:
                    process.signal(signal.SIGTERM)
                for process in running:  # without a second SIGTERM, which would kill a trial that is saving
                    process.wait_or_kill()
    return records


@dataclass
class _Running:
    trial: Trial
    process: subprocess.Popen[bytes]
    start: float
    started: str
    task: TaskID | None = None
    done: bool = False

    def ended(self, timeout_s: float) -> Record | None:
        """Write and return the record, or return None while the process runs within its time limit.

        A process that exceeds its time limit is ended.
        """
        seconds = time.monotonic() - self.start
        code = self.process.poll()
        if code is None and seconds <= timeout_s:
            return None
        if code is None:
            self.stop()
            outcome, reason = "failed", f"took more than {timeout_s:g} s"
        elif code == 0:
            outcome, reason = "finished", ""
        else:
            last = _lines(self.trial.folder / LOG)
            errors = [line.removeprefix("error: ") for line in last if line.startswith("error: ")]
            outcome = "stopped" if _ended_itself(self.trial.folder / "events.jsonl") else "failed"
            reason = errors[-1] if errors else f"exit code {code}: {last[-1] if last else 'no output'}"
        versions = {name: version(name) for name in _PACKAGES} | {"python": platform.python_version()}
        record = Record(
            outcome=outcome,
            reason=reason,
            seconds=round(seconds, 1),
            started=self.started,
            machine=_machine(),
            versions=versions,
        )
        files.write(self.trial.folder / RECORD, record.model_dump_json(indent=1))
        self.done = True
        return record

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process group that the process leads."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, number)

    def stop(self) -> None:
        self.signal(signal.SIGTERM)
        self.wait_or_kill()

    def wait_or_kill(self) -> None:
        """Wait until the process has saved and ended; kill it after ``GRACE_S``."""
        try:
            self.process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            self.signal(signal.SIGKILL)
            self.process.wait(GRACE_S)


def _start(trial: Trial, lock: IO[str], processes: int) -> _Running:
    (trial.folder / RECORD).unlink(missing_ok=True)
    launch = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        if processes > 1
        else []
    )
    with (trial.folder / LOG).open("w") as log:
        process = subprocess.Popen(
            [sys.executable, *launch, "-m", "megatron_gmpo.train", *trial.argv],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            start_new_session=True,
            pass_fds=(lock.fileno(),),
        )
    return _Running(trial, process, time.monotonic(), datetime.now(UTC).isoformat(timespec="seconds"))


def _lock(trial: Trial) -> IO[str]:
    """Lock the trial's folder.

    The trial's process inherits the lock, so it holds the lock even after the lab is killed.
    """
    trial.folder.mkdir(parents=True, exist_ok=True)
    file = open(os.open(trial.folder / ".lock", os.O_WRONLY | os.O_CREAT, 0o600), "w")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise InputError(
            f"{trial.folder} is being written by another process: wait for it or end it"
        ) from None
    return file


def _check_folder(trial: Trial) -> None:
    path = trial.folder / "config.toml"
    if not path.exists():
        return
    remedy = f"remove {trial.folder}, or give the study another name"
    try:
        before = load_config([str(path)])
    except InputError as error:
        raise InputError(f"{path} was written by an older version ({error}): {remedy}") from None
    if before != trial.cfg:
        old, new = flatten(before.model_dump()), flatten(trial.cfg.model_dump())
        key = next(key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key))
        raise InputError(
            f"{trial.folder} was run with {key} = {old.get(key)!r}, but the study says {new.get(key)!r}: "
            f"{remedy}"
        )


def _ended_itself(events: Path) -> bool:
    """Return whether the last event of a run is a non-finite figure or a collapse of the policy."""
    last = _newest(events) or {"event": ""}
    return last["event"] == "nonfinite" or (last["event"] == "collapse" and last["action"] != "warn")


def _lines(path: Path) -> list[str]:
    return [line for line in path.read_text(errors="replace").splitlines() if line.strip()]


def _machine() -> str:
    names = Path("/proc/cpuinfo")
    models = (
        [
            line.partition(":")[2].strip()
            for line in names.read_text().splitlines()
            if line.startswith("model name")
        ]
        if names.exists()
        else []
    )
    return f"{os.cpu_count()} cores, {models[0] if models else platform.machine()}"


class _Board:
    """Show the progress of the trials.

    A terminal shows one bar for all trials and one bar per running trial. Other outputs get one line per
    ended trial. The time left in it is the mean time of the ended trials, for each of the others, divided by
    ``at_once``.
    """

    def __init__(self, total: int, at_once: int, console: Console) -> None:
        self._console, self._total, self._at_once = console, total, at_once
        self._seconds: list[float] = []  # of the ended trials
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("[cyan]{task.fields[figures]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            expand=True,
            speed_estimate_period=24 * 3600,  # a trial may take hours
            disable=not console.is_terminal,
        )
        self._all = self._bars.add_task("[bold]trials", total=total, figures="")

    def __enter__(self) -> _Board:
        self._bars.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bars.stop()

    def started(self, process: _Running) -> None:
        process.task = self._bars.add_task(
            _name(process.trial), total=process.trial.cfg.train.num_steps, figures="starts"
        )

    def update(self, process: _Running) -> None:
        assert process.task is not None
        if self._console.is_terminal and (figures := _newest(process.trial.folder / "metrics.jsonl")):
            text = f"reward {figures['reward/mean']:.3f}" if figures.get("reward/mean") is not None else ""
            self._bars.update(process.task, completed=figures["step"], figures=text)

    def ended(self, process: _Running, record: Record) -> None:
        assert process.task is not None
        self._bars.remove_task(process.task)
        self._seconds.append(record.seconds)
        ended = len(self._seconds)
        self._bars.update(self._all, completed=ended)
        reason = f": {record.reason}" if record.reason else ""
        place, name = f"{ended}/{self._total}", _name(process.trial)
        left = duration(fmean(self._seconds) * (self._total - ended) / self._at_once)
        line = f"{place} {name} {record.outcome} after {record.seconds:.0f} s{reason}; {left} left"
        self._console.out(printable(line), highlight=False)


def _name(trial: Trial) -> str:
    return f"{trial.arm.name} seed {trial.seed}"


def _newest(path: Path) -> dict[str, Any] | None:
    """Return the last complete line of a JSON-lines file, or None."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return json.loads(lines[-1]) if lines else None
