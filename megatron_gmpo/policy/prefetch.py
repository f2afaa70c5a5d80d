"""Pack microbatches and copy them to the device in a thread, ahead of their use."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from ..batch.columns import Microbatch


def prefetched(make: Callable[[int], Microbatch], count: int, device: torch.device) -> Iterator[Microbatch]:
    """Yield the microbatches ``make(0)`` to ``make(count - 1)`` on the device.

    While one is in use, a thread makes the next one. On a GPU the thread also copies it, from pinned memory
    and in a stream of its own.
    """
    move = _copy_stream(device) if device.type == "cuda" else None

    def work(place: int) -> Microbatch:
        return move.copy(make(place)) if move else make(place).to(device)

    with ThreadPoolExecutor(1, "microbatches") as thread:
        following = thread.submit(work, 0)
        for place in range(count):
            microbatch = following.result()
            if move:
                move.hand_over(microbatch)
            if place + 1 < count:
                following = thread.submit(work, place + 1)
            yield microbatch


class _CopyStream:
    """Copies to a GPU that overlap with the work of other streams. Not run on a GPU yet."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)

    def copy(self, microbatch: Microbatch) -> Microbatch:
        """Start the copy of a microbatch on the host. Run this in any thread."""
        with torch.cuda.stream(self._stream):  # makes its GPU the current one of this thread too
            return microbatch.mapped(torch.Tensor.pin_memory).to(self._device)

    def hand_over(self, microbatch: Microbatch) -> None:
        """Let the current stream use the copy once it is complete."""
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)

        def record(tensor: torch.Tensor) -> torch.Tensor:
            tensor.record_stream(current)
            return tensor

        # the allocator must not reuse the memory before the work in this stream is done
        microbatch.mapped(record)


@functools.cache  # the allocator keeps the freed memory of each stream apart
def _copy_stream(device: torch.device) -> _CopyStream:
    return _CopyStream(device)
