"""Read the state of a run from the small files of its folder: progress, ranks, events and its end."""

from __future__ import annotations

import os
import statistics
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from ..errors import Exit, InputError

TAIL_BYTES = 2**20
"""Number of bytes that are read from the end of a JSON-lines file."""
TREND_STEPS = 30
"""Number of steps in a sparkline and in the estimate of the time left."""
TRIED_AGAIN = {Exit.REQUEUE, Exit.FAILED, Exit.HUNG, Exit.BAD_NODE}
"""Exit codes after which a Slurm job may make another attempt. A view then stays open."""


@dataclass(frozen=True)
class Snapshot:
    """The contents of a run folder's files at one time.

    A file may be missing or end with an incomplete line.

    Attributes:
        config: the tables of config.toml; empty if it does not exist or is not TOML.
        steps: last lines of metrics.jsonl.
        events: last lines of events.jsonl.
        restarts: last lines of restarts.jsonl.
        heartbeats: heartbeat of each rank, in rank order.
        outcome: outcome of the last attempt; None while it runs.
        errors: rank -> last line of its traceback.
        stacks: ranks that dumped their stacks after a hang.
    """

    run_dir: Path
    config: dict[str, Any]
    steps: list[dict[str, Any]]
    events: list[dict[str, Any]]
    restarts: list[dict[str, Any]]
    heartbeats: list[dict[str, Any]]
    outcome: dict[str, Any] | None
    errors: dict[str, str]
    stacks: list[str]

    @property
    def num_steps(self) -> int | None:
        """Return the number of steps of the whole run; None if config.toml does not state it."""
        found = self.setting("train", "num_steps")
        return found if type(found) is int and abs(found) < 2**53 else None  # what JSON can hold

    @property
    def done(self) -> int:
        """Return the number of completed steps."""
        return self.steps[-1]["step"] if self.steps else 0

    def setting(self, section: str, field: str) -> Any:
        """Return a value of config.toml, or None."""
        table = self.config.get(section)
        return table.get(field) if isinstance(table, dict) else None

    @property
    def finished(self) -> bool:
        """Return whether the job has ended and will not make another attempt."""
        return self.outcome is not None and not (self.restarts and self.outcome.get("code") in TRIED_AGAIN)

    @property
    def seconds_left(self) -> float | None:
        """Return the estimated time left, from the median of the last steps; None before the first step."""
        spent = [
            line["time/step"]
            for line in self.steps[-TREND_STEPS:]
            if isinstance(line.get("time/step"), int | float)
        ]
        if not spent or self.num_steps is None:
            return None
        return statistics.median(spent) * (self.num_steps - self.done)


def read(run_dir: Path) -> Snapshot:
    """Read the files of a run folder.

    Raises:
        InputError: the folder does not exist.
    """
    if not run_dir.is_dir():
        raise InputError(f"run folder {run_dir} does not exist: give the run_dir of a config")
    heartbeats = [beat for file in sorted((run_dir / "heartbeats").glob("*.json")) if (beat := _json(file))]
    errors = {
        file.stem: text.splitlines()[-1]
        for file in sorted((run_dir / "errors").glob("*.txt"))
        if (text := _text(file).strip())
    }
    return Snapshot(
        run_dir=run_dir,
        config=_toml(run_dir / "config.toml"),
        steps=[line for line in _json_lines(run_dir / "metrics.jsonl") if type(line.get("step")) is int],
        events=_json_lines(run_dir / "events.jsonl"),
        restarts=_json_lines(run_dir / "restarts.jsonl"),
        heartbeats=heartbeats,  # in the order of the names, which is the order of the ranks
        outcome=_json(run_dir / "outcome.json"),
        errors=errors,
        # a rank creates its file at its start and writes to it after a hang
        stacks=[file.stem for file in sorted((run_dir / "stacks").glob("*.txt")) if _text(file)],
    )


def _text(file: Path) -> str:
    try:
        with file.open("rb") as opened:
            opened.seek(max(0, os.fstat(opened.fileno()).st_size - TAIL_BYTES))
            return opened.read().decode(errors="replace").strip()
    except OSError:  # missing, or being replaced
        return ""


def _json(file: Path) -> dict[str, Any] | None:
    return _object(_text(file))


def _json_lines(file: Path) -> list[dict[str, Any]]:
    return [found for line in _text(file).split("\n") if (found := _object(line)) is not None]


def _object(text: str) -> dict[str, Any] | None:
    try:
        found = orjson.loads(text)
    except ValueError:  # incomplete, or cut at the start of the tail
        return None
    return found if isinstance(found, dict) else None


def _toml(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(_text(file))
    except (tomllib.TOMLDecodeError, RecursionError):
        return {}
