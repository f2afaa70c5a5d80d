"""Read a file of lines that another process appends to or replaces, without holding the file in memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

MAX_LINE = 16 * 2**20
"""Number of bytes above which a line is left out."""


class GrowingLines:
    """The complete lines of a file, each returned once with its byte offset.

    Attributes:
        left_out: number of lines longer than ``MAX_LINE``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.left_out = 0
        self._inode, self._end = 0, 0

    def replaced(self) -> bool:
        """Return whether the file is another one than at the last read, or was cut; then start from 0."""
        try:
            now = self.path.stat()
        except OSError:
            now = None
        if now and now.st_ino == self._inode and now.st_size >= self._end:
            return False
        had_lines = self._end > 0
        self._inode, self._end, self.left_out = now.st_ino if now else 0, 0, 0
        return had_lines

    def new(self) -> Iterator[tuple[int, bytes]]:
        """Yield (offset, line) of the lines that were completed since the last call; none without a file."""
        try:
            file = self.path.open("rb")
        except OSError:
            return
        with file:
            file.seek(self._end)
            while line := file.readline(MAX_LINE):
                offset, complete = self._end, line.endswith(b"\n")
                if not complete and len(line) == MAX_LINE:
                    while (rest := file.readline(MAX_LINE)) and not rest.endswith(b"\n"):
                        pass
                    if not rest:
                        return
                    self.left_out += 1
                elif complete:
                    yield offset, line
                else:
                    return  # still being written
                self._end = file.tell()
