"""SIGUSR1 and SIGTERM request a stop after the current step. A second SIGTERM ends the process immediately.

Before ``listen`` is called, such a signal kills the process, so this module has no slow imports.

SIGINT ends the process immediately: silently until ``interrupt_with_one_line`` is called, then by Python's
KeyboardInterrupt, which ``run.start_command`` reports.

SIGUSR1 and SIGTERM are blocked, and a thread waits for them, so that a request arrives even while the main
thread is in a collective. Child processes (reward workers, servers, writers of files) inherit the mask:
Slurm signals every process of a job step, and a save still needs its writers.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import NoReturn

_REQUESTS = {signal.SIGUSR1, signal.SIGTERM}
_FORWARDED_S = 2.0
"""Seconds within which two SIGTERMs count as one.

Slurm sends SIGTERM to each process of a step, and torchrun forwards it."""

received: signal.Signals | None = None
"""The first request, or None."""

active = True
"""False after a stopping run has saved everything. Signals are then ignored."""


def _ignore(reason: str) -> None: ...


def _ignore_request(number: signal.Signals) -> None: ...


on_request: Callable[[signal.Signals], None] = _ignore_request
"""Function called with the first request, in the thread that waits for signals."""

before_exit: Callable[[str], None] = _ignore
"""Function called with the reason before a signal ends the process. It does not run in the main thread."""


def listen() -> None:
    """Start to treat the signals as stop requests. Call it before any thread is started."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_BLOCK, _REQUESTS)
    threading.Thread(target=_wait, name="signals", daemon=True).start()


def interrupt_with_one_line() -> None:
    """Let SIGINT raise KeyboardInterrupt from now on. Before, it would show a traceback of the imports."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _wait() -> None:
    global received
    first_term: float | None = None
    while True:
        number = signal.Signals(signal.sigwait(_REQUESTS))
        if not active:
            continue
        if number is signal.SIGTERM and _rank_has_ended():
            _exit("ended by torchrun, because another rank of this node has ended")
        if received is None:
            received = number
            on_request(number)
        if number is not signal.SIGTERM:
            continue
        if first_term is None:
            first_term = time.monotonic()
        elif time.monotonic() - first_term > _FORWARDED_S:
            _exit("ended by a second SIGTERM; nothing was saved")


def _rank_has_ended() -> bool:
    """Return whether torchrun has fewer children than it started. Then a rank failed, and SIGTERM follows."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return False
    import psutil

    return len(psutil.Process(os.getppid()).children()) < int(os.environ["LOCAL_WORLD_SIZE"])


def torchrun_limit_s(number: signal.Signals) -> float | None:
    """Return the seconds after which torchrun kills the ranks when it has received this signal.

    None if torchrun has not started this process, or ignores the signal (proc_pid_status(5), ``SigIgn``).
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    with open(f"/proc/{os.getppid()}/status") as status:
        ignored = next(int(line.split()[1], 16) for line in status if line.startswith("SigIgn"))
    if ignored >> (number - 1) & 1:
        return None
    return float(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "30"))


def exit_with_children(code: int) -> NoReturn:
    """End the processes that this one has started with ``multiprocessing``, then this process, at once."""
    try:
        for child in multiprocessing.active_children():
            child.kill()
    finally:
        os._exit(code)


def _exit(reason: str) -> None:
    try:
        before_exit(reason)
    finally:
        exit_with_children(1)
