"""Rewards that score responses in processes of their own, with limits of time and memory."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from collections import deque
from pathlib import Path
from threading import BoundedSemaphore, Lock
from types import TracebackType
from typing import Self

from ..batch.samples import Prompt

_START_S = 300.0
"""Seconds within which a worker must have started."""
_WAIT_S = 3600.0
"""Seconds within which a worker must become free."""
_JOB_SIGNALS = (-signal.SIGINT, -signal.SIGTERM, -signal.SIGUSR1, -signal.SIGUSR2)
"""Exit codes of a worker that a signal to the whole job has ended before it could ignore such signals."""


class ProcessReward:
    """Base of a reward whose ``worker``, a module that calls ``worker.serve``, scores the responses.

    Worker processes start with the first call, because a computation that does not end can only be stopped by
    killing its process. Calls from several threads run in parallel. One worker more than can be busy is
    running, so that the call after a worker was killed does not wait for a start.

    Args:
        timeout_s: time limit of one response; a response that exceeds it scores 0.
        workers: number of responses that are scored at the same time.

    Attributes:
        timeouts: number of responses that exceeded the limit of time or memory.
    """

    worker: str
    """Module of the worker."""

    def __init__(self, timeout_s: float = 10.0, workers: int = 2) -> None:
        self.timeout_s = timeout_s
        self.workers = workers
        self.timeouts = 0
        self._free = BoundedSemaphore(workers)
        self._lock = Lock()
        self._idle: deque[_Worker] = deque()
        self._busy = 0

    def __call__(self, prompt: Prompt, response: str) -> float:
        """Score a response.

        Raises:
            RuntimeError: the workers do not start.
        """
        if not self._free.acquire(timeout=_WAIT_S):
            raise RuntimeError(f"no worker of the reward became free within {_WAIT_S:.0f} s")
        worker = self._take()
        value = None
        try:
            value = worker.score(prompt.answer, response, self.timeout_s)
        finally:
            self._give_back(worker, usable=value is not None)
            self._free.release()
        return value or 0.0

    def close(self) -> None:
        """End the worker processes; a later call starts new ones. No call may be running."""
        while self._idle:
            self._idle.pop().kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _take(self) -> _Worker:
        with self._lock:
            while len(self._idle) + self._busy <= self.workers:
                self._idle.append(_Worker(self.worker))
            self._busy += 1
            return self._idle.popleft()

    def _give_back(self, worker: _Worker, usable: bool) -> None:
        if not usable:
            worker.kill()
        with self._lock:
            self._busy -= 1
            if usable:
                self._idle.appendleft(worker)  # before those that are still starting
            else:
                self.timeouts += 1
                self._idle.append(_Worker(self.worker))


class _Worker:
    """One process that scores one response after another."""

    def __init__(self, module: str) -> None:
        root = str(Path(__file__).parents[2])
        path = os.environ.get("PYTHONPATH")
        # no multiprocessing: its children import the trainer's main module, which takes many seconds
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ
            | {"PYTHONPATH": f"{root}{os.pathsep}{path}" if path else root, "PYTHONHASHSEED": "0"},
        )
        self._started = False

    def score(self, truth: str, response: str, limit_s: float) -> float | None:
        """Return the score of the response, or None if it exceeded its time or memory."""
        assert self._process.stdin is not None
        if not self._started and self._read(_START_S) != b"ready\n":
            if self.kill() in _JOB_SIGNALS:
                return None
            raise RuntimeError("a worker of the reward did not start; its error is above")
        self._started = True
        try:
            self._process.stdin.write(json.dumps([truth, response, limit_s]).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return None
        line = self._read(limit_s)
        return float(line) if line else None

    def kill(self) -> int:
        """End the process at once, and return its exit code, or minus the signal that ended it."""
        self._process.kill()
        code = self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        return code

    def _read(self, limit_s: float) -> bytes:
        """Return the next line of the process, or b"" if it has ended or says nothing within the limit."""
        assert self._process.stdout is not None
        poll = select.poll()
        poll.register(self._process.stdout, select.POLLIN)
        # a worker writes a line at once, and no next line before the next request
        return os.read(self._process.stdout.fileno(), 64) if poll.poll(1000 * limit_s) else b""
