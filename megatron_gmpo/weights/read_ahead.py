"""Reading the next tensors while the ones before are being written."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Data = TypeVar("Data")

_AHEAD = 64 * 2**20  # bytes; more is slower, since memory that was used before is at hand


def read_ahead(
    items: Iterable[Item], read: Callable[[Item], Data], nbytes: Callable[[Item], int]
) -> Generator[tuple[Item, Data], None, None]:
    """Yields each item with what ``read`` makes of it; a second thread reads on while the caller works.

    Args:
        nbytes: size of what ``read`` gives. At most 64 MiB, or a single item, are read before the caller asks.

    Raises:
        Exception: what ``read`` raises, when the item's turn comes.
    """
    waiting: deque[tuple[Item, Future[Data]]] = deque()
    ahead = 0
    reader = ThreadPoolExecutor(1)
    try:
        for item in items:
            while waiting and ahead + nbytes(item) > _AHEAD:
                done, data = waiting.popleft()
                ahead -= nbytes(done)
                yield done, data.result()
            waiting.append((item, reader.submit(read, item)))
            ahead += nbytes(item)
        while waiting:
            done, data = waiting.popleft()
            yield done, data.result()
    finally:
        reader.shutdown(cancel_futures=True)
