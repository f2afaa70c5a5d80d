"""A pool of processes that become gloo ranks: spawned once, used for many cases of many world sizes."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import queue
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

_CASE_S = 300
_COLLECTIVE_S = 120
_LOOK_S = 2  # how often a wait looks whether the other side still lives


class RankPool:
    """``run`` calls one function on several ranks at once and gives back what each returned.

    The function and its arguments are pickled: define it at the top of a module. A case that fails ends the pool, since its other ranks
    may wait in a collective for ever; ``alive`` then is False.
    """

    def __init__(self, size: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory(prefix="ranks")
        self._tasks = [context.Queue() for _ in range(size)]
        self._results = context.Queue()
        self._workers = [
            context.Process(target=_work, args=(rank, tasks, self._results), daemon=False)
            for rank, tasks in enumerate(self._tasks)
        ]  # daemons may have no children, and Megatron's checkpoint writer is one
        for worker in self._workers:
            worker.start()
        self._cases = 0

    def run(self, world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """The results in rank order. A rank's exception fails the case with its traceback."""
        assert world_size <= len(self._workers)
        self._cases += 1
        store = str(Path(self._folder.name) / f"store{self._cases}")
        # bytes: a queue would share each tensor through a file descriptor that lives as long as the tensor
        task = pickle.dumps((store, world_size, function, args))
        for tasks in self._tasks[:world_size]:
            tasks.put(task)
        results: dict[int, Any] = {}
        deadline = time.monotonic() + _CASE_S
        while len(results) < world_size:
            try:
                rank, result, failure = self._results.get(timeout=_LOOK_S)
            except queue.Empty:
                if self.alive and time.monotonic() < deadline:
                    continue
                self.close()
                raise TimeoutError(
                    f"{function.__name__}: of {world_size} ranks only {sorted(results)} answered"
                ) from None
            if failure:
                self.close()
                raise AssertionError(f"rank {rank} of {world_size}:\n{failure}")
            results[rank] = pickle.loads(result)
        return [results[rank] for rank in range(world_size)]

    @property
    def alive(self) -> bool:
        return all(worker.is_alive() for worker in self._workers)

    def close(self) -> None:
        for worker in self._workers:
            if worker.is_alive():
                with suppress(ProcessLookupError):  # it is so young that it has no group yet
                    os.killpg(
                        worker.pid, signal.SIGKILL
                    )  # with Megatron's checkpoint writer, which would outlive it
                worker.kill()
            worker.join()
        self._folder.cleanup()


def _work(rank: int, tasks: Any, results: Any) -> None:
    os.setpgrp()
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    import torch
    import torch.distributed as dist

    from megatron_gmpo.platform import prepare_megatron

    main: Any = sys.modules["__main__"]
    main.__spec__ = main.__file__ = (
        None  # what this process spawns, Megatron's checkpoint writer, need not import it
    )
    torch.set_num_threads(1)
    prepare_megatron(torch.device("cpu"))
    pool = multiprocessing.parent_process()
    assert pool is not None
    while pool.is_alive():
        try:
            task = tasks.get(timeout=_LOOK_S)
        except queue.Empty:
            continue
        try:
            store, world_size, function, args = pickle.loads(task)
            dist.init_process_group(
                "gloo",
                init_method=f"file://{store}",
                rank=rank,
                world_size=world_size,
                timeout=timedelta(seconds=_COLLECTIVE_S),
            )
            result = function(*args)
            dist.barrier()
            results.put((rank, pickle.dumps(result), None))
        except BaseException:
            results.put((rank, None, traceback.format_exc()))
        finally:
            gc.collect()  # a process group ends with its last reference
            if dist.is_initialized():
                dist.destroy_process_group()
