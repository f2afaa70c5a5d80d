"""Files in memory that a process of its own writes to the disk while this process goes on."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..errors import RunError
from . import write_files


class BackgroundFiles:
    """New files of a folder. They are first written to memory, then copied by a process.

    The memory is that of anonymous files (memfd_create(2)), so it needs no room in /dev/shm, and a kill
    leaves nothing. After ``start`` only the process holds it. The process ends when this one ends.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._descriptors: dict[str, int] = {}
        self._process: subprocess.Popen[bytes] | None = None

    @contextmanager
    def open(self, path: Path) -> Iterator[io.BufferedWriter]:
        """Open a new file of the folder, in memory."""
        name = str(path.relative_to(self._folder))
        self._descriptors[name] = os.memfd_create(name)
        with os.fdopen(self._descriptors[name], "wb", closefd=False) as file:
            yield file

    @property
    def nbytes(self) -> int:
        """Return the bytes of the files in memory, before ``start``."""
        return sum(os.fstat(descriptor).st_size for descriptor in self._descriptors.values())

    def start(self) -> None:
        """Start the process. The folder, and the folders of the files, must exist."""
        files = [str(part) for item in self._descriptors.items() for part in item]
        command = [sys.executable, "-I", write_files.__file__, str(self._folder), str(os.getpid()), *files]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=tuple(self._descriptors.values()),
        )
        self.close()

    def ended(self, *, wait: bool) -> bool:
        """Return whether the process has ended.

        Args:
            wait: whether to wait for its end.
        """
        assert self._process
        if wait:
            self._process.wait()
        return self._process.poll() is not None

    def result(self) -> dict[str, tuple[int, str]]:
        """Return the sizes and checksums of the files. Call it after the process has ended.

        Raises:
            OSError: a file could not be written.
            RunError: the process was killed, or crashed.
        """
        assert self._process
        output, errors = self._process.communicate()
        answer: dict[str, Any] = {}
        with suppress(ValueError):
            answer = json.loads(output)
        if "files" in answer:
            return {name: (size, digest) for name, (size, digest) in answer["files"].items()}
        if "errno" in answer:
            raise OSError(answer["errno"], os.strerror(answer["errno"]), answer["path"])
        last = errors.decode(errors="replace").strip().rpartition("\n")[2]
        raise RunError(
            f"the process that writes {self._folder} ended with {self._process.returncode} {last}".strip()
        )

    def cancel(self) -> None:
        """Kill the process, if it runs, and release the memory."""
        if self._process:
            self._process.kill()
            self._process.wait()
        self.close()

    def close(self) -> None:
        """Release this process's hold on the memory."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()
