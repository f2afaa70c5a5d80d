"""The side of a worker process of ``processes.ProcessReward``.

A worker writes ``ready`` when it is, then reads requests, a line of JSON each, and answers each with a line,
its score. It ends when its input ends, or when it runs out of memory.
"""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path

MEMORY_BYTES = 512 << 20
"""Memory that a worker may use in addition to what it uses when it starts."""
ORPHAN_MARGIN_S = 30
"""Seconds after the time limit until the kernel ends a worker whose trainer has ended."""


def limit_memory() -> None:
    """Let allocations beyond ``MEMORY_BYTES`` fail."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, hard))


def serve(score: Callable[[str, str], float]) -> None:
    """Answer requests until the input ends.

    Args:
        score: function of the prompt's answer and the response. An error, and a value that is no finite
            number, is the score 0.
    """
    # the trainer handles job-wide signals, and may need rewards until it has saved a checkpoint
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # ends quietly if the trainer has ended
    limit_memory()
    # what a scorer prints must not be read as a score
    out = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    os.write(out, b"ready\n")
    for line in sys.stdin.buffer:
        truth, response, limit_s = json.loads(line)
        signal.alarm(math.ceil(limit_s) + ORPHAN_MARGIN_S)
        try:
            value = float(score(truth, response))
        except MemoryError:
            os._exit(1)  # the trainer starts another worker
        except Exception:  # parsers and computer algebra raise errors of many types on what they cannot read
            value = 0.0
        signal.alarm(0)
        os.write(out, b"%.17g\n" % (value if math.isfinite(value) else 0.0))
