"""Tools for tests, which configs name as ``module:function``."""

from __future__ import annotations

import os
import sys
import time


def add(a: int, b: int) -> int:
    """Add two whole numbers.

    Args:
        a: The first number.
        b: The second number.
    """
    return a + b


def lookup(word: str, *, table: dict[str, str], default: str = "unknown") -> dict[str, str]:
    """Look a word up.

    Args:
        word: The word.
        table: All words.
        default: The result for other words.
    """
    return {word: table.get(word, default)}


async def later(seconds: float) -> str:
    """Wait.

    Args:
        seconds: How long.
    """
    time.sleep(seconds)
    return f"{seconds} s later in {os.getpid()}"


def fails() -> str:
    """Fail in every call."""
    raise OSError("no\nnetwork")


def leaves() -> None:
    """End the process."""
    sys.exit(1)


def long(size: int) -> str:
    """Return a long text.

    Args:
        size: Its number of characters.
    """
    return "é" * size


def no_text() -> str:
    """Return what no tokenizer encodes."""
    return "\ud83d"


def no_hints(a, b):  # pyright: ignore
    """Add.

    Args:
        a: One.
        b: Two.
    """
    return a + b


def no_docstring(a: int) -> int:
    return a
