"""A file system of a few pages or megabytes, which fills up as a real disk does."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """Mount a tmpfs of ``size``, such as ``9m``, on a new or existing folder for the block.

    The test is skipped if this process may not mount.
    """
    folder.mkdir(parents=True, exist_ok=True)
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True, text=True
    )
    if mount.returncode:
        pytest.skip(f"a full disk needs a tmpfs, which cannot be mounted: {mount.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@contextmanager
def unwritable(folder: Path) -> Iterator[Path]:
    """Make a new folder that cannot be written during the block.

    Its mode forbids it. Root ignores modes, so for root the folder is a file system that is read-only.
    """
    if os.geteuid():
        folder.mkdir(mode=0o500)
        yield folder
        folder.chmod(0o700)
        return
    with small_disk(folder, "64k"):
        subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
        yield folder


def fill(folder: Path) -> None:
    """Write a file until the file system is full."""
    with suppress(OSError), (folder / "ballast").open("ab", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
