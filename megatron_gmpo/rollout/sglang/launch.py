"""Run an SGLang server until stdin is closed. This script runs in the servers' own environment:

    python -I launch.py OPTIONS of sglang.launch_server

The first line on stdin is a JSON object with the keys, as additional options, so that neither the process
table nor the log shows them. stdin is a pipe from the trainer, which the kernel closes when the trainer ends
for any reason. Then this process kills the server's whole process group, even if the server is stopped
(SIGSTOP), and removes the server's files.

A killed SGLang leaves a file and a semaphore in /dev/shm, and five sockets in the folder for temporary files.
(After SIGTERM it takes up to 17 s to end, and leaves all but the semaphore.) Each server therefore gets its
own folder for the sockets, whose name is part of the names in /dev/shm. The server and this process hold a
lock in that folder. If both were killed, the next start finds the lock free and removes the files.
"""

from __future__ import annotations

import ctypes
import fcntl
import glob
import json
import logging
import multiprocessing
import os
import runpy
import select
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

_PREFIX = "gmpo-server-"
_PR_SET_PDEATHSIG = 1


def main() -> None:
    secrets: dict[str, str] = json.loads(sys.stdin.readline())
    _remove_files_of_killed_servers()
    folder = _locked_folder()
    server = os.fork()
    if server == 0:
        os.setpgid(0, 0)
        _serve(secrets, folder)
    else:
        os.setpgid(server, server)  # both processes call it, so that neither continues without it
        code = _wait(server)
        _remove_files(folder)
        sys.exit(code)


def _wait(server: int) -> int:
    """Wait until the server ends or stdin is closed, and return the server's exit code.

    Before it returns, it kills the server's process group.
    """
    select.select([sys.stdin.fileno(), os.pidfd_open(server)], [], [])
    os.killpg(server, signal.SIGKILL)  # the id is not reused, because the leader is not reaped yet
    code = os.waitstatus_to_exitcode(os.waitpid(server, 0)[1])
    return code if code >= 0 else 128 - code


def _serve(secrets: dict[str, str], folder: Path) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # SGLang's processes end with their parent too
    os.dup2(os.open(os.devnull, os.O_RDONLY), sys.stdin.fileno())
    _hide(secrets.values())
    _name_files(folder)
    if "SGLANG_USE_CPU_ENGINE" in os.environ and "--enable-multimodal" in sys.argv:
        runpy.run_path(str(Path(__file__).with_name("vision_operators.py")))
    for option in secrets.items():
        sys.argv += option
    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)


def _locked_folder() -> Path:
    """Make a folder and lock it until this process and its forks have ended."""
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
    fcntl.flock(os.open(folder / "new", os.O_WRONLY | os.O_CREAT, 0o600), fcntl.LOCK_EX)
    (folder / "new").rename(folder / "lock")  # so that no other start finds ``lock`` without a holder
    return folder


def _remove_files_of_killed_servers() -> None:
    for lock in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*/lock"):
        # OSError: another user's folder, or in use, or another start removes it
        with suppress(OSError), lock.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if lock.parent.lstat().st_uid == os.getuid():
                _remove_files(lock.parent)


def _remove_files(folder: Path) -> None:
    name = glob.escape(folder.name)
    for pattern in (f"sem.{name}-*", f"sglang_loads_{name}_*"):
        for file in Path("/dev/shm").glob(pattern):
            file.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _name_files(folder: Path) -> None:
    """Make SGLang put its sockets into ``folder``, and use the folder's name for its files in /dev/shm."""
    from sglang.srt.server_args import PortArgs  # pyright: ignore[reportMissingImports]

    tempfile.tempdir = str(folder)
    config: dict[str, Any] = multiprocessing.current_process()._config  # pyright: ignore
    # names the semaphores of this process and its children (multiprocessing/synchronize.py:SemLock)
    config["semprefix"] = f"/{folder.name}"
    init_new = PortArgs.init_new

    def named(*args: Any, **kwargs: Any) -> Any:
        ports = init_new(*args, **kwargs)
        ports.instance_id = folder.name  # managers/load_snapshot.py:shm_path_for
        return ports

    PortArgs.init_new = staticmethod(named)


def _hide(secrets: Iterable[str]) -> None:
    """Replace secrets by ``***`` in the log.

    SGLang logs all its options, including the keys (sglang/srt/entrypoints/engine.py).
    """
    plain = logging.Formatter.format

    def without_secrets(self: logging.Formatter, record: logging.LogRecord) -> str:
        line = plain(self, record)
        for secret in secrets:
            line = line.replace(secret, "***")
        return line

    logging.Formatter.format = without_secrets


if __name__ == "__main__":
    main()
