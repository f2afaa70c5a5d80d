"""The batches of prompts that the clients of all nodes sample together."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from math import ceil
from typing import Any, Generic, TypeVar

import torch.distributed as dist

from .prompt_queue import PromptQueue
from .watcher import Watcher

_POLL_S = 0.2
"""Interval at which the store is asked for returned prompts and for the end of a batch."""
_PAUSE_S = 0.02
"""Minimum interval between two draws, so that many short responses do not flood the store."""

T = TypeVar("T")
"""A finished sample of a batch: a response, or a whole episode."""

Sampled = dict[int, list[T]]
"""The samples of each prompt that this node has finished, by the prompt's position in its batch."""

Play = Callable[[int, int], Coroutine[Any, Any, T]]
"""Make the sample of this number of the prompt at this position. It starts anew on every call."""


@dataclass(eq=False)
class _Batch(Generic[T]):
    """A batch in progress.

    Attributes:
        n: number of samples of a prompt.
        held: tasks that sample the prompts that this node has drawn, by position.
        sampled: samples of the prompts that this node has finished.
        unreported: number of finished prompts that the queue does not know of yet.
        result: ``sampled``, once all prompts are finished on all nodes.
    """

    queue: PromptQueue
    n: int
    play: Play[T]
    report: Callable[[float], None]
    result: asyncio.Future[Sampled[T]]
    held: dict[int, asyncio.Task[list[T]]] = field(default_factory=dict)
    sampled: Sampled[T] = field(default_factory=dict)
    unreported: int = 0

    def fail(self, error: BaseException) -> None:
        if not self.result.done():
            self.result.set_exception(error)
        for samples in self.held.values():
            samples.cancel()


class Batches:
    """Draw prompts while this node's servers have room, and sample them. Older batches come first.

    A sample takes the room of one request from its start to its end, also while an episode is in its
    environment.

    A node holds at most its share of a batch at a time, by the number of its servers, so that the node that
    draws first leaves some to the others. It draws more as it finishes, so a slow node takes fewer. A node
    without a server in service gives its unfinished prompts back, unless all nodes are without. All methods
    run in the event loop's thread; the store is called in other threads.

    Args:
        watcher: the servers of this node.
        store: a connection to the run's store, for this object alone. ``in_service`` in it is the number of
            servers in service on all nodes. Every node calls ``announce`` before the first one draws.
    """

    def __init__(self, watcher: Watcher, store: dist.Store) -> None:
        self._watcher, self._store = watcher, store
        self._open: list[_Batch[Any]] = []
        self._samples: set[asyncio.Task[Any]] = set()  # that are not finished
        self._changed = asyncio.Event()
        self._announced = 0
        self._task = asyncio.create_task(self._run())

    def announce(self) -> int:
        """Add this node's servers in service to those of the other nodes; return the sum."""
        change = self._watcher.in_service - self._announced
        self._announced += change
        return self._store.add("in_service", change)

    async def sample(
        self, name: str, size: int, n: int, play: Play[T], report: Callable[[float], None]
    ) -> Sampled[T]:
        """Take part in a batch until all of its prompts are finished on all nodes.

        Args:
            name: name of the batch, equal on all nodes and used once.
            size: number of prompts.
            n: number of samples of a prompt.
            play: makes one sample. A prompt that this node gives back is started anew by another node.
            report: function that receives the share of the prompts that are finished on all nodes.

        Raises:
            InputError, ServerError: raised by ``play``.
        """
        result: asyncio.Future[Sampled[T]] = asyncio.get_running_loop().create_future()
        self._watcher.expect_answers()
        self._open.append(_Batch(PromptQueue(self._store, name, size), n, play, report, result))
        self._changed.set()
        return await result

    async def _run(self) -> None:
        """Serve the open batches; an error here, e.g. of the store, is the error of each of them."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(_POLL_S if self._open else None):
                    await self._changed.wait()
            self._changed.clear()
            try:
                await self._serve()
            except Exception as error:
                for batch in self._open:
                    batch.fail(error)
                self._open.clear()
            await asyncio.sleep(_PAUSE_S)

    async def _serve(self) -> None:
        everywhere = await asyncio.to_thread(self.announce)
        here = self._watcher.in_service
        for batch in list(self._open):
            if everywhere and not here:
                await self._give_back(batch)
            count = self._wanted(batch, here / everywhere if everywhere else 0)
            unreported, batch.unreported = batch.unreported, 0
            positions, finished = await asyncio.to_thread(_advance, batch.queue, unreported, count)
            for position in positions:
                self._start(batch, position)
            batch.report(batch.queue.finished / max(1, batch.queue.size))
            if finished and not batch.result.done():
                batch.result.set_result(batch.sampled)
            if batch.result.done():
                self._open.remove(batch)

    def _wanted(self, batch: _Batch[Any], share: float) -> int:
        """Return how many prompts to draw: what fits into the servers, up to this node's share."""
        if batch.result.done():
            return 0
        room = self._watcher.capacity - len(self._samples)
        of_share = ceil(batch.queue.size * share) - len(batch.held)
        return max(0, min(ceil(room / batch.n), of_share))

    def _start(self, batch: _Batch[T], position: int) -> None:
        samples = [asyncio.create_task(batch.play(position, number)) for number in range(batch.n)]
        self._samples.update(samples)
        for sample in samples:
            sample.add_done_callback(self._make_room)
        held = asyncio.create_task(_all(samples))
        batch.held[position] = held
        held.add_done_callback(partial(self._end, batch, position))

    def _make_room(self, sample: asyncio.Task[Any]) -> None:
        self._samples.discard(sample)
        self._changed.set()

    def _end(self, batch: _Batch[T], position: int, samples: asyncio.Task[list[T]]) -> None:
        if samples.cancelled():
            return
        del batch.held[position]
        if error := samples.exception():
            batch.fail(error)
        else:
            batch.sampled[position] = samples.result()
            batch.unreported += 1
        self._changed.set()

    async def _give_back(self, batch: _Batch[Any]) -> None:
        """Let other nodes sample what this node has not finished."""
        for samples in batch.held.values():
            samples.cancel()
        await asyncio.gather(*batch.held.values(), return_exceptions=True)
        positions = list(batch.held)
        batch.held.clear()
        if not batch.result.done():
            await asyncio.to_thread(batch.queue.give_back, positions)


async def _all(samples: list[asyncio.Task[T]]) -> list[T]:
    return await asyncio.gather(*samples)


def _advance(queue: PromptQueue, finished: int, count: int) -> tuple[list[int], bool]:
    return queue.draw(count), queue.finish(finished)
