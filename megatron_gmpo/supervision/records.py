"""The files of a run folder that tell launcher, ranks and tools what happens.

run.lock                    held by the first rank; its line says who that is
outcome.json                why the attempt ended, see ``Outcome``
heartbeats/rank_00003.json  what a rank does, see ``heartbeat.py``
stacks/rank_00003.txt       the stacks of all threads of a rank that hung, or was ended while it waited for one
errors/rank_00003.txt       the last traceback of a rank
events.jsonl                {"time", "event", ...} a line: resumes, checkpoints, requests to stop, hangs, node checks
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

OUTCOME = "outcome.json"


@dataclass(frozen=True)
class Outcome:
    """Why an attempt ended.

    Attributes:
        code: a ``types.Exit``. torchrun itself exits with 1 whatever its ranks exit with.
        reason: one line.
        step: steps taken.
        rank: of the process that wrote it.
        node: its node, or the one that is bad.
        time: Unix time in seconds.
        consequence: the rank only saw that another one was lost.
    """

    code: int
    reason: str
    step: int
    rank: int
    node: str
    time: float
    consequence: bool = False


def write_outcome(run_dir: Path, outcome: Outcome) -> bool:
    """Writes ``outcome.json`` unless this attempt has one. A cause takes the place of a consequence.

    Returns:
        Whether it was written.
    """
    aside = _write_aside(run_dir / OUTCOME, json.dumps(asdict(outcome)))
    try:
        os.link(aside, run_dir / OUTCOME)  # of several ranks that write at a time one succeeds
        return True
    except FileExistsError:
        earlier = read_outcome(run_dir)
        if outcome.consequence or not (earlier and earlier.consequence):
            return False
        os.replace(aside, run_dir / OUTCOME)
        return True
    finally:
        aside.unlink(missing_ok=True)


def read_outcome(run_dir: Path) -> Outcome | None:
    """The outcome of the last attempt; None while it goes on, or when nobody was left to write one."""
    try:
        return Outcome(**json.loads((run_dir / OUTCOME).read_text()))
    except FileNotFoundError:
        return None


def append_event(run_dir: Path, name: str, **fields: Any) -> None:
    """Appends ``{"time", "event", **fields}`` to ``events.jsonl``."""
    with (run_dir / "events.jsonl").open("a") as file:
        file.write(json.dumps({"time": time.time(), "event": name, **fields}, allow_nan=False) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Writes a file that readers see whole or not at all."""
    os.replace(_write_aside(path, text), path)


def write_json(path: Path, content: Any) -> None:
    """As ``write_whole``."""
    write_whole(path, json.dumps(content))


def rank_file(run_dir: Path, kind: str, rank: int, suffix: str = ".txt") -> Path:
    """E.g. ``heartbeats/rank_00003.json``."""
    return run_dir / kind / f"rank_{rank:05d}{suffix}"


def node_name() -> str:
    """Slurm's name of this node, or else the host's."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _write_aside(path: Path, text: str) -> Path:
    aside = path.with_name(f".{path.name}.{node_name()}.{os.getpid()}.{threading.get_ident()}")
    aside.write_text(text)
    return aside
