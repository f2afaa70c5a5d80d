"""Policies on this machine's GPU, one after the other.

A test is skipped, with a reason, if there is no GPU or if a setting lacks a requirement.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_gmpo.batch.columns import TrainBatch
from megatron_gmpo.config import Config
from megatron_gmpo.errors import InputError
from megatron_gmpo.models.description import describe_model
from megatron_gmpo.platform import choose_device, start_process_group
from megatron_gmpo.platform.capabilities import capabilities_of
from megatron_gmpo.policy.build import check_optimizer
from megatron_gmpo.policy.fp8 import check_fp8
from megatron_gmpo.policy.parallel import start_model_parallel, stop_model_parallel
from megatron_gmpo.policy.policy import Policy

Open = Callable[..., AbstractContextManager[Policy]]

LENGTHS, PROMPT = [64, 33, 80], 5


@pytest.fixture(scope="session", autouse=True)
def process_group() -> Iterator[None]:
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    start_process_group(choose_device("cuda"), 120)
    yield
    dist.destroy_process_group()


@pytest.fixture
def policy_of(tiny_model: Callable[..., Path]) -> Open:
    """Return a context manager that opens the bf16 policy of a tiny model and frees its memory at the end.

    Usage: ``with policy_of(family, **sections of the config) as policy``.
    """

    @contextmanager
    def opened(family: str, *, transformer_engine: bool = True, **sections: Any) -> Iterator[Policy]:
        device = choose_device("cuda")
        model = {"path": str(tiny_model(family)), "dtype": "bf16"} | sections.pop("model", {})
        cfg = Config.model_validate({"device": "cuda", "model": model, **sections})
        try:
            description = describe_model(cfg, 1, device)
            check_fp8(cfg, description.transformer, capabilities_of(device))
            check_optimizer(cfg.optimizer, capabilities_of(device))
        except InputError as missing:
            pytest.skip(str(missing))
        if description.use_transformer_engine != transformer_engine:
            pytest.skip("needs Transformer Engine")
        groups = start_model_parallel(cfg.parallel, cfg.seed, cfg.distributed_timeout_s)
        try:
            yield Policy(cfg, description, groups, device)
        finally:
            stop_model_parallel()
            gc.collect()
            torch.cuda.empty_cache()

    return opened


@pytest.fixture
def batch() -> TrainBatch:
    """Return three sequences whose experts receive different numbers of tokens."""
    return make_batch(LENGTHS)


def make_batch(lengths: list[int]) -> TrainBatch:
    tokens = torch.randint(3, 16, (sum(lengths),), generator=torch.Generator().manual_seed(0))
    mask = torch.cat([torch.arange(length) >= min(PROMPT, length - 1) for length in lengths])
    advantages = torch.tensor([1.0, -1.0, 0.5])[: len(lengths)]
    return TrainBatch(tokens, torch.tensor(lengths), mask, advantages, torch.zeros(len(tokens)))
