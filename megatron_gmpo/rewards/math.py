r"""The reward for mathematics: math-verify compares the last \boxed answer with the reference answer."""

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

# workers ignore SIGTERM, so pebble should not wait long before it kills them
CONSTS.term_timeout = 0.1

_JOIN_TIMEOUT_S = 5.0
"""Seconds within which idle workers must end before they are stopped."""
_ORPHAN_MARGIN_S = 30
"""Seconds after an answer's timeout until the kernel ends a worker whose trainer has ended."""
_STALLED_S = 3600.0
"""Timeout of one answer, including the wait for a worker. Reaching it means that the pool is broken."""


class MathReward:
    r"""Score 1.0 if the final answer of a response equals the reference answer mathematically, else 0.0.

    The final answer is the last complete ``\boxed{...}``, or without one the answer that math-verify
    extracts. The reference answer is plain text or LaTeX: alone, boxed, or after ``####`` as in GSM8K. Order
    counts in tuples and intervals, not in sets and lists; ``50\%`` equals both ``50`` and ``1/2``.

    Worker processes, which start with the first call, check the answers, because a computation that does not
    end (``9^{9^{9^9}}``) can only be stopped by killing its process. Calls from several threads run in
    parallel.

    Args:
        timeout_s: timeout of one answer; an answer that exceeds it scores 0.
        workers: number of worker processes.

    Attributes:
        timeouts: number of checks that exceeded the timeout or whose process died.
    """

    def __init__(self, timeout_s: float = 10.0, workers: int = 2) -> None:
        self.timeout_s = timeout_s
        self.workers = workers
        self.timeouts = 0
        self._pool: ProcessPool | None = None
        self._lock = Lock()

    def __call__(self, prompt: Prompt, response: str) -> float:
        """Score a response.

        Raises:
            RuntimeError: the workers cannot start. A script needs the guard ``if __name__ == "__main__"``.
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
        """Stop the worker processes; a later call starts new ones."""
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.close()  # idle and starting workers exit
            try:
                pool.join(timeout=_JOIN_TIMEOUT_S)
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
                # fork would copy locks held by the threads of torch and the process group
                context = multiprocessing.get_context("spawn")
                self._pool = ProcessPool(max_workers=self.workers, initializer=_start_worker, context=context)
                atexit.register(self.close)
            return self._pool


def is_correct(truth: str, response: str) -> bool:
    """Return whether the final answer of ``response`` equals ``truth``, without a time limit."""
    boxed = _last_boxed(truth)
    truth = _tidy(boxed if boxed is not None else truth.rpartition("####")[2])
    answer = _last_boxed(response)
    if answer is not None:
        answer = _tidy(answer)
        # math-verify parses words as products of letters and would reject "True" for "true"
        if answer.casefold() == truth.casefold():
            return True
        response = f"\\boxed{{{answer}}}"
    # In a box, the whole reference answer is parsed as one expression. 0 disables math-verify's own timeout.
    expected, found = (parse(text, parsing_timeout=0) for text in (f"\\boxed{{{truth}}}", response))
    return verify(expected, found, timeout_seconds=0)


def _tidy(answer: str) -> str:
    """Remove dollar signs (currency or delimiters), surrounding white space and a final full stop."""
    return answer.replace("\\$", "").replace("$", "").strip().removesuffix(".")


def _last_boxed(text: str) -> str | None:
    r"""Return the content of the last complete ``\boxed{...}``, which may contain nested braces.

    Without one, return the word after the last ``\boxed`` and a space, or None.
    """
    boxes = {match.end() for match in re.finditer(r"\\boxed\s*\{", text)}
    last: tuple[int, int] | None = None
    opened: list[int] = []  # the position after each unclosed brace
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
    # the pool enforces the timeout only while the trainer runs; the alarm also ends an orphaned worker
    signal.alarm(math.ceil(limit_s) + _ORPHAN_MARGIN_S)
    try:
        return is_correct(truth, response)
    finally:
        signal.alarm(0)


def _start_worker() -> None:
    # the trainer handles job-wide signals, and may need rewards until it has saved a checkpoint
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    # math-verify warns about its disabled timeout and about every answer that it cannot parse
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
