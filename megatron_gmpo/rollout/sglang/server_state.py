"""The states of one SGLang server and the table of their transitions. No I/O and no clock."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class ServerState(Enum):
    """State of a server. Only ``READY`` servers receive requests."""

    STARTING = "starting"
    """The first start of a server that the run starts. It has not answered yet, and syncs wait for it."""
    CHECKING = "checking"
    """Restarted, or a request failed. It is unknown whether the server answers, and which weights it has."""
    SILENT = "silent"
    """A request timed out. The server must generate a token, because its HTTP front may answer while its
    scheduler hangs."""
    STALE = "stale"
    """The server answers and needs the current weights."""
    SYNCING = "syncing"
    """The server takes part in the weight sync in progress."""
    READY = "ready"
    """The server answers and has the current weights."""
    LOST = "lost"
    """The process ended or hung, or a weight sync failed. The watcher restarts it if the run started it."""
    GIVEN_UP = "given up"
    """The server was lost too often, or failed at its first start. This state is final."""


class ServerEvent(Enum):
    """An observation of the sampler, the watcher or a weight sync."""

    FOUND_CURRENT = "found with the current weights"
    FOUND_STALE = "found with other weights"
    GENERATED = "generated a token after a silence"
    REQUEST_FAILED = "request failed, or was answered from old weights"
    REQUEST_TIMED_OUT = "request timed out"
    NEW_VERSION = "the trainer has new weights"
    SYNC_STARTED = "sync started"
    SYNC_SUCCEEDED = "sync succeeded"
    SYNC_FAILED = "sync failed"
    UNREACHABLE = "external server unreachable for hang_timeout_s"
    DIED = "process of our own ended, hung or did not restart"
    RESTARTED = "restarted"
    GAVE_UP = "gave up"


S, E = ServerState, ServerEvent


def _unchanged(*states: ServerState) -> dict[ServerState, ServerState]:
    return {state: state for state in states}


TRANSITIONS: dict[ServerEvent, dict[ServerState, ServerState]] = {
    E.FOUND_CURRENT: {S.STARTING: S.READY, S.CHECKING: S.READY} | _unchanged(S.STALE, S.SYNCING, S.READY),
    E.FOUND_STALE: {S.STARTING: S.STALE, S.CHECKING: S.STALE} | _unchanged(S.STALE, S.SYNCING, S.READY),
    E.GENERATED: {S.SILENT: S.CHECKING},
    E.REQUEST_FAILED: {S.READY: S.CHECKING}
    | _unchanged(S.CHECKING, S.SILENT, S.STALE, S.SYNCING, S.LOST, S.GIVEN_UP),
    # a sync uses the scheduler, so it fails on a server that hangs
    E.REQUEST_TIMED_OUT: {S.READY: S.SILENT, S.CHECKING: S.SILENT, S.STALE: S.SILENT}
    | _unchanged(S.SILENT, S.SYNCING, S.LOST, S.GIVEN_UP),
    E.NEW_VERSION: {S.READY: S.STALE, S.SYNCING: S.STALE}
    | _unchanged(S.STARTING, S.CHECKING, S.SILENT, S.STALE, S.LOST, S.GIVEN_UP),
    E.SYNC_STARTED: {S.STALE: S.SYNCING} | _unchanged(S.SYNCING),
    E.SYNC_SUCCEEDED: {S.SYNCING: S.READY},
    E.SYNC_FAILED: {S.SYNCING: S.LOST},
    # a SYNCING server may have missed a part of the sync
    E.UNREACHABLE: {S.READY: S.CHECKING, S.STALE: S.CHECKING, S.SYNCING: S.LOST}
    | _unchanged(S.CHECKING, S.SILENT),
    E.DIED: dict.fromkeys((S.STARTING, S.CHECKING, S.SILENT, S.STALE, S.SYNCING, S.READY), S.LOST),
    E.RESTARTED: {S.LOST: S.CHECKING},
    E.GAVE_UP: {S.STARTING: S.GIVEN_UP, S.LOST: S.GIVEN_UP},
}
"""Event -> state -> next state. A missing pair is a bug in the client."""


@dataclass
class Lifecycle:
    """The state of one server and the number of its losses.

    Attributes:
        losses: consecutive losses; a successful weight sync resets the count.
    """

    state: ServerState
    losses: int = 0

    def apply(self, event: ServerEvent) -> None:
        """Move to the state that follows ``event``.

        Raises:
            RuntimeError: the table has no such transition.
        """
        before = self.state
        if before not in TRANSITIONS[event]:
            raise RuntimeError(f"illegal transition: event {event.name} in state {before.name}")
        self.state = TRANSITIONS[event][before]
        if event is ServerEvent.SYNC_SUCCEEDED:
            self.losses = 0
        elif self.state is ServerState.LOST and before is not ServerState.LOST:
            self.losses += 1
