"""One run folder, as the page asks about it. Answers consist of what JSON can hold, and numpy arrays."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError
from . import images, tokens
from .curves import Metrics
from .samples import Transcripts
from .snapshot import Snapshot, read

EVENTS = 300
"""Number of newest events that the page lists and marks."""
LOG_BYTES = 2000
"""Number of bytes that the page shows of the end of a server's log."""
MACHINE = (
    "time/",
    "throughput/",
    "memory/",
    "weight_sync/",
    "rollout/server",
    "rollout/retries",
    "rollout/stale",
)
"""Beginnings of the names of figures that describe the machine."""


class RunFolder:
    """The files of a run folder, which may be missing, incomplete or damaged.

    Args:
        path: the folder.
        name: name of the run on the page.
    """

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name = path, name
        self.metrics = Metrics(path / "metrics.jsonl")
        self.transcripts = Transcripts(path / "transcripts.jsonl")

    def state(self) -> dict[str, Any]:
        """Return progress, ranks, events and problems: all that the page shows beside curves and samples."""
        problems: list[str] = []
        try:
            snapshot = read(self.path)
        except InputError:
            return {"name": self.name, "problems": [f"The folder {self.path} does not exist (yet)."]}
        except OSError as error:
            return {
                "name": self.name,
                "problems": [f"The folder {self.path} cannot be read: {error.strerror}."],
            }
        self.metrics.refresh()
        self.transcripts.refresh()
        for file, unreadable in (
            ("metrics.jsonl", self.metrics.unreadable),
            ("transcripts.jsonl", self.transcripts.unreadable),
        ):
            if unreadable:
                problems.append(f"{unreadable} lines of {file} are damaged and left out.")
        if not snapshot.steps and not self.transcripts.steps:
            problems.append("The run has not logged a step yet.")
        newest = snapshot.steps[-1] if snapshot.steps else {}
        return {
            "name": self.name,
            "problems": problems,
            "now": time.time(),
            "done": snapshot.done,
            "num_steps": snapshot.num_steps,
            "seconds_left": None if snapshot.outcome else snapshot.seconds_left,
            "outcome": snapshot.outcome,
            "finished": snapshot.finished,
            "ranks": snapshot.heartbeats,
            "errors": snapshot.errors,
            "stacks": snapshot.stacks,
            "events": snapshot.events[-EVENTS:],
            "restarts": snapshot.restarts,
            "servers": self._servers(),
            "machine": {name: value for name, value in newest.items() if name.startswith(MACHINE)},
            "about": _about(snapshot),
            "samples": self.transcripts.steps,
            "tokens": tokens.recorded_steps(self.path / "tokens"),
        }

    def groups(self, step: int) -> list[dict[str, Any]]:
        """Return the groups of a step, see ``Transcripts.groups``."""
        self.transcripts.refresh()
        reward = read(self.path).setting("reward", "name") if self.transcripts.steps else ""
        return self.transcripts.groups(step, str(reward or ""))

    def image(self, name: str) -> str:
        """Return an image of the run by its file's name, see ``images.data_url``."""
        return images.data_url(self.path / "images", name)

    def tokens(self, step: int) -> dict[str, Any]:
        """Return the summary of a step's record of tokens, see ``tokens.summary``."""
        return tokens.summary(self.path / "tokens", step)

    def sample_tokens(self, step: int, number: int) -> dict[str, Any] | None:
        """Return the tokens of one recorded sample, see ``tokens.sample``."""
        return tokens.sample(self.path / "tokens", step, number)

    def _servers(self) -> list[dict[str, Any]]:
        logs = []
        for file in sorted((self.path / "servers").glob("*.log")):
            try:
                with file.open("rb") as opened:
                    opened.seek(max(0, file.stat().st_size - LOG_BYTES))
                    tail = opened.read(LOG_BYTES).decode(errors="replace")
            except OSError:
                continue
            logs.append({"name": file.stem, "changed": file.stat().st_mtime, "tail": tail})
        return logs


def named_runs(folders: Sequence[Path]) -> list[RunFolder]:
    """Return the run folders, named by the folder's name, or by its path if two names are equal."""
    names = [folder.absolute().name for folder in folders]
    return [
        RunFolder(folder, name if names.count(name) == 1 else str(folder))
        for folder, name in zip(folders, names, strict=True)
    ]


def _about(snapshot: Snapshot) -> dict[str, str]:
    """Return the settings that a reader of the curves needs."""
    fields = (
        ("model", "path"),
        ("algorithm", "loss"),
        ("algorithm", "clip_low"),
        ("algorithm", "clip_high"),
        ("reward", "name"),
        ("rollout", "engine"),
        ("rollout", "prompts_per_step"),
        ("rollout", "samples_per_prompt"),
        ("train", "minibatches_per_step"),
        ("optimizer", "lr"),
    )
    return {f"{s}.{f}": str(value) for s, f in fields if (value := snapshot.setting(s, f)) is not None}
