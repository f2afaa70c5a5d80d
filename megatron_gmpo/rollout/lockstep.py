"""Play episodes so that the turns of all of them are decoded together."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TypeVar

from .episode import Generate
from .response import Context, Response

T = TypeVar("T")
Decode = Callable[[list[Context], list[int]], list[Response]]
"""Sample one turn for each of these contexts, with these maximum numbers of new tokens."""


async def in_lockstep(
    count: int, together: int, play: Callable[[int, Generate], Awaitable[T]], decode: Decode
) -> list[T]:
    """Play ``count`` episodes, ``together`` of them at a time, and return them in order.

    Turns are decoded when every live episode waits for one. So the turns of a batch do not depend on the time
    that environments take, and a resumed run samples what an uninterrupted run samples. A fast environment
    waits for the slowest one of its batch.

    Args:
        play: plays the episode of this number.
        decode: receives the turns ordered by length, then by the number of the episode. Its error ends all
            episodes.
    """
    numbers = iter(range(count))
    live = min(count, together)
    played: dict[int, T] = {}
    waiting: dict[int, tuple[Context, int, asyncio.Future[Response]]] = {}

    def decode_if_all_wait() -> None:
        if not waiting or len(waiting) < live:
            return
        order = sorted(waiting, key=lambda number: (len(waiting[number][0]), number))
        turns = [waiting.pop(number) for number in order]
        decoded = decode([context for context, *_ in turns], [limit for _, limit, _ in turns])
        for (*_, response), result in zip(turns, decoded, strict=True):
            response.set_result(result)

    async def generate(number: int, context: Context, limit: int) -> Response:
        response = asyncio.get_running_loop().create_future()
        waiting[number] = context, limit, response
        decode_if_all_wait()
        return await response

    async def play_next() -> None:
        nonlocal live
        for number in numbers:
            played[number] = await play(number, partial(generate, number))
        live -= 1
        decode_if_all_wait()

    players = [asyncio.create_task(play_next()) for _ in range(live)]
    try:
        await asyncio.gather(*players)
    finally:  # an error of one ends the others
        for player in players:
            player.cancel()
        await asyncio.gather(*players, return_exceptions=True)
    return [played[number] for number in range(count)]
