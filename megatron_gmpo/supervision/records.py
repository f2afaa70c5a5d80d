"""Files of a run folder through which launcher, ranks and tools communicate.

The files are::

    run.lock                    lock of rank 0, with one line that names the holder
    outcome.json                code and reason of the attempt's end, see ``Outcome``
    heartbeats/rank_00003.json  current phase of a rank, see ``heartbeat.py``
    stacks/rank_00003.txt       thread stacks of a rank that hung, or was ended because another rank failed
    errors/rank_00003.txt       last traceback of a rank
    checkpoints/latest_checkpointed_iteration.txt
                                step of the newest complete checkpoint; 0 before the first
    events.jsonl                {"time", "event", ...} per line: resumes, checkpoints, stop requests, hangs
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .. import files
from ..errors import InputError

log = logging.getLogger(__name__)

OUTCOME = "outcome.json"
LATEST = "latest_checkpointed_iteration.txt"
_POLL_S = 0.1


@dataclass(frozen=True)
class Outcome:
    """The reason why an attempt ended.

    Attributes:
        code: an ``errors.Exit``. torchrun itself always exits with 1 after a failure.
        reason: the reason in one line.
        step: completed steps.
        rank: rank of the process that wrote the outcome.
        node: node of that process, or the node that failed the node check.
        time: Unix time in seconds.
        consequence: True if the rank only observed that another rank was lost.
    """

    code: int
    reason: str
    step: int
    rank: int
    node: str
    time: float
    consequence: bool = False


def write_outcome(run_dir: Path, outcome: Outcome) -> bool:
    """Write ``outcome.json`` unless this attempt already has one. A cause replaces a consequence.

    Returns:
        True if the outcome was written.
    """
    path, content = run_dir / OUTCOME, json.dumps(asdict(outcome))
    if files.write_new(path, content):
        return True
    earlier = read_outcome(run_dir)
    if outcome.consequence or not (earlier and earlier.consequence):
        return False
    files.write(path, content)
    return True


def outcome_after(run_dir: Path, timeout_s: float) -> Outcome | None:
    """Return the outcome of this attempt. Wait up to ``timeout_s`` for a cause while it is a consequence."""
    deadline = time.monotonic() + timeout_s
    while (found := read_outcome(run_dir)) and found.consequence and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    return found


def read_outcome(run_dir: Path) -> Outcome | None:
    """Return the outcome of the last attempt, or None if the attempt still runs or was killed."""
    try:
        return Outcome(**json.loads((run_dir / OUTCOME).read_text()))
    except FileNotFoundError:
        return None


def newest_step(checkpoints: Path) -> int | None:
    """Return the step of the newest checkpoint; 0 before the first is complete, None if no file states it.

    Raises:
        InputError: the file does not contain a number.
    """
    path = checkpoints / LATEST
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    if not re.fullmatch(rb"\s*\d{1,9}\s*", content):
        raise InputError(
            f"{path} contains {content[:40].decode(errors='replace')!r} instead of the number of a step"
        )
    return int(content)


def append_event(run_dir: Path, name: str, **fields: Any) -> None:
    """Append ``{"time", "event", **fields}`` to ``events.jsonl``, or warn that it cannot be written."""
    path = run_dir / "events.jsonl"
    try:
        files.append_line(path, json.dumps({"time": time.time(), "event": name, **fields}, allow_nan=False))
    except OSError as error:
        log.warning(f"warning: {path} lacks the event {name!r} ({error.strerror})")


def rank_file(run_dir: Path, kind: str, rank: int, suffix: str = ".txt") -> Path:
    """Return the path of a rank's file of this kind, such as ``heartbeats/rank_00003.json``."""
    return run_dir / kind / f"rank_{rank:05d}{suffix}"


def node_name() -> str:
    """Return Slurm's name of this node, or the host name outside Slurm."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()
