"""Whether the run stops before its next step: a signal came, or the job's time is up. All ranks decide alike."""

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

_TIME_LIMIT = 1  # among the numbers of signals, as a reason to stop; 1 is SIGHUP, which is none
_RECENT = 20
_SQUEUE_TIMEOUT_S = 30.0


class StopVote:
    """
    Args:
        margin_s: seconds of the job's time that must be left besides the longest of the last 20 steps and saves. It has to cover a save as
            long as none was measured.
    """

    def __init__(self, margin_s: float) -> None:
        self._margin_s = margin_s
        self._end = job_end_time() if rank() == 0 else math.inf
        self._began: float | None = None
        self._saving = 0.0  # since the step began
        self._steps: deque[float] = deque(maxlen=_RECENT)
        self._saves: deque[float] = deque(maxlen=_RECENT)

    def saved(self, seconds: float) -> None:
        """Takes note of a save's duration."""
        self._saves.append(seconds)
        self._saving += seconds

    def reason(self) -> str:
        """Why to stop, empty to go on; called between two steps. Collective: one all-reduce of a number."""
        now = time.monotonic()
        if self._began is not None:
            self._steps.append(now - self._began - self._saving)
        self._began, self._saving = now, 0.0
        vote = torch.tensor(signals.received or (_TIME_LIMIT if self._left() < self._needed() else 0))
        dist.all_reduce(vote, op=dist.ReduceOp.MAX)
        number = int(vote)
        if number == _TIME_LIMIT:
            return "the job's time limit"
        return signal.Signals(number).name if number else ""

    def _left(self) -> float:
        return self._end - time.time()

    def _needed(self) -> float:
        return max(self._steps, default=0.0) + max(self._saves, default=0.0) + self._margin_s


def job_end_time() -> float:
    """Unix time at which Slurm ends this job; infinite without a limit, outside a job, and where nobody says."""
    if stated := os.environ.get("SLURM_JOB_END_TIME"):
        return float(stated)
    if not (job := os.environ.get("SLURM_JOB_ID")):
        return math.inf
    try:
        command = ["squeue", "--noheader", "--job", job, "--format", "%e"]
        environment = os.environ | {"SLURM_TIME_FORMAT": "standard"}
        asked = subprocess.run(
            command, capture_output=True, text=True, timeout=_SQUEUE_TIMEOUT_S, env=environment
        )
        return datetime.fromisoformat(asked.stdout.strip()).timestamp()
    except (
        OSError,
        subprocess.TimeoutExpired,
        ValueError,
    ):  # no squeue here, a controller that does not answer, "N/A"
        return math.inf
