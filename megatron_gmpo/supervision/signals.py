"""SIGUSR1 and SIGTERM ask the run to stop after the step it is in. A second SIGTERM ends the process at once.

Imports nothing that takes time: until ``listen`` is called, such a signal kills the process.

Both signals are blocked and awaited by a thread, so that a request is heard while the main thread stands in a collective. Child processes
(reward workers, servers, checkpoint writers) inherit the mask: Slurm signals every process of a job step, and a save needs its writers.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable

_REQUESTS = {signal.SIGUSR1, signal.SIGTERM}
_FORWARDED_S = 2.0
"""Slurm's SIGTERM comes to each process of a step, and once more from torchrun: within this time they are one."""

received: signal.Signals | None = None
"""The first request; None as long as there is none."""

heeded = True
"""False while a run that has saved everything ends."""


def _silent(reason: str) -> None: ...


last_words: Callable[[str], None] = _silent
"""Called with the reason, in another thread than the main one, before a signal ends the process."""


def listen() -> None:
    """Takes the signals as requests from now on. Call it before other threads are started."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _REQUESTS)
    threading.Thread(target=_wait, name="signals", daemon=True).start()


def _wait() -> None:
    global received
    first_term: float | None = None
    while True:
        number = signal.Signals(signal.sigwait(_REQUESTS))
        received = received or number
        if number is not signal.SIGTERM or not heeded:
            continue
        if _a_rank_is_gone():
            _die("ended by torchrun, because another rank of this node has ended")
        if first_term is None:
            first_term = time.monotonic()
        elif time.monotonic() - first_term > _FORWARDED_S:
            _die("ended by a second SIGTERM; nothing was saved")


def _a_rank_is_gone() -> bool:
    """Whether torchrun has fewer children than it started: its SIGTERM then means that a rank failed, and nobody will finish a step."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return False
    import psutil

    return len(psutil.Process(os.getppid()).children()) < int(os.environ["LOCAL_WORLD_SIZE"])


def _die(reason: str) -> None:
    try:
        last_words(reason)
    finally:
        os._exit(1)
