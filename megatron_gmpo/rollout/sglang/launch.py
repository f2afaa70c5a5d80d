"""An SGLang server that lives no longer than the pipe on its stdin. Runs in the servers' own environment, as a script:

    python -I launch_sglang.py OPTIONS of sglang.launch_server

The first line on stdin is a JSON table of further options, the keys: neither the process table nor the log shows them. The end of stdin
comes with the end of the trainer, whatever killed it, and kills the server's whole process group, stopped or not.
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
        os.setpgid(server, server)  # both do it, so that neither goes on before it is done
        sys.exit(_wait(server))


def _wait(server: int) -> int:
    """Waits for the end of the server or of stdin, lets nothing of the process group survive it, and gives the exit code."""
    select.select([sys.stdin.fileno(), os.pidfd_open(server)], [], [])
    os.killpg(server, signal.SIGKILL)  # nobody else's by now: the leader is not reaped yet
    code = os.waitstatus_to_exitcode(os.waitpid(server, 0)[1])
    return code if code >= 0 else 128 - code


def _serve(secrets: dict[str, str]) -> None:
    os.dup2(os.open(os.devnull, os.O_RDONLY), sys.stdin.fileno())
    _hide(secrets.values())
    for option in secrets.items():
        sys.argv += option
    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)


def _hide(secrets: Iterable[str]) -> None:
    """Puts ``***`` for secrets into the log: SGLang writes its options there, keys included (sglang/srt/entrypoints/engine.py)."""
    plain = logging.Formatter.format

    def without_secrets(self: logging.Formatter, record: logging.LogRecord) -> str:
        line = plain(self, record)
        for secret in secrets:
            line = line.replace(secret, "***")
        return line

    logging.Formatter.format = without_secrets


if __name__ == "__main__":
    main()
