"""The process that checks answers: ``python -m megatron_gmpo.rewards.math.worker``.

It writes one byte when it is ready, then reads requests, a line of JSON each, and answers each with ``1``
(right) or ``0``. It ends when its input ends, or when it runs out of memory.
"""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import sys
from pathlib import Path

from .equality import is_correct

MEMORY_BYTES = 512 << 20
"""Memory that a worker may use in addition to what it uses when it starts."""
ORPHAN_MARGIN_S = 30
"""Seconds after the time limit until the kernel ends a worker whose trainer has ended."""


def limit_memory() -> None:
    """Let allocations beyond ``MEMORY_BYTES`` fail."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, hard))


def main() -> None:
    """Answer requests until the input ends."""
    # the trainer handles job-wide signals, and may need rewards until it has saved a checkpoint
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # ends quietly if the trainer has ended
    limit_memory()
    out = sys.stdout.fileno()
    os.write(out, b"r")
    for line in sys.stdin.buffer:
        truth, response, limit_s = json.loads(line)
        signal.alarm(math.ceil(limit_s) + ORPHAN_MARGIN_S)
        try:
            right = is_correct(truth, response)
        except MemoryError:
            os._exit(1)  # the trainer starts another worker
        except Exception:  # sympy raises errors of many types on expressions that it cannot evaluate
            right = False
        signal.alarm(0)
        os.write(out, b"1" if right else b"0")


if __name__ == "__main__":
    main()
