"""Decide between steps whether to stop the run for a signal or the job's time limit, equally on all ranks."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import time
from collections import deque
from datetime import datetime

import torch
import torch.distributed as dist

from ..distributed import rank
from . import signals

_TIME_LIMIT = 1  # a vote; other votes are signal numbers, and signal 1, SIGHUP, never requests a stop
_RECENT = 20
_SQUEUE_TIMEOUT_S = 30.0


class StopVote:
    """The ranks' joint decision whether to stop the run.

    Args:
        margin_s: seconds that must be left in the job in addition to the longest of the last 20 steps and the
            longest of the last 20 saves, which counts twice while a save is in progress. Until the first
            save has been measured, the margin must cover a save.
    """

    def __init__(self, margin_s: float) -> None:
        self._margin_s = margin_s
        self._end = job_end_time() if rank() == 0 else math.inf
        self._began: float | None = None
        self._paused = 0.0  # seconds of the phase "checkpoint" since the step began
        self._steps: deque[float] = deque(maxlen=_RECENT)
        self._saves: deque[float] = deque(maxlen=_RECENT)

    def paused(self, seconds: float) -> None:
        """Record that training waited for a save."""
        self._paused += seconds

    def saved(self, seconds: float) -> None:
        """Record the duration of a save, from its start to the complete checkpoint."""
        self._saves.append(seconds)

    @property
    def durations(self) -> str:
        """Return how long a step and a save have taken so far at most, e.g. "up to 12 s and a save 3 s"."""
        step = f"up to {max(self._steps):.0f} s" if self._steps else "an unknown time"
        return f"{step} and a save {max(self._saves):.0f} s" if self._saves else step

    def reason(self, *, saving: bool = False) -> str:
        """Return the reason to stop, or "". Call it between steps. Collective: one small all-reduce.

        Args:
            saving: whether a save is in progress. A run that stops waits for it before it saves.
        """
        now = time.monotonic()
        if self._began is not None:
            self._steps.append(now - self._began - self._paused)
        self._began, self._paused = now, 0.0
        vote = torch.tensor(signals.received or (_TIME_LIMIT if self._left() < self._needed(saving) else 0))
        dist.all_reduce(vote, op=dist.ReduceOp.MAX)
        number = int(vote)
        if number == _TIME_LIMIT:
            return "the job's time limit"
        return signal.Signals(number).name if number else ""

    def _left(self) -> float:
        return self._end - time.time()

    def _needed(self, saving: bool) -> float:
        saves = (1 + saving) * max(self._saves, default=0.0)
        return max(self._steps, default=0.0) + saves + self._margin_s


def job_end_time() -> float:
    """Return the Unix time at which Slurm ends this job; infinite if unknown or without a limit."""
    if stated := os.environ.get("SLURM_JOB_END_TIME"):
        return float(stated)
    if not (job := os.environ.get("SLURM_JOB_ID")):
        return math.inf
    command = ["squeue", "--noheader", "--job", job, "--format", "%e"]
    environment = os.environ | {"SLURM_TIME_FORMAT": "standard"}
    try:
        answer = subprocess.run(
            command, capture_output=True, text=True, timeout=_SQUEUE_TIMEOUT_S, env=environment
        )
        return datetime.fromisoformat(answer.stdout.strip()).timestamp()
    # squeue is missing on this node, the controller does not answer, or the time is "N/A"
    except (OSError, subprocess.TimeoutExpired, ValueError):
        return math.inf
