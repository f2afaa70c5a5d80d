"""Worker processes that run environments, one live episode a process; ``worker`` is their side."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import resource
import socket
import subprocess
import sys
import time
from contextlib import suppress
from typing import Any

from ...batch.samples import Prompt
from ...config import RolloutConfig
from ...errors import InputError, RunError
from . import EnvironmentFault, Observation, worker
from .worker import IMPORT_S, READY, read_line

MAX_ANSWER_BYTES = 256 << 10
"""Maximum size of an observation as JSON."""
_START = f"""import json, sys
sys.path[:] = json.loads(sys.argv[1])
from {worker.__name__} import main
main()"""
"""What the fork server runs: it can import what the trainer can."""
_SERVER_S = 60.0
"""Seconds within which the fork server takes a request, and within which it ends."""


class EnvironmentPool:
    """The worker processes of one trainer process.

    The constructor starts a process that imports the environment or the tools. Workers are forked from it
    when an episode needs one, and serve one episode after another. There are as many as episodes have been
    live at the same time.

    Args:
        cfg: names the environment or the tools, and the time limit of a call.
        seed: the run's seed.

    Raises:
        InputError: the class or a function cannot be imported, or does not take its arguments.
        RunError: the import did not end, or ended the process.
    """

    def __init__(self, cfg: RolloutConfig, seed: int) -> None:
        self.timeout_s, self._seed = cfg.environment_timeout_s, seed
        self._idle: list[socket.socket] = []
        # a live episode has a socket here, and one in the fork server, which inherits the limit
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        self._control, theirs = socket.socketpair()
        self._server = subprocess.Popen(
            [sys.executable, "-P", "-c", _START, json.dumps(sys.path)],
            stdin=theirs.fileno(),
            env=os.environ
            | {
                "PYTHONHASHSEED": "0",  # sets of texts have the same order after a resume
                "PYTHONUNBUFFERED": "1",
                "OMP_NUM_THREADS": "1",  # a pool of threads would not survive the forks
                "OPENBLAS_NUM_THREADS": "1",
            },
        )
        theirs.close()
        named = {"environment": cfg.environment, "tools": cfg.tools, "arguments": cfg.environment_args}
        try:
            self._control.settimeout(IMPORT_S)
            self._control.sendall(json.dumps(named).encode() + b"\n")
            answer = json.loads(self._control.makefile("rb").readline())
        except (OSError, ValueError):  # it took too long, or has ended
            self.close()
            raise RunError(
                f"the process that imports {cfg.environment or list(cfg.tools)} ended, or took more than "
                f"{IMPORT_S} s; its error is above"
            ) from None
        if answer["error"]:
            self.close()
            raise InputError(answer["error"])
        self._control.settimeout(_SERVER_S)

    async def open(self, prompt: Prompt, number: int, draw: int) -> Session:
        """Return the session of a new episode, in an idle process or a new one.

        Args:
            prompt: the prompt, which ``reset`` receives without its token ids.
            number: number of the sample in its group.
            draw: number of the prompt's draw, so that a prompt that comes again is played anew.
        """
        start = {"id": prompt.id, "answer": prompt.answer, "text": prompt.text, "messages": prompt.messages}
        sock = self._idle_worker() or await self._new_worker()
        return Session(self, sock, start | {"seed": episode_seed(self._seed, prompt.id, number, draw)})

    def close(self) -> None:
        """End all processes."""
        for sock in (self._control, *self._idle):
            hang_up(sock)
        self._idle.clear()
        try:
            self._server.wait(_SERVER_S)
        except subprocess.TimeoutExpired:
            self._server.kill()
            self._server.wait()

    def give_back(self, sock: socket.socket) -> None:
        """Take the worker of an episode that has ended."""
        self._idle.append(sock)

    def _idle_worker(self) -> socket.socket | None:
        while self._idle:
            sock = self._idle.pop()
            try:
                sock.recv(1, socket.MSG_PEEK)
            except BlockingIOError:
                return sock
            except ConnectionResetError:
                pass
            hang_up(sock)  # it has ended, or said something unasked
        return None

    async def _new_worker(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        try:
            with theirs:
                socket.send_fds(self._control, [b"f"], [theirs.fileno()])
            async with asyncio.timeout(_SERVER_S):
                ready = await read_line(ours, MAX_ANSWER_BYTES)
        except OSError:  # also TimeoutError
            ready = b""
        except BaseException:  # also CancelledError
            hang_up(ours)
            raise
        if ready != READY:
            hang_up(ours)
            raise RunError(
                "the process that starts environments has ended, or started none within "
                f"{_SERVER_S:.0f} s; its error is above"
            )
        return ours


class Session:
    """One episode of an environment. One call at a time.

    The calls may come from any event loop. A session whose call was cancelled is over.

    Attributes:
        tool_calls: calls of tools so far.
        tool_errors: how many of them had an error as their result.
        seconds: time inside the environment's calls.
    """

    def __init__(self, pool: EnvironmentPool, sock: socket.socket, start: dict[str, Any]) -> None:
        self._pool, self._start = pool, start
        self._sock: socket.socket | None = sock
        self.tool_calls = 0
        self.tool_errors = 0
        self.seconds = 0.0

    async def reset(self) -> Observation:
        """Return the first observation.

        Raises:
            EnvironmentFault: the call failed. The process has been killed, and the session is over.
        """
        return await self._observe("reset", self._start)

    async def step(self, action: str) -> Observation:
        """Return the observation after a turn; see ``reset`` for errors."""
        return await self._observe("step", action)

    async def close(self) -> None:
        """End the episode. The process serves another one, unless a call failed or was cancelled."""
        if self._sock is not None:
            with suppress(EnvironmentFault):  # the episode is complete without it
                await self._observe("close", None)
        if self._sock is not None:
            self._pool.give_back(self._sock)
            self._sock = None

    async def _observe(self, call: str, value: Any) -> Observation:
        sock, self._sock = self._sock, None
        assert sock is not None, "the session is over"
        start = time.perf_counter()
        try:
            async with asyncio.timeout(self._pool.timeout_s):
                observation = await _answer(sock, call, value)
        except TimeoutError:
            hang_up(sock)
            raise EnvironmentFault(f"{call} did not return within {self._pool.timeout_s:g} s") from None
        except BaseException:  # also CancelledError
            hang_up(sock)
            raise
        finally:
            self.seconds += time.perf_counter() - start
        self.tool_calls += observation.info.get("tool_calls", 0)
        self.tool_errors += observation.info.get("tool_errors", 0)
        self._sock = sock
        return observation


def episode_seed(seed: int, prompt: str, number: int, draw: int) -> int:
    """Return the seed of an episode, of 32 bits: numpy's global generator takes no more."""
    return int.from_bytes(hashlib.sha256(json.dumps([seed, prompt, number, draw]).encode()).digest()[:4])


def hang_up(sock: socket.socket) -> None:
    """Shut a worker's socket, for which the fork server kills the worker."""
    with suppress(OSError):  # the other end has ended
        sock.shutdown(socket.SHUT_RDWR)  # unlike close, also if a fork of this process has a copy
    sock.close()


async def _answer(sock: socket.socket, call: str, value: Any) -> Observation:
    """Return a worker's answer to a request.

    Raises:
        EnvironmentFault: it is not an observation.
    """
    with suppress(BrokenPipeError, ConnectionResetError):  # then the report of its end can be read
        await asyncio.get_running_loop().sock_sendall(sock, json.dumps([call, value]).encode() + b"\n")
    try:
        line = await read_line(sock, MAX_ANSWER_BYTES)
    except ValueError as error:
        raise EnvironmentFault(f"{call} returned {error}") from None
    except ConnectionResetError:
        line = b""
    if not line:
        raise EnvironmentFault(f"the process ended in {call}")
    try:
        match json.loads(line):
            case {"observation": fields}:
                return Observation(**fields)
            case {"exited": end}:
                raise EnvironmentFault(f"the process ended in {call} ({end})")
            case {"fault": reason}:
                raise EnvironmentFault(str(reason))
    except (TypeError, ValueError, OverflowError, RecursionError, AttributeError) as error:
        raise EnvironmentFault(f"{call} returned nonsense: {type(error).__name__}") from None
    raise EnvironmentFault(f"{call} returned nonsense: {line[:100]!r}")
