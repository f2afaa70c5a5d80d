"""A pool of processes that serve as gloo ranks for many cases of different world sizes.

Run as a module, this is one of the processes: ``python -m tests.support.ranks RANK ADDRESS``.
"""

from __future__ import annotations

import gc
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Client, Connection, Listener, wait
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist

from megatron_gmpo.platform import prepare_megatron

from .forks import Command, Fork

_CASE_S = 300
_COLLECTIVE_S = 120
_OTHERS_S = 5


class RankPool:
    """Pool of processes; ``run`` calls one function on several of them at once.

    The function and its arguments are pickled: define the function at the top of a module. A case that
    fails ends the pool, because its other ranks may wait in a collective. ``alive`` is then False.
    """

    def __init__(self, size: int) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="ranks")
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._processes: list[Fork] = []
        self._connections: list[Connection] = []
        for rank in range(size):
            address = str(Path(self._folder.name) / f"rank{rank}")
            with Listener(address) as listener:
                argv = [str(rank), address]
                self._processes.append(Fork(Command("tests.support.ranks", argv, dict(os.environ))))
                self._connections.append(cast(Connection, listener.accept()))
        self._cases = 0

    def run(self, world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Return the results in rank order; raise AssertionError with the tracebacks of failed ranks."""
        connections = self._connections[:world_size]
        assert len(connections) == world_size
        self._cases += 1
        # pickled here: Connection.send would share each tensor through a file descriptor
        case = pickle.dumps((self._store.port, self._cases, world_size, function, args))
        for connection in connections:
            connection.send_bytes(case)
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        deadline = time.monotonic() + _CASE_S
        while len(results) < world_size:
            waiting = [connection for rank, connection in enumerate(connections) if rank not in results]
            ready = wait(waiting, max(0, deadline - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                rank = connections.index(cast(Connection, connection))
                try:
                    results[rank], failure = pickle.loads(connections[rank].recv_bytes())
                except EOFError:
                    results[rank] = None
                    failure = f"the process ended with exit code {self._processes[rank].wait()}"
                if failure:
                    failures[rank] = failure
                    # the first failure closes the connections of the other ranks, which then fail as well
                    deadline = min(deadline, time.monotonic() + _OTHERS_S)
        if failures or len(results) < world_size:
            self.close()
        if failures:
            raise AssertionError("\n".join(f"rank {r} of {world_size}:\n{failures[r]}" for r in failures))
        if len(results) < world_size:
            raise TimeoutError(f"{function.__name__}: only ranks {sorted(results)} of {world_size} answered")
        return [results[rank] for rank in range(world_size)]

    @property
    def alive(self) -> bool:
        return all(process.poll() is None for process in self._processes)

    def close(self) -> None:
        for process, connection in zip(self._processes, self._connections, strict=True):
            connection.close()
            with suppress(ProcessLookupError):
                # a process that writes a checkpoint is in the same process group
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self._folder.cleanup()


def main(rank: int, address: str) -> None:
    os.setpgrp()
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    prepare_megatron(torch.device("cpu"))
    with Client(address) as pool, suppress(EOFError):
        while True:
            pool.send_bytes(_answer(rank, pool.recv_bytes()))


def _answer(rank: int, case: bytes) -> bytes:
    """Return the pickled result of a case, and the traceback if it failed."""
    try:
        port, number, world_size, function, args = pickle.loads(case)
        timeout = timedelta(seconds=_COLLECTIVE_S)
        # the kind of store that torchrun's ranks have
        store = dist.TCPStore("127.0.0.1", port, timeout=timeout, wait_for_workers=False)
        dist.init_process_group(
            "gloo",
            store=dist.PrefixStore(str(number), store),
            rank=rank,
            world_size=world_size,
            timeout=timeout,
        )
        result = function(*args)
        dist.barrier()
        return pickle.dumps((result, None))
    except BaseException:
        return pickle.dumps((None, traceback.format_exc()))
    finally:
        # A process group ends with its last reference.
        gc.collect()
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
