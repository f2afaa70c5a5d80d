"""Read the next tensors in a thread while the caller writes the previous tensors."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Data = TypeVar("Data")

_AHEAD = 64 * 2**20  # bytes; a larger buffer is slower, because malloc reuses less memory


def read_ahead(
    items: Iterable[Item], read: Callable[[Item], Data], nbytes: Callable[[Item], int]
) -> Generator[tuple[Item, Data], None, None]:
    """Yield each item with the result of ``read(item)``, which a second thread computes in advance.

    Args:
        nbytes: size of the result of ``read``. At most 64 MiB, or a single item, are read in advance.

    Raises:
        Exception: the exception of ``read``, raised when its item would be yielded.
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
