"""What ends a command: exit codes, and errors that are one line. Imports nothing: command lines refuse bad input before torch is loaded."""

from __future__ import annotations

from enum import IntEnum


class Exit(IntEnum):
    """Exit codes of the commands, and the ``code`` of a run folder's ``outcome.json``."""

    DONE = 0
    """Everything was done."""
    FAILED = 1
    """A crash, figures that are not finite, a rollout server that was lost."""
    BAD_INPUT = 2
    """The line says what to correct."""
    COLLAPSED = 3
    """The policy collapsed."""
    REQUEUE = 85
    """Stopped by a signal or a job's time limit, with everything saved: start the same command again."""
    HUNG = 86
    """A rank did not move; its stacks are in ``stacks/``."""
    BAD_NODE = 87
    """The node check failed; the line names the node and the check."""


class RunError(Exception):
    """What ends a run with one line, and the exit code ``exit``."""

    exit = Exit.FAILED


class InputError(RunError, ValueError):
    """Bad input from the user: one line that names the field, the value and the remedy."""

    exit = Exit.BAD_INPUT


class NonFiniteError(RunError, RuntimeError):
    """A loss, a gradient norm or logits that are NaN or infinite; the weights are no longer to be trusted."""


class ServerError(RunError, RuntimeError):
    """A rollout server that cannot be started or reached: one line that says what was waited for and where its log is."""


class CollapseError(RunError, RuntimeError):
    """The policy collapsed and ``collapse.action`` says, or is left with nothing but, to stop."""

    exit = Exit.COLLAPSED


class CollectiveError(RunError, RuntimeError):
    """A collective that gave up, because a rank died or did not come: one line that says where this rank was."""


class NodeError(RunError, RuntimeError):
    """A node that is not fit to train on: one line that names the node and the check. Raised on every rank."""

    exit = Exit.BAD_NODE

    def __init__(self, node: str, problem: str) -> None:
        super().__init__(node, problem)  # unchanged arguments: they are what pickle passes to the other ranks
        self.node, self.problem = node, problem

    def __str__(self) -> str:
        return f"node {self.node}: {self.problem}"


class StopRequest(RunError):  # noqa: N818
    """The run was asked to stop and has saved everything. Raised on every rank."""

    exit = Exit.REQUEUE
