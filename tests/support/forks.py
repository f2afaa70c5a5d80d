"""Run commands in forks of one process that has already imported torch, Megatron and the package.

A new interpreter spends about 7 s of CPU time on these imports, a fork 0.1 s. A fork has the arguments,
environment, streams, signals, exit code and children of the command ``python -m MODULE``. It differs in its
hash seed, which all forks share, and in the command line that a process list shows. A test that depends on
either starts ``commands.command_line`` with subprocess.

Run as a module, this is the process that forks: ``python -m tests.support.forks FD``. FD is the socket on
which ``Fork`` sends commands.
"""

from __future__ import annotations

import functools
import gc
import importlib
import json
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

import psutil

ROOT = Path(__file__).parents[2]
TORCHRUN = "torch.distributed.run"
_IMPORTED = [TORCHRUN, "megatron_gmpo.train", "tests.support.cases"]
_MESSAGE_BYTES = 2**20
_POLL_S = 0.01


@dataclass
class Command:
    """``python -m module argv...``; ``ranks`` is the number of processes that it starts if it is torchrun."""

    module: str
    argv: list[str]
    env: dict[str, str]
    ranks: int = 0


class Fork:
    """Command in a fork, with the methods of ``subprocess.Popen``.

    When its context ends, it is killed with all its descendants.
    """

    def __init__(self, command: Command) -> None:
        self._stdout, self._stderr = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115
        self._status, theirs = multiprocessing.Pipe(duplex=False)
        files = [file.fileno() for file in (self._stdout, self._stderr, theirs)]
        socket.send_fds(_forking_process(), [json.dumps(asdict(command)).encode()], files)
        theirs.close()
        self.pid: int = self._status.recv()
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None and self._status.poll():
            self.returncode = self._status.recv()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None and not self._status.poll(timeout):
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
        code = self.poll()
        assert code is not None
        return code

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for the process to end; return what it and its descendants wrote to stdout and stderr."""
        self.wait(timeout)
        return _content(self._stdout.fileno()), _content(self._stderr.fileno())

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.poll() is None:
            process = psutil.Process(self.pid)
            for member in (process, *process.children(recursive=True)):
                with suppress(psutil.NoSuchProcess):
                    member.kill()
        self.wait()


def _content(file: int) -> str:
    return os.pread(file, os.fstat(file).st_size, 0).decode()


@functools.cache
def _forking_process() -> socket.socket:
    """Start the process that forks and return the socket on which it receives commands.

    It ends together with this process.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        command = [sys.executable, "-m", __name__, str(theirs.fileno())]
        subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()])
    return ours


def _serve(commands: socket.socket) -> Command | None:
    """Fork for every command that arrives; return the command in its fork, and None after the last one.

    The parent of each fork is another fork, which reports the process id and the exit code.
    """
    for module in _IMPORTED:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        message, files, *_ = socket.recv_fds(commands, _MESSAGE_BYTES, 3)
        if not message:
            return None
        if not os.fork():
            break
        for file in files:
            os.close(file)
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass  # one of the intermediate parents below has ended
    commands.close()
    stdout, stderr, status = files
    with Connection(status, readable=False) as sender:
        if pid := os.fork():
            with suppress(BrokenPipeError):
                sender.send(pid)
                sender.send(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
            os._exit(0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, file in ((1, stdout), (2, stderr)):
        os.dup2(file, number)
        os.close(file)
    return Command(**json.loads(message))


class _Rank:
    """Fork that waits for its rank's command, with the methods of ``subprocess.Popen`` that torchrun uses."""

    def __init__(self, pid: int, pipe: int) -> None:
        self.pid, self.pipe = pid, pipe
        self.returncode: int | None = None

    def start(self, args: tuple[str, ...], env: dict[str, str]) -> None:
        _, unbuffered, module_follows, module, *argv = args
        assert (unbuffered, module_follows) == ("-u", "-m")
        with open(self.pipe, "w") as pipe:
            json.dump(asdict(Command(module, argv, env)), pipe)

    def poll(self) -> int | None:
        if self.returncode is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if ended else None
        return self.returncode

    def wait(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            time.sleep(_POLL_S)


def _fork_ranks(count: int) -> Command | None:
    """Fork the ranks of torchrun and return None; in a rank return the rank's command.

    This process runs torchrun afterwards. The forks must exist before torchrun starts, because a process
    with threads must not fork.
    """
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    ranks: list[_Rank] = []
    for _ in range(count):
        reading, writing = os.pipe()
        if pid := os.fork():
            os.close(reading)
            ranks.append(_Rank(pid, writing))
            continue
        for pipe in (writing, *(rank.pipe for rank in ranks)):
            os.close(pipe)
        with open(reading) as pipe:
            command = pipe.read()
        if not command:  # torchrun ended before it started its ranks
            os._exit(0)
        os.setsid()
        output: Any = sys.stdout
        output.reconfigure(write_through=True)  # the equivalent of python -u
        return Command(**json.loads(command))

    def start(_: Any, args: tuple[str, ...], env: dict[str, str]) -> _Rank:
        rank = ranks.pop(0)
        rank.start(args, env)
        return rank

    handler: Any = subprocess_handler.SubprocessHandler
    handler._popen = start
    return None


def _run(command: Command) -> None:
    os.environ.clear()
    os.environ.update(command.env)
    sys.path[1:1] = filter(None, command.env.get("PYTHONPATH", "").split(os.pathsep))
    sys.argv[1:] = command.argv
    sys.modules.pop(command.module, None)
    runpy.run_module(command.module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    command = _serve(socket.socket(fileno=int(sys.argv[1])))
    if command and command.ranks:
        command = _fork_ranks(command.ranks) or command
    if command:
        _run(command)
