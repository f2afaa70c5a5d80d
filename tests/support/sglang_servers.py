"""Fixtures and functions for tests on real SGLang servers.

Run as a module, this is a trainer that starts two servers and waits to be killed.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch

from megatron_gmpo.config import SGLangConfig
from megatron_gmpo.rollout.sglang.processes import LocalServers
from megatron_gmpo.rollout.sglang.servers import Server

from .commands import ROOT

PYTHON = ROOT / ".venv-sglang/bin/python"
CPU = torch.device("cpu")
LONG = 1000
"""Tokens of a response that takes seconds, so that a sync on a loaded machine starts before its end."""

needs_sglang = pytest.mark.skipif(not PYTHON.exists(), reason="no .venv-sglang: run make sglang")


@contextmanager
def local_servers(
    model: Path | str,
    log_dir: Path,
    num_servers: int = 1,
    dtype: str = "fp32",
    device: torch.device = CPU,
    **settings: Any,
) -> Iterator[LocalServers]:
    """Yield servers that have not been started and stop them at the end.

    ``settings`` are fields of SGLangConfig.
    """
    cfg = SGLangConfig(
        **{"python": str(PYTHON), "start_timeout_s": 300.0, "health_interval_s": 20.0} | settings
    )
    servers = LocalServers(str(model), num_servers, cfg, log_dir, dtype=dtype, seed=1, device=device)
    try:
        yield servers
    finally:
        servers.stop()


def generate(
    server: Server, input_ids: list[int], *, headers: dict[str, str] | None = None, **sampling: Any
) -> httpx.Response:
    body = {
        "input_ids": input_ids,
        "sampling_params": {"temperature": 0, "ignore_eos": True} | sampling,
        "return_logprob": True,
    }
    return httpx.post(
        f"{server.url}/generate",
        json=body,
        headers=server.headers if headers is None else headers,
        timeout=120,
    )


def process_group(servers: LocalServers, index: int = 0) -> int:
    """Return the process group of a server; its leader is the only child of the server's watcher process."""
    watcher = psutil.Process(servers._processes[index].pid)
    while not (children := watcher.children()):
        time.sleep(0.01)
    return children[0].pid


def folder_of(group: int) -> Path:
    """Return the folder of a server's temporary files, in which its leader holds a lock."""
    (lock,) = [Path(file.path) for file in psutil.Process(group).open_files() if file.path.endswith("/lock")]
    return lock.parent


def files_of(folder: Path) -> list[Path]:
    """Return the files of a server: its folder, what is in it, and its shared memory."""
    return [*Path("/dev/shm").glob(f"*{folder.name}*"), *folder.parent.glob(folder.name), *folder.glob("*")]


def members(group: int) -> list[psutil.Process]:
    """Return the processes of a group that are neither dead nor zombies."""
    alive = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                alive.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return alive


def wait_until_gone(group: int, timeout_s: float = 20.0) -> list[psutil.Process]:
    """Wait until a group has no processes; return those that are left after the timeout."""
    deadline = time.monotonic() + timeout_s
    while (left := members(group)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def wait_for(holds: Callable[[], bool], timeout_s: float = 120.0) -> None:
    """Wait until ``holds()`` is true; fail after the timeout."""
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s"
        time.sleep(0.1)


def main(log_dir: Path) -> None:
    """Print the process groups of two servers and the process id of a fork of this process, then sleep."""
    with local_servers("no model", log_dir, num_servers=2) as servers:
        servers.start()
        groups = [process_group(servers, i) for i in range(2)]
        if fork := os.fork():
            print(json.dumps({"servers": groups, "fork": fork}), flush=True)
        time.sleep(600)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
