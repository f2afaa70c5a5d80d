"""The float64 references, computed once for all tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from .test_layouts import Reference


@pytest.fixture(scope="session")
def expected(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return Reference(tiny_model, tmp_path_factory)
