"""Write files and folders atomically: readers see the old or the complete new content, also after a kill.

New content is written under a name that begins with ``.partial_``, flushed to the disk, and renamed. A kill
may leave such a partial file or folder. This module does not import torch, because commands that must start
fast use it.
"""

from __future__ import annotations

import os
import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import InputError


def write(path: Path, content: str | bytes, *, durable: bool = True) -> None:
    """Write a file, replacing an existing one. If several processes write it, the last rename wins.

    Args:
        durable: flush to the disk, so that the file survives a power failure. It is unnecessary for files
            that are rewritten every few seconds.
    """
    aside = _write_aside(path, content, durable)
    aside.rename(path)
    if durable:
        _flush(path.parent)


def write_new(path: Path, content: str | bytes) -> bool:
    """Write a file unless it exists, and return whether it was written.

    If several processes call this at the same time, one of them succeeds.
    """
    aside = _write_aside(path, content, durable=True)
    try:
        os.link(aside, path)
    except FileExistsError:
        return False
    finally:
        aside.unlink()
    _flush(path.parent)
    return True


def append_line(path: Path, line: str) -> None:
    """Append a line to a file, on a new line if the file ends with an unfinished one, as after a kill."""
    with named(path), path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            line = line if file.read() == b"\n" else "\n" + line
        file.write(line.encode() + b"\n")


def sync(path: Path) -> None:
    """Flush a file to the disk, so that its content survives a power failure. It may be missing."""
    if path.exists():
        _flush(path)


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Let an ``OSError`` of the block that names no file, as those of write() and fsync(), name ``path``."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


@contextmanager
def written_aside(final: Path) -> Iterator[Path]:
    """Yield a free path to write a file or a folder to; after the block, flush it and rename it to ``final``.

    A file replaces an existing ``final``; a folder replaces only an empty folder. An error in the block
    removes the new file or folder.
    """
    partial = partial_path(final)
    clear(partial)
    try:
        with named(final):
            yield partial
        publish(partial, final)
    except BaseException:
        clear(partial)
        raise


def remove(folder: Path, *, background: bool = False) -> None:
    """Remove a folder. It is renamed first, so that a kill leaves no incomplete folder under its name.

    Args:
        background: return after the renaming. A thread removes the rest; the end of the process waits for it.
    """
    removed = folder.with_name(f".partial_{folder.name}.removed")
    clear(removed)
    folder.rename(removed)
    if background:
        threading.Thread(target=clear, args=(removed,)).start()
    else:
        shutil.rmtree(removed)


def partial_path(final: Path) -> Path:
    """Return the path to which ``final`` is written before it is renamed."""
    return final.with_name(f".partial_{final.name}")


def publish(partial: Path, final: Path) -> None:
    """Flush a file, or a folder with everything in it, to the disk and rename it to ``final``."""
    flush(partial)
    rename(partial, final)


def flush(path: Path) -> None:
    """Flush a file, or a folder with everything in it, to the disk."""
    for item in [path, *path.rglob("*")]:
        _flush(item)


def rename(partial: Path, final: Path) -> None:
    """Rename what was flushed to ``final``, and flush the new name to the disk."""
    partial.rename(final)
    _flush(final.parent)


def clear(partial: Path) -> None:
    """Remove an incomplete file or folder if it exists."""
    if partial.is_dir():
        shutil.rmtree(partial, ignore_errors=True)
    elif partial.exists():
        partial.unlink()


def check_room(final: Path, nbytes: int) -> None:
    """Check that the disk of ``final``, which may be missing, has ``nbytes`` free.

    Raises:
        InputError: the disk has less free space.
    """
    existing = next(folder for folder in final.absolute().parents if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < nbytes:
        raise InputError(
            f"{str(final)!r} needs {nbytes / 1e9:.2f} GB and its disk has {free / 1e9:.2f} GB free: "
            "choose another disk"
        )


@contextmanager
def writable(name: str, remedy: str) -> Iterator[None]:
    """Report an ``OSError`` of the block in one line.

    Args:
        name: field and value of the path, such as ``weight_sync.folder = '/data'``.
        remedy: remedy for the error line.

    Raises:
        InputError: the block raised an ``OSError``.
    """
    try:
        yield
    except OSError as error:
        raise InputError(f"{name} cannot be written ({error.strerror or error}): {remedy}") from None


def _write_aside(path: Path, content: str | bytes, durable: bool) -> Path:
    writer = f"{socket.gethostname()}.{os.getpid()}.{threading.get_ident()}"
    aside = path.with_name(f".partial_{path.name}.{writer}")
    try:
        with named(path):
            aside.write_bytes(content.encode() if isinstance(content, str) else content)
            if durable:
                _flush(aside)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    return aside


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with named(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
