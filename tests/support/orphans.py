"""After a test run has ended, even by SIGKILL, kill the processes that it started.

Every process inherits the run's mark in its environment. Process groups and parents do not identify all of
them: servers, ranks and jobs have their own groups and lose their parents. Run as a module, this is the
process that waits for the run's end: ``python -m tests.support.orphans PID MARK``.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import time
from contextlib import suppress

import psutil

from .forks import ROOT

VARIABLE = "TEST_RUN"
_LIMIT_S = 60
_POLL_S = 0.1


def mark_this_run() -> None:
    """Mark the processes that this process starts from now on, and start the one that waits for its end."""
    mark = os.environ[VARIABLE] = secrets.token_hex()
    subprocess.Popen(
        [sys.executable, "-m", __name__, str(os.getpid()), mark],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C and signals to the run's process group must not end it
    )


def marked(mark: str) -> list[psutil.Process]:
    """Return the live processes with this mark, except this one."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(VARIABLE) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return [process for process in found if process.pid != os.getpid()]


def main(run: int, mark: str) -> None:
    with suppress(psutil.NoSuchProcess):
        psutil.Process(run).wait()
    deadline = time.monotonic() + _LIMIT_S
    while (left := marked(mark)) and time.monotonic() < deadline:
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        time.sleep(_POLL_S)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
