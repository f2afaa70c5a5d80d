"""Running trials: several processes at a time, what became of each in its folder, and an end to all of them when the lab ends."""

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
from typing import IO, Any, Literal

from pydantic import BaseModel
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from .. import files
from ..config import load_config
from ..errors import InputError
from .study import Trial, flatten

POLL_S = 0.5
GRACE_S = 45.0
"""Between asking a trial to end and killing it; torchrun gives its ranks 30 s."""

RECORD = "trial.json"
LOG = "log.txt"
_PACKAGES = ("megatron_gmpo", "megatron-core", "torch", "transformers", "numpy")


class Record(BaseModel):
    """What became of a trial; written when it has ended.

    Attributes:
        outcome: ``stopped`` is a run that ended itself with a reason, such as a loss that is not finite: a result of the study.
            ``failed`` is any other end before its last step; it is run again.
        reason: why it did not finish, else empty.
        seconds: of this process, its start included; of a resumed trial the last process.
    """

    outcome: Literal["finished", "stopped", "failed"]
    reason: str = ""
    seconds: float
    started: str
    machine: str
    versions: dict[str, str]


def read_record(trial: Trial) -> Record | None:
    """None for a trial that has not ended."""
    path = trial.folder / RECORD
    return Record.model_validate_json(path.read_text()) if path.exists() else None


def check_folders(trials: Sequence[Trial]) -> None:
    """
    Raises:
        InputError: a folder holds a run of another config than the study's.
    """
    for trial in trials:
        _check_folder(trial)


def unfinished(trials: Sequence[Trial]) -> list[Trial]:
    """The trials that are still to be run."""
    return [t for t in trials if (record := read_record(t)) is None or record.outcome == "failed"]


def run_trials(
    trials: Sequence[Trial], *, processes: int, at_once: int, timeout_s: float, console: Console
) -> list[Record]:
    """Runs trials, ``at_once`` at a time, and shows how far they are.

    A trial goes on from the newest checkpoint in its folder, or starts over where there is none. No failure ends the others; an exception
    here (an interrupt) ends all.

    Args:
        processes: ranks of one trial.
        timeout_s: limit for one trial.

    Raises:
        InputError: a trial is being run by another process.
    """
    records: list[Record] = []
    running: list[_Running] = []
    with ExitStack() as locks:
        waiting = deque((trial, locks.enter_context(_lock(trial))) for trial in trials)
        with _Board(len(trials), console) as board:
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
                for process in running:  # no second SIGTERM: it would end a trial that is saving
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
        """Writes and returns the record once the process has ended, or ends it when its time is over."""
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
        """To the process and those it started; it leads a process group."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, number)

    def stop(self) -> None:
        self.signal(signal.SIGTERM)
        self.wait_or_kill()

    def wait_or_kill(self) -> None:
        """Gives a process that was asked to end the time to save."""
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
    """A lock on the trial's folder. Its process inherits it, so it outlives a lab that was killed and left the process behind."""
    trial.folder.mkdir(parents=True, exist_ok=True)
    file = (trial.folder / ".lock").open("w")
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
        raise InputError(f"{path} is of an older version ({error}): {remedy}") from None
    if before != trial.cfg:
        old, new = flatten(before.model_dump()), flatten(trial.cfg.model_dump())
        key = next(key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key))
        raise InputError(
            f"{trial.folder} was run with {key} = {old.get(key)!r}, the study says {new.get(key)!r}: {remedy}"
        )


def _ended_itself(events: Path) -> bool:
    """Whether the last thing a run wrote down is that its figures are not finite or that its policy collapsed."""
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
    """The trials on the terminal: a bar for all and one for each that runs, or a line when one ends where nobody watches."""

    def __init__(self, total: int, console: Console) -> None:
        self._console, self._total, self._ended = console, total, 0
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("[cyan]{task.fields[figures]}"),
            TimeElapsedColumn(),
            console=console,
            expand=True,
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
        self._ended += 1
        self._bars.update(self._all, completed=self._ended)
        reason = f": {record.reason}" if record.reason else ""
        line = f"{self._ended}/{self._total} {_name(process.trial)} {record.outcome} after {record.seconds:.0f} s{reason}"
        self._console.out(line, highlight=False)


def _name(trial: Trial) -> str:
    return f"{trial.arm.name} seed {trial.seed}"


def _newest(path: Path) -> dict[str, Any] | None:
    """The last whole line of a ``metrics.jsonl`` or ``events.jsonl``."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return json.loads(lines[-1]) if lines else None
