"""The common part of both conversion commands: processes, progress bar, table and verification."""

from __future__ import annotations

import ctypes
import platform
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from ..distributed import rank, world_size
from ..platform import start_process_group
from ..weights.conversion import Conversion

_M_MMAP_THRESHOLD = -3
"""Parameter of mallopt, from glibc's malloc.h."""
_TIMEOUT_S = 4 * 3600
"""Timeout of one collective. Ranks communicate only before and after their shares of the conversion."""


@contextmanager
def processes(*, alone: bool = False) -> Iterator[None]:
    """Join the process group that torchrun describes.

    Args:
        alone: form a group of one process.
    """
    _keep_freed_memory()
    # Megatron uses deprecated names of torch.distributed.checkpoint
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"megatron\.core|torch\.distributed")
    try:
        if alone:
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        else:
            start_process_group(torch.device("cpu"), _TIMEOUT_S)
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def run_conversion(
    opened: Callable[[], Conversion],
    target: Path,
    *,
    dry_run: bool,
    verify: bool,
    compare: Callable[[], str],
) -> None:
    """Open a conversion, then print its table or carry it out and print a summary.

    Args:
        opened: function that checks the source and returns the conversion.
        target: folder to write.
        compare: function that returns the line about logits. It runs on rank 0 only, after the other ranks
            are done.

    Raises:
        InputError: see ``HFToMegatron`` and ``MegatronToHF``.
    """
    with processes():
        conversion = opened()
        lines = list(conversion.lines()) if dry_run else []
        if not dry_run:
            with progress(conversion.nbytes) as advance:
                lines = [f"{target}: {conversion.convert(target, verify=verify, advance=advance)}"]
        first = rank() == 0
    if first:
        if verify and not dry_run:
            with processes(alone=True):
                print(compare())
        print(*lines, sep="\n")


@contextmanager
def progress(nbytes: int) -> Iterator[Callable[[int], None]]:
    """Show a progress bar over the bytes of this rank's share, on rank 0 and only in a terminal."""
    console = Console(stderr=True)
    columns = [
        TextColumn("converting"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    ]
    with Progress(*columns, console=console, disable=rank() > 0 or not console.is_terminal) as bar:
        task = bar.add_task("converting", total=nbytes / world_size())
        yield lambda done: bar.advance(task, done)


def _keep_freed_memory() -> None:
    """Make malloc reuse the memory of a large tensor for the next large tensor.

    By default each large tensor gets new pages, and mapping them takes longer than reading the tensor.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 2**30)
