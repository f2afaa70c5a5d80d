"""The processes that run environments.

The process that ``pool`` starts imports the environment once and then forks a worker for each live episode,
so that a worker costs milliseconds and shares the memory of what is imported. Python's ``multiprocessing`` is
not used, because its children import the trainer's main module.

Standard input is a socket to the trainer. Its first line, JSON, names the environment; the answer is a line
``{"error": ...}``, with null for success. After that the trainer sends one byte for each worker that it
needs, together with the worker's socket. The worker writes the line ``READY`` on it. Requests are lines
``[call, value]``, and answers are lines with one entry: ``observation`` (the fields of an Observation),
``fault`` or ``exited``.

A worker is killed when the trainer shuts its socket, and every process ends when the trainer has ended.
"""

from __future__ import annotations

import asyncio
import ctypes
import dataclasses
import gc
import inspect
import json
import os
import random
import select
import signal
import socket
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.random  # numpy imports it at its first use, which would be once in every worker

from ...batch.samples import Prompt
from ...errors import InputError, one_line
from ...plugins import resolve
from . import ENVIRONMENTS, Environment, Observation

IMPORT_S = 300
"""Seconds within which the environment must be imported."""
READY = b"{}\n"
"""What a worker writes first."""
_ORPHAN_MARGIN_S = 30
_PARENT_S = 1.0
"""Seconds between two looks whether the trainer lives.

They are needed only if a fork of the trainer keeps its sockets open.
"""
_PR_SET_PDEATHSIG = 1
_LINE_BYTES = 1 << 30

Make = Callable[[int], Environment]
"""Make the environment of an episode from its seed."""


def main() -> None:
    """Import the environment, then fork workers until the trainer has ended."""
    # the trainer handles job-wide signals, and may need episodes until it has saved a checkpoint; programs
    # that an environment starts would inherit blocked and ignored signals, but no handlers
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    control = socket.socket(fileno=os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # the run's standard output is not the environment's
    signal.alarm(IMPORT_S + _ORPHAN_MARGIN_S)  # ends this process if the trainer has ended meanwhile
    try:
        make = maker(**json.loads(control.makefile("rb").readline()))
        if len(os.listdir("/proc/self/task")) > 1:
            raise InputError(
                "the module of rollout.environment or rollout.tools starts threads when it is imported, and "
                "a fork has none of them: import what starts them in __init__ or in the function"
            )
    except InputError as error:
        control.sendall(json.dumps({"error": str(error)}).encode() + b"\n")
        return
    signal.alarm(0)
    gc.freeze()  # the collector does not touch, and so copy, the pages that the workers share
    control.sendall(json.dumps({"error": None}).encode() + b"\n")
    _ForkServer(control, make).serve()


def maker(environment: str, tools: list[str], arguments: dict[str, Any]) -> Make:
    """Return what makes the environment that the fields of ``RolloutConfig`` name.

    Raises:
        InputError: a class or function cannot be imported, or does not take the arguments.
    """
    if tools:
        from .tools import ToolEnvironment, named_tools

        named = named_tools(tools, arguments)
        return lambda seed: ToolEnvironment(named)
    field = "rollout.environment"
    found: Any = resolve(field, environment, ENVIRONMENTS, "module:Class")
    if isinstance(found, str):
        found = resolve(field, found, {}, "module:Class")
    if not inspect.isclass(found) or not all(
        callable(getattr(found, name, None)) for name in ("reset", "step")
    ):
        raise InputError(
            f"{field} = {environment!r} is not a class with the methods reset and step: give one"
        )
    make: Any = found
    signature = inspect.signature(make)
    seeded = "seed" in signature.parameters
    try:
        signature.bind(**arguments, **({"seed": 0} if seeded else {}))
    except TypeError as error:
        raise InputError(
            f"rollout.environment_args = {arguments} do not fit {environment}{signature}: {error}"
        ) from None
    return lambda seed: make(**arguments, **({"seed": seed} if seeded else {}))


class _ForkServer:
    """Fork workers, kill those that the trainer gives up, and report those that end.

    The server keeps a copy of each worker's socket: it hangs up when the trainer shuts the other end, and
    carries the report of the worker's end.
    """

    def __init__(self, control: socket.socket, make: Make) -> None:
        self._control, self._make = control, make
        self._workers: dict[int, socket.socket] = {}  # by process id
        self._poll = select.poll()
        self._woken, self._wake = socket.socketpair()  # by signals

    def serve(self) -> None:
        """Return when the trainer has ended. In a forked worker, this does not return."""
        self._wake.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)
        self._poll.register(self._control, select.POLLIN)
        self._poll.register(self._woken, select.POLLIN)
        trainer = os.getppid()
        while os.getppid() == trainer:
            ready = {file for file, _ in self._poll.poll(1000 * _PARENT_S)}
            for pid, sock in self._workers.items():
                if sock.fileno() in ready:  # the trainer has hung up
                    self._kill(pid)
                    self._poll.unregister(sock)
            if self._woken.fileno() in ready:
                self._woken.recv(1024)
                self._reap()
            # after the others, because a new socket may have the number of one that is closed there
            if self._control.fileno() in ready:
                _, files, *_ = socket.recv_fds(self._control, 1, 1)
                if not files:
                    break
                self._fork(socket.socket(fileno=files[0]))
        signal.set_wakeup_fd(-1)  # the socket is closed before the interpreter ends
        self._kill(*self._workers)

    def _fork(self, sock: socket.socket) -> None:
        server = os.getpid()
        pid = os.fork()
        if pid:
            self._workers[pid] = sock
            self._poll.register(sock, 0)
            return
        os.setsid()
        # the thread that forks is the server's only one, so that its end is the server's end
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != server:
            os._exit(1)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for other in (self._control, self._woken, self._wake, *self._workers.values()):
            other.close()
        code = 0
        try:
            _answer_requests(sock, self._make)
        except SystemExit as stop:  # of the environment
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the trainer has hung up
        except BaseException:
            traceback.print_exc()
            code = 1
        os._exit(code)

    def _reap(self) -> None:
        """Report the workers that have ended, and end what they have started."""
        for pid in list(self._workers):
            found = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if found is None:
                continue
            self._kill(pid)  # processes of its group; the worker keeps its id until the next line
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            end = f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
            sock = self._workers.pop(pid)
            with suppress(KeyError):
                self._poll.unregister(sock)
            with suppress(OSError):  # the trainer has hung up
                sock.send(json.dumps({"exited": end}).encode() + b"\n", socket.MSG_DONTWAIT)
            sock.close()

    @staticmethod
    def _kill(*pids: int) -> None:
        for pid in pids:
            with suppress(ProcessLookupError):  # a worker that has not called setsid yet
                os.killpg(pid, signal.SIGKILL)
            os.kill(pid, signal.SIGKILL)


async def read_line(sock: socket.socket, limit: int) -> bytes:
    """Return the next bytes of a non-blocking socket up to the end of a line, or b"" at the stream's end.

    Raises:
        ValueError: the line is longer than ``limit`` bytes.
    """
    line = bytearray()
    while not line.endswith(b"\n"):
        if not (part := await asyncio.get_running_loop().sock_recv(sock, 1 << 16)):
            return b""
        line += part
        if len(line) > limit:
            raise ValueError(f"more than {limit} bytes")
    return bytes(line)


def _answer_requests(sock: socket.socket, make: Make) -> None:
    """Answer the trainer's requests until it hangs up."""
    sock.setblocking(False)
    # the loop runs while the worker waits, so that tasks and connections of an asynchronous environment go
    # on; it does not run in synchronous methods, which may run loops of their own
    with asyncio.Runner() as runner:
        runner.run(_send(sock, READY))
        episode = _Episode(make, runner)
        while line := runner.run(read_line(sock, _LINE_BYTES)):
            answer = episode.answer(*json.loads(line))
            runner.run(_send(sock, answer.encode() + b"\n"))


async def _send(sock: socket.socket, line: bytes) -> None:
    await asyncio.get_running_loop().sock_sendall(sock, line)


class _Episode:
    """The environment of one episode after another."""

    def __init__(self, make: Make, runner: asyncio.Runner) -> None:
        self._make, self._runner = make, runner
        self._environment: Any = None

    def answer(self, call: str, value: Any) -> str:
        """Return the answer to a request as JSON."""
        try:
            observation = self._observe(call, value)
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            raised = f"{type(error).__name__}: {one_line(error)}"[:500]
            return json.dumps({"fault": f"{call} raised {raised} ({where.filename}:{where.lineno})"})
        if not isinstance(observation, Observation):
            kind = type(observation).__name__
            return json.dumps({"fault": f"{call} returned a value of type {kind}, not an Observation"})
        fields = {field.name: getattr(observation, field.name) for field in dataclasses.fields(Observation)}
        try:
            return json.dumps({"observation": fields}, default=_plain)
        except (TypeError, ValueError, RecursionError) as error:
            return json.dumps({"fault": f"{call} returned what JSON cannot hold: {one_line(error)}"})

    def _observe(self, call: str, value: Any) -> Any:
        if call == "close":
            closed, self._environment = self._environment, None
            if hasattr(closed, "close"):
                self._returned(closed.close())
            return Observation()
        if call == "step":
            return self._returned(self._environment.step(value))
        seed = value.pop("seed")
        random.seed(seed)
        np.random.seed(seed)
        self._environment = self._make(seed)
        return self._returned(self._environment.reset(Prompt(**value)))

    def _returned(self, result: Any) -> Any:
        async def awaited() -> Any:
            return await result

        return self._runner.run(awaited()) if inspect.isawaitable(result) else result


def _plain(value: Any) -> Any:
    """Return a numpy number as Python's."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"a {type(value).__name__} is no number, text, list or dict")
