"""One attempt at a time: the first rank holds a lock on the run folder."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import InputError
from .records import node_name

log = logging.getLogger(__name__)

_SAME_JOB_S = 120.0
"""A requeued job meets the lock of its own last attempt, until the file system notices that its node is gone."""
_POLL_S = 1.0


class RunLock:
    """An exclusive ``flock`` on ``run.lock``, which ends with the process. The file's line names the holder.

    Raises:
        InputError: another process holds it. A former attempt of the same Slurm job is waited for, up to two minutes.
    """

    def __init__(self, run_dir: Path) -> None:
        self._file = (run_dir / "run.lock").open("a+")
        os.register_at_fork(
            after_in_child=self._file.close
        )  # a child that outlives this process must not hold it
        deadline = time.monotonic() + _SAME_JOB_S
        while not self._taken():
            holder = self._holder()
            same_job = holder.get("job") is not None and holder["job"] == os.environ.get("SLURM_JOB_ID")
            if not same_job or time.monotonic() > deadline:
                job = f" of job {holder['job']}" if holder.get("job") else ""
                who = (
                    f"process {holder['pid']}{job} on {holder['node']} since {holder['start']}"
                    if holder
                    else "a run that just starts"
                )
                raise InputError(
                    f"run_dir = {str(run_dir)!r} is in use by {who}: wait for its end, or choose another run_dir"
                )
            time.sleep(_POLL_S)

    def sign(self) -> None:
        """Writes who holds it."""
        start = time.strftime("%Y-%m-%d %H:%M:%S")
        line = {
            "job": os.environ.get("SLURM_JOB_ID"),
            "node": node_name(),
            "pid": os.getpid(),
            "start": start,
        }
        self._file.truncate(0)
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def release(self) -> None:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(
                self._file, fcntl.LOCK_UN
            )  # closing leaves it to a child that has been forked this moment
        self._file.close()

    def _taken(self) -> bool:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            log.warning(
                f"the file system of {self._file.name} has no locks ({error.strerror}): see to it that only one run writes there"
            )
        return True

    def _holder(self) -> dict[str, Any]:
        self._file.seek(0)
        line = self._file.readline()
        return json.loads(line) if line.endswith("\n") else {}
