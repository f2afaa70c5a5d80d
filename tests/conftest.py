"""Fixtures for all tests: tiny models of every family and a pool of processes that serve as gloo ranks.

This module also turns off the Hugging Face hub and torch's compiler, and limits torch to one thread.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read by huggingface_hub when it is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

from megatron_gmpo.testing import AnyFamily
from megatron_gmpo.testing.tiny_models import make_tiny_model
from megatron_gmpo.testing.tiny_tokenizers import text_tokenizer

from .support.orphans import mark_this_run
from .support.ranks import RankPool

torch.set_num_threads(1)
if not torch.cuda.is_available():
    # runs on a CPU do not use torch's compiler (platform/cpu.py), and ranks start faster without its import
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
# A loaded machine must not fail a test. Every run draws the same inputs, except make fuzz.
UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("tests", UNHURRIED, derandomize=True)
settings.register_profile("fuzz", UNHURRIED, max_examples=10_000, print_blob=True)
settings.load_profile("tests")


def pytest_configure() -> None:
    mark_this_run()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return ``make(family, **options of make_tiny_model)``; equal calls return the same model folder.

    Norm weights and biases are random unless the options say otherwise, so that a mistake in their names
    changes the logits.
    """
    made: dict[tuple[Any, ...], Path] = {}

    def make(family: AnyFamily = "qwen3_moe", **options: Any) -> Path:
        key = (family, *sorted(options.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp(family)
            make_tiny_model(made[key], family=family, **{"randomize_norms": True} | options)
        return made[key]

    return make


@pytest.fixture(scope="session")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tiny Qwen3 with a chat template and a byte-level tokenizer without merges.

    Most tensor parallel sizes do not divide its vocabulary of 259 (7 x 37).
    """
    out = tmp_path_factory.mktemp("text")
    make_tiny_model(out, family="qwen3", tokenizer=text_tokenizer(), randomize_norms=True)
    return out


@pytest.fixture(scope="session")
def _pools() -> Iterator[list[RankPool]]:
    pools: list[RankPool] = []
    yield pools
    for pool in pools:
        pool.close()


@pytest.fixture
def ranks(_pools: list[RankPool]) -> RankPool:
    """Return four processes to run cases on; after a failed case the next test gets new ones."""
    if not (_pools and _pools[-1].alive):
        _pools.append(RankPool(4))
    return _pools[-1]
