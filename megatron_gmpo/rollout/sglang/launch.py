"""Run an SGLang server until stdin is closed. This script runs in the servers' own environment:

    python -I launch.py OPTIONS of sglang.launch_server

The first line on stdin is a JSON object with the keys, as additional options, so that neither the process
table nor the log shows them. stdin is a pipe from the trainer, which the kernel closes when the trainer ends
for any reason. Then this process kills the server's whole process group, even if the server is stopped
(SIGSTOP).
"""

from __future__ import annotations

import json
import logging
import os
import runpy
import select
import signal
import sys
from collections.abc import Iterable


def main() -> None:
    secrets: dict[str, str] = json.loads(sys.stdin.readline())
    server = os.fork()
    if server == 0:
        os.setpgid(0, 0)
        _serve(secrets)
    else:
        os.setpgid(server, server)  # both processes call it, so that neither continues without it
        sys.exit(_wait(server))


def _wait(server: int) -> int:
    """Wait until the server ends or stdin is closed, and return the server's exit code.

    Before it returns, it kills the server's process group.
    """
    select.select([sys.stdin.fileno(), os.pidfd_open(server)], [], [])
    os.killpg(server, signal.SIGKILL)  # the id is not reused, because the leader is not reaped yet
    code = os.waitstatus_to_exitcode(os.waitpid(server, 0)[1])
    return code if code >= 0 else 128 - code


def _serve(secrets: dict[str, str]) -> None:
    os.dup2(os.open(os.devnull, os.O_RDONLY), sys.stdin.fileno())
    _hide(secrets.values())
    for option in secrets.items():
        sys.argv += option
    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)


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
