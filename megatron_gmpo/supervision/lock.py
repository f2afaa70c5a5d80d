"""The lock of a run folder, which allows one attempt at a time."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from .. import files
from ..errors import InputError
from .records import node_name

log = logging.getLogger(__name__)

LOCK = "run.lock"

_SAME_JOB_S = 120.0
"""Seconds to wait for the lock of the same job's last attempt.

After a requeue it stays until the file system detects that the last attempt's node is gone."""
_POLL_S = 1.0


class RunLock:
    """An exclusive ``flock`` on ``run.lock`` that ends with the process. The file names the holder.

    Only the owner can read the file, because everyone who can open a file can lock it.

    Raises:
        InputError: the file belongs to another user, or another process holds the lock. If the holder is an
            earlier attempt of the same Slurm job, the error is raised after two minutes.
    """

    def __init__(self, run_dir: Path) -> None:
        self._file = _private(run_dir / LOCK)
        # a forked child inherits the descriptor and would hold the lock after this process has ended
        os.register_at_fork(after_in_child=self._file.close)
        deadline = time.monotonic() + _SAME_JOB_S
        while not self._acquired():
            holder = self._holder()
            same_job = holder.get("job") is not None and holder["job"] == os.environ.get("SLURM_JOB_ID")
            if not same_job or time.monotonic() > deadline:
                job = f" of job {holder['job']}" if holder.get("job") else ""
                who = (
                    f"process {holder['pid']}{job} on {holder['node']} since {holder['start']}"
                    if holder
                    else "a run that is starting"
                )
                raise InputError(
                    f"run_dir = {str(run_dir)!r} is in use by {who}: "
                    "wait for its end, or choose another run_dir"
                )
            time.sleep(_POLL_S)

    def sign(self) -> None:
        """Write this process into the file as the holder."""
        holder = {
            "job": os.environ.get("SLURM_JOB_ID"),
            "node": node_name(),
            "pid": os.getpid(),
            "start": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        self._file.truncate(0)
        with files.named(Path(self._file.name)):
            # without a buffer, which would be written again, and fail again, when the file is closed
            os.write(self._file.fileno(), (json.dumps(holder) + "\n").encode())

    def release(self) -> None:
        """Release the lock."""
        with suppress(OSError):  # the file system may not support locks
            # close() is not sufficient, because a child that is being forked may still have the descriptor
            fcntl.flock(self._file, fcntl.LOCK_UN)
        self._file.close()

    def _acquired(self) -> bool:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            log.warning(
                f"the file system of {self._file.name} does not support locks ({error.strerror}): "
                "make sure that only one run writes there"
            )
        return True

    def _holder(self) -> dict[str, Any]:
        self._file.seek(0)
        line = self._file.readline()
        return json.loads(line) if line.endswith("\n") else {}


def _private(path: Path) -> TextIO:
    """Open a file that only this user can read, and create it if it does not exist."""
    try:
        file = open(path, "a+", opener=lambda path, flags: os.open(path, flags, 0o600))  # noqa: SIM115
        os.fchmod(file.fileno(), 0o600)  # an older version created it for everyone
    except PermissionError:
        raise InputError(f"{path} belongs to another user: choose another run_dir") from None
    return file
