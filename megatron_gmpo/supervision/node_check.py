"""Check every node before training, so that a bad node is named instead of failing later."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch
import torch.distributed as dist

from .. import files
from ..config import SupervisionConfig
from ..distributed import agreed, all_gather_objects, barrier, broadcast_object, rank, world_size
from ..errors import NodeError
from .records import node_name

_GB = 1e9
_CLOCK_SKEW_S = 30.0
_FREE_GPU_SHARE = 0.8
_TOKEN_TIMEOUT_S = 60.0
"""Timeout for another node's file, which becomes visible with a delay on a network file system."""
_ALL_REDUCE_TIMEOUT_S = 300.0
"""Timeout of the all-reduce, including the setup of NCCL's connections in the first all-reduce."""
_POLL_S = 0.2


def check_nodes(
    cfg: SupervisionConfig,
    run_dir: Path,
    device: torch.device,
    *,
    shared_gpus: bool = False,
) -> None:
    """Check GPUs, memory, the shared run folder, clocks and an all-reduce. Collective.

    The check takes at most a minute on good nodes.

    Args:
        cfg: the supervision section with the limits.
        run_dir: run folder, which must be the same folder on all nodes.
        device: this rank's device.
        shared_gpus: whether rollout servers of the run may already use the GPUs.

    Raises:
        NodeError: a check failed. The line names the first bad node, the failed check, and the other bad
            nodes. Raised on every rank.
    """
    _raise_first(
        [*_gpus(device, shared_gpus), *_memory(cfg.min_free_memory_gb), *_run_dir(run_dir), *_clock()]
    )
    _raise_first([*_all_reduce(device)])  # last, because a bad node may never complete it


def _raise_first(problems: list[str]) -> None:
    """Raise the first problem of any rank on every rank, with the names of all bad nodes. Collective."""
    reports = all_gather_objects((node_name(), problems))
    found = list(dict.fromkeys((node, line) for node, lines in reports for line in lines))
    if found:
        node, line = found[0]
        others = sorted({name for name, _ in found} - {node})
        raise NodeError(node, line + (f" (and problems on {', '.join(others)})" if others else ""))


def _gpus(device: torch.device, shared: bool) -> Iterator[str]:
    if device.type != "cuda":
        return
    wanted = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    found = torch.cuda.device_count()
    if found < wanted:
        yield f"{found} GPUs are visible, {wanted} ranks run on the node"
    free, total = torch.cuda.mem_get_info(device)
    if not shared and free < _FREE_GPU_SHARE * total:
        amount = f"{free / _GB:.1f} GB free of {total / _GB:.1f} GB"
        yield f"GPU {device.index} has {amount}: another process uses it"


def _memory(wanted_gb: float) -> Iterator[str]:
    available = psutil.virtual_memory().available / _GB
    if available < wanted_gb:
        yield f"{available:.1f} GB of memory are available, supervision.min_free_memory_gb = {wanted_gb:g}"


def _run_dir(run_dir: Path) -> Iterator[str]:
    token = broadcast_object(secrets.token_hex(8))
    file = run_dir / ".node_check"
    with agreed():
        if rank() == 0:
            files.write(file, token)
    deadline = time.monotonic() + _TOKEN_TIMEOUT_S
    while not (seen := file.is_file() and file.read_text() == token) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    barrier()
    if not seen:
        yield (
            f"run_dir = {str(run_dir)!r} does not show the file that rank 0 wrote there: "
            "use a file system that all nodes share"
        )
    if rank() == 0:
        file.unlink()


def _clock() -> Iterator[str]:
    barrier()
    ahead = time.time() - broadcast_object(time.time())
    if abs(ahead) > _CLOCK_SKEW_S:
        direction = "ahead of" if ahead > 0 else "behind"
        yield f"its clock is {abs(ahead):.0f} s {direction} rank 0's: synchronize it"


def _all_reduce(device: torch.device) -> Iterator[str]:
    ones = torch.ones(2**20, device=device)
    work = dist.all_reduce(ones, async_op=True)
    assert work
    deadline = time.monotonic() + _ALL_REDUCE_TIMEOUT_S
    while not work.is_completed():
        if time.monotonic() > deadline:
            yield f"an all-reduce of {world_size()} ranks is not done after {_ALL_REDUCE_TIMEOUT_S:g} s"
            return
        time.sleep(0.01)
    work.wait()
    if not bool((ones == world_size()).all()):
        yield f"an all-reduce of {world_size()} ones gives {ones.min():g} to {ones.max():g}"
