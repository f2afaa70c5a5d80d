"""Exit codes, and errors that end a command with one line.

This module does not import torch, so that command lines can refuse bad input quickly.
"""

from __future__ import annotations

import errno
import os
from enum import IntEnum
from pathlib import Path


def printable(text: object) -> str:
    """Return ``text`` for a terminal, with control characters as escapes such as ``\\x1b``.

    Text of others (a server's reply, a file's name, a prompt) could otherwise move the cursor, hide a line or
    set the terminal's title. Marks that reverse the direction of text, and line breaks, are escaped too.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def one_line(error: BaseException) -> str:
    """Return the message of ``error`` on one line, or the name of its type if it has no message."""
    return " ".join(str(error).split()) or type(error).__name__


class Exit(IntEnum):
    """Exit codes of the commands, and the ``code`` of a run folder's ``outcome.json``."""

    DONE = 0
    """The command succeeded."""
    FAILED = 1
    """The command crashed, a figure was not finite, or rollout servers failed."""
    BAD_INPUT = 2
    """The user's input is wrong; the error line names the remedy."""
    COLLAPSED = 3
    """The policy collapsed."""
    REQUEUE = 85
    """A signal or the job's time limit stopped the run, which is saved. Start the same command again."""
    HUNG = 86
    """A rank hung; its stacks are in ``stacks/``."""
    BAD_NODE = 87
    """The node check failed; the error line names the node and the check."""
    INTERRUPTED = 130
    """SIGINT ended the command; nothing was saved. Shells give this code to commands that SIGINT kills."""


class RunError(Exception):
    """An error that ends a run with one line and the exit code ``exit``."""

    exit = Exit.FAILED


class InputError(RunError, ValueError):
    """The user's input is wrong. The line names the field, the value and the remedy."""

    exit = Exit.BAD_INPUT


class DiskFullError(InputError):
    """A file system is full, or a quota is used up. The line names the file system and the file, if known."""

    def __init__(self, path: str | Path | None, reason: str = os.strerror(errno.ENOSPC)) -> None:
        super().__init__(path, reason)  # pickle passes these arguments to the other ranks
        self.path, self.reason = Path(path).absolute() if path else None, reason

    def __str__(self) -> str:
        if self.path is None:
            return f"a file system is full ({self.reason}): free space, and start the same command again"
        disk = next(folder for folder in (self.path, *self.path.parents) if os.path.ismount(folder))
        return (
            f"the file system {disk} is full ({self.reason}), so {self.path} cannot be written: "
            "free space, and start the same command again"
        )


def disk_full(error: BaseException | None) -> DiskFullError | None:
    """Return the error to report if ``error`` is the ``OSError`` of a full file system, else None."""
    if not isinstance(error, OSError) or error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return None
    return DiskFullError(error.filename, os.strerror(error.errno))


class NonFiniteError(RunError, RuntimeError):
    """A loss, a gradient norm, a weight or logits are NaN or infinite."""


class ServerError(RunError, RuntimeError):
    """A rollout server cannot be started or reached. The line names the failed operation and the log."""


class CollapseError(RunError, RuntimeError):
    """The policy collapsed. ``collapse.action`` is ``stop``, or a rollback is not possible."""

    exit = Exit.COLLAPSED


class CollectiveError(RunError, RuntimeError):
    """A collective failed because a rank died or did not join it. The line names this rank's phase."""


class NodeError(RunError, RuntimeError):
    """A node failed the node check. The line names the node and the check. Raised on every rank."""

    exit = Exit.BAD_NODE

    def __init__(self, node: str, problem: str) -> None:
        super().__init__(node, problem)  # pickle passes these arguments to the other ranks
        self.node, self.problem = node, problem

    def __str__(self) -> str:
        return f"node {self.node}: {self.problem}"


class StopRequest(RunError):  # noqa: N818
    """The run was asked to stop and has saved everything. Raised on every rank."""

    exit = Exit.REQUEUE
