r"""The mathematical reward: the last \boxed answer, compared with the truth by math-verify."""

from __future__ import annotations

import atexit
import logging
import math
import multiprocessing
import re
import signal
from concurrent.futures import TimeoutError
from threading import Lock
from types import TracebackType

from math_verify import parse, verify
from pebble import CONSTS, ProcessExpired, ProcessPool

from ..batch.samples import Prompt

# The workers ignore SIGTERM, so pebble need not wait long for it before it kills.
CONSTS.term_timeout = 0.1

_FAREWELL_S = 5.0
_AFTER_THE_TRAINER_S = 30
_STALLED_S = 3600.0
"""No queue of answers is this long: the pool is broken."""


class MathReward:
    r"""1.0 when the response's final answer equals the truth mathematically, else 0.0.

    The final answer is the last complete ``\boxed{...}``; without one, what math-verify finds. The truth is plain text or LaTeX,
    alone, boxed, or after ``####`` as in GSM8K. Order counts in tuples and intervals, not in sets and lists; ``50\%`` equals both
    ``50`` and ``1/2``.

    Answers are checked in processes of their own, which start with the first call: a computation that does not end
    (``9^{9^{9^9}}``) can only be stopped by killing its process. Calls from several threads run side by side.

    Args:
        timeout_s: limit for one answer; past it the answer scores 0.
        workers: processes.

    Attributes:
        timeouts: answers whose check was cut off, by the limit or because its process died.
    """

    def __init__(self, timeout_s: float = 10.0, workers: int = 2) -> None:
        self.timeout_s = timeout_s
        self.workers = workers
        self.timeouts = 0
        self._pool: ProcessPool | None = None
        self._lock = Lock()

    def __call__(self, prompt: Prompt, response: str) -> float:
        """
        Raises:
            RuntimeError: the processes cannot start; in a script of your own, guard the entry with ``if __name__ == "__main__"``.
        """
        future = self._running_pool().schedule(
            _check, args=(prompt.answer, response, self.timeout_s), timeout=self.timeout_s
        )
        try:
            return float(future.result(_STALLED_S))
        except (TimeoutError, ProcessExpired):
            assert future.done(), "the pool of answer checkers is stuck"
            with self._lock:
                self.timeouts += 1
            return 0.0

    def close(self) -> None:
        """Stops the processes; a later call starts new ones."""
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.close()  # idle workers, and those still starting, end by themselves
            try:
                pool.join(timeout=_FAREWELL_S)
            except TimeoutError:
                pool.stop()
                pool.join()
            atexit.unregister(self.close)

    def __enter__(self) -> MathReward:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _running_pool(self) -> ProcessPool:
        with self._lock:
            if self._pool is None:
                # A fork would copy the locks of torch's and the process group's threads.
                context = multiprocessing.get_context("spawn")
                self._pool = ProcessPool(max_workers=self.workers, initializer=_start_worker, context=context)
                atexit.register(self.close)
            return self._pool


def is_correct(truth: str, response: str) -> bool:
    """Whether the final answer of ``response`` equals ``truth``. Without a time limit: see ``MathReward``."""
    boxed = _last_boxed(truth)
    truth = _tidy(boxed if boxed is not None else truth.rpartition("####")[2])
    answer = _last_boxed(response)
    if answer is not None:
        answer = _tidy(answer)
        # Words: math-verify would read them as products of letters, and miss "True" for "true".
        if answer.casefold() == truth.casefold():
            return True
        response = f"\\boxed{{{answer}}}"
    # A box makes math-verify read all of the truth as one expression. Limit 0 is none: here the process is killed instead.
    expected, found = (parse(text, parsing_timeout=0) for text in (f"\\boxed{{{truth}}}", response))
    return verify(expected, found, timeout_seconds=0)


def _tidy(answer: str) -> str:
    """Without dollar signs (currency or delimiters), white space around it and a full stop."""
    return answer.replace("\\$", "").replace("$", "").strip().removesuffix(".")


def _last_boxed(text: str) -> str | None:
    r"""What stands in the last complete ``\boxed{...}``; braces nest. Without one, what follows the last ``\boxed`` and a space."""
    boxes = {match.end() for match in re.finditer(r"\\boxed\s*\{", text)}
    last: tuple[int, int] | None = None
    opened: list[int] = []  # what comes after each open brace
    for brace in re.finditer(r"[{}]", text):
        if brace[0] == "{":
            opened.append(brace.end())
        elif opened and (start := opened.pop()) in boxes and (last is None or start > last[0]):
            last = (start, brace.start())
    if last:
        return text[slice(*last)]
    bare = re.findall(r"\\boxed\s+([^\s{}\\$.,;]+)", text)
    return bare[-1] if bare else None


def _check(truth: str, response: str, limit_s: float) -> bool:
    signal.alarm(
        math.ceil(limit_s) + _AFTER_THE_TRAINER_S
    )  # the pool's limit ends with the trainer, the kernel's does not
    try:
        return is_correct(truth, response)
    finally:
        signal.alarm(0)


def _start_worker() -> None:
    # Signals to the whole job concern the trainer: it may still want rewards while it saves.
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    # math-verify warns that it has no time limit of its own, and logs every answer that it cannot parse.
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
