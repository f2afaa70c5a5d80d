"""Episodes in lockstep: what is decoded together does not depend on the time that environments take."""

from __future__ import annotations

import asyncio
import random

import numpy as np
import pytest

from megatron_gmpo.rollout.episode import Generate
from megatron_gmpo.rollout.lockstep import in_lockstep
from megatron_gmpo.rollout.response import Context, Response

TURNS = [3, 1, 4, 1, 5, 0, 2, 6]
"""Number of turns of each episode."""


def played(together: int, seed: int) -> tuple[list[list[int]], list[list[tuple[int, int]]]]:
    """Return the tokens of every episode, and (first token, length) of the contexts decoded together.

    Episode ``e`` starts with the context [e]. A turn appends the number of its batch. ``seed`` determines how
    long each environment takes.
    """
    batches: list[list[tuple[int, int]]] = []
    hurry = random.Random(seed)

    def decode(contexts: list[Context], limits: list[int]) -> list[Response]:
        batches.append([(int(context.tokens[0]), len(context)) for context in contexts])
        assert limits == [100 + len(context) for context in contexts]
        return [Response(np.array([len(batches)], np.int32)) for _ in contexts]

    async def play(episode: int, generate: Generate) -> list[int]:
        tokens = [episode]
        for _ in range(TURNS[episode]):
            await asyncio.sleep(hurry.choice([0, 0.002]))
            response = await generate(Context(tokens), 100 + len(tokens))
            tokens += response.tokens.tolist()
        return tokens

    return asyncio.run(in_lockstep(len(TURNS), together, play, decode)), batches


@pytest.mark.parametrize("together", [1, 3, 20])
def test_batches_do_not_depend_on_how_long_environments_take(together: int) -> None:
    episodes, batches = played(together, seed=0)
    assert [len(tokens) - 1 for tokens in episodes] == TURNS
    assert [tokens[0] for tokens in episodes] == list(range(len(TURNS)))  # in order
    for batch in batches:
        assert [(length, episode) for episode, length in batch] == sorted((n, e) for e, n in batch)
    # an episode of no turns ends at once and gives its place to the next one
    live = [sum(n > 0 for n in TURNS), together]
    assert len(batches[0]) == min(live)
    assert len(batches) >= max(TURNS)
    if together == 20:
        assert [len(batch) for batch in batches] == [7, 5, 4, 3, 2, 1]
    for seed in range(1, 6):
        assert played(together, seed) == (episodes, batches)


def test_an_error_ends_all_episodes() -> None:
    ended: list[int] = []

    def decode(contexts: list[Context], limits: list[int]) -> list[Response]:
        raise ArithmeticError("not finite")

    async def play(episode: int, generate: Generate) -> None:
        try:
            await generate(Context([episode]), 1)
        finally:
            ended.append(episode)

    with pytest.raises(ArithmeticError, match="not finite"):
        asyncio.run(in_lockstep(5, 3, play, decode))
    assert sorted(ended) == [0, 1, 2]
