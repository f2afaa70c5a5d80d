"""Ranks shared by every distributed test of a session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .ranks import RankPool


@pytest.fixture(scope="session")
def _pools() -> Iterator[list[RankPool]]:
    pools: list[RankPool] = []
    yield pools
    for pool in pools:
        pool.close()


@pytest.fixture
def ranks(_pools: list[RankPool]) -> RankPool:
    """Four processes to run cases on; a failed case ends them and the next test gets new ones."""
    if not (_pools and _pools[-1].alive):
        _pools.append(RankPool(4))
    return _pools[-1]
