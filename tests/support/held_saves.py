"""Train; saves in the background write nothing before the file ``WRITE_AFTER`` exists.

Run: python -m tests.support.held_saves CONFIG.toml ...
"""

from __future__ import annotations

if __name__ == "__main__":
    from megatron_gmpo.supervision.signals import listen

    listen()

from collections.abc import Iterator
from contextlib import contextmanager

from megatron_gmpo.weights import write_files

from . import held_write


@contextmanager
def held() -> Iterator[None]:
    """Hold the processes that the block starts."""
    script, write_files.__file__ = write_files.__file__, held_write.__file__
    try:
        yield
    finally:
        write_files.__file__ = script


if __name__ == "__main__":
    from megatron_gmpo import train
    from megatron_gmpo.run import start_command

    with held():
        start_command(train.main)
