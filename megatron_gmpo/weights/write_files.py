"""Write files from memory to a folder; the process that ``background_files`` starts.

Run: ``python -I write_files.py FOLDER PARENT NAME DESCRIPTOR NAME DESCRIPTOR ...``

Each descriptor is a file in memory. The last line of stdout is JSON: ``{"files": {NAME: [SIZE, CHECKSUM]}}``,
or ``{"errno": NUMBER, "path": PATH}``. This file is run as a script and imports nothing from the project, so
that the process starts in milliseconds and needs little memory.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys

import xxhash

_BLOCK_BYTES = 2**22
_FLUSHED_BYTES = 2**26
"""Bytes after which a file is flushed to the disk, so that few pages of it are in memory."""
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main(folder: str, parent: str, *files: str) -> None:
    """Write the files and print the result."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):  # it has already ended
        return
    os.nice(10)  # training goes on
    written: dict[str, tuple[int, str]] = {}
    path = folder
    try:
        for name, descriptor in zip(files[::2], files[1::2], strict=True):
            path = os.path.join(folder, name)
            written[name] = _write(int(descriptor), path)
    except OSError as error:
        print(json.dumps({"errno": error.errno, "path": path}))
    else:
        print(json.dumps({"files": written}))


def _write(source: int, path: str) -> tuple[int, str]:
    """Copy a file in memory to a new file, flush it, and return its size and checksum."""
    digest, block, size, flushed = xxhash.xxh3_64(), memoryview(bytearray(_BLOCK_BYTES)), 0, 0
    with open(path, "xb", buffering=0) as target:
        while count := os.preadv(source, [block], size):
            digest.update(block[:count])
            done = 0
            while done < count:
                done += target.write(block[done:count])
            size += count
            if size - flushed >= _FLUSHED_BYTES:
                os.fdatasync(target.fileno())
                os.posix_fadvise(target.fileno(), flushed, size - flushed, os.POSIX_FADV_DONTNEED)
                flushed = size
        os.fsync(target.fileno())
    return size, digest.hexdigest()


if __name__ == "__main__":
    main(*sys.argv[1:])
