"""Every event in every state of a server, compared with the table in docs/rollouts.md."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_gmpo.rollout.sglang.server_state import TRANSITIONS, Lifecycle, ServerEvent, ServerState

DOCS = Path(__file__).parents[2] / "docs/rollouts.md"


def documented() -> dict[tuple[ServerEvent, ServerState], ServerState | None]:
    """Return the state that follows each pair, or None for an illegal pair.

    A cell contains a state, ``=`` (no change) or ``-`` (illegal).
    """
    rows = [
        [cell.strip().strip("`") for cell in line.strip("|\n").split("|")]
        for line in DOCS.read_text().splitlines()
        if line.startswith("| `") and line.split("`")[1] in ServerEvent.__members__
    ]
    header = next(line for line in DOCS.read_text().splitlines() if line.startswith("| event |"))
    states = [ServerState[cell.strip().strip("`")] for cell in header.strip("|").split("|")[1:]]
    table: dict[tuple[ServerEvent, ServerState], ServerState | None] = {}
    for name, *cells in rows:
        for state, cell in zip(states, cells, strict=True):
            following = {"-": None, "=": state}.get(cell, cell)
            table[ServerEvent[name], state] = (
                ServerState[following] if isinstance(following, str) else following
            )
    return table


TABLE = documented()


def test_the_docs_have_every_event_in_every_state() -> None:
    assert set(TABLE) == {(event, state) for event in ServerEvent for state in ServerState}
    assert sum(following is not None for following in TABLE.values()) == sum(map(len, TRANSITIONS.values()))


@pytest.mark.parametrize("event", ServerEvent, ids=lambda event: event.name)
@pytest.mark.parametrize("state", ServerState, ids=lambda state: state.name)
def test_transition(state: ServerState, event: ServerEvent) -> None:
    life = Lifecycle(state, losses=2)
    following = TABLE[event, state]
    if following is None:
        with pytest.raises(
            RuntimeError, match=f"illegal transition: event {event.name} in state {state.name}"
        ):
            life.apply(event)
        assert life == Lifecycle(state, losses=2)
        return
    life.apply(event)
    assert life.state is following
    lost = following is ServerState.LOST and state is not ServerState.LOST
    assert life.losses == (0 if event is ServerEvent.SYNC_SUCCEEDED else 3 if lost else 2)


def test_every_state_can_be_reached_and_only_given_up_is_final() -> None:
    for first in (ServerState.STARTING, ServerState.CHECKING):
        reached, fresh = {first}, {first}
        while fresh:
            fresh = {row[state] for row in TRANSITIONS.values() for state in fresh if state in row} - reached
            reached |= fresh
        assert reached | {ServerState.STARTING} == set(ServerState)
    final = {
        state for state in ServerState if all(row.get(state, state) is state for row in TRANSITIONS.values())
    }
    assert final == {ServerState.GIVEN_UP}


def test_requests_in_a_life_of_a_server() -> None:
    """Events from start to a second sync, which resets the losses.

    In between, a request fails, the process dies twice, and it is restarted.
    """
    life = Lifecycle(ServerState.STARTING)
    for event, state, losses in (
        (ServerEvent.NEW_VERSION, ServerState.STARTING, 0),
        (ServerEvent.FOUND_STALE, ServerState.STALE, 0),
        (ServerEvent.SYNC_STARTED, ServerState.SYNCING, 0),
        (ServerEvent.SYNC_SUCCEEDED, ServerState.READY, 0),
        (ServerEvent.REQUEST_FAILED, ServerState.CHECKING, 0),
        (ServerEvent.FOUND_CURRENT, ServerState.READY, 0),
        (ServerEvent.DIED, ServerState.LOST, 1),
        (ServerEvent.REQUEST_FAILED, ServerState.LOST, 1),
        (ServerEvent.RESTARTED, ServerState.CHECKING, 1),
        (ServerEvent.DIED, ServerState.LOST, 2),
        (ServerEvent.RESTARTED, ServerState.CHECKING, 2),
        (ServerEvent.FOUND_STALE, ServerState.STALE, 2),
        (ServerEvent.SYNC_STARTED, ServerState.SYNCING, 2),
        (ServerEvent.SYNC_SUCCEEDED, ServerState.READY, 0),
    ):
        life.apply(event)
        assert (life.state, life.losses) == (state, losses)
