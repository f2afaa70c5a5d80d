"""What the ranks of a layout test run: the real policy on replayed rollouts. Imported by the worker processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_gmpo.algorithms.objective import make_objective
from megatron_gmpo.checkpoint import native
from megatron_gmpo.config import Config
from megatron_gmpo.distributed import rank, world_size
from megatron_gmpo.metrics.logger import value_of
from megatron_gmpo.models.config import describe_model
from megatron_gmpo.policy.parallel import start_model_parallel, stop_model_parallel
from megatron_gmpo.policy.policy import Policy
from megatron_gmpo.types import InputError, NonFiniteError, TrainBatch

CPU = torch.device("cpu")


@contextmanager
def opened(cfg: Config) -> Iterator[Policy]:
    description = describe_model(cfg, world_size(), CPU)
    groups = start_model_parallel(cfg.parallel, CPU, cfg.seed)
    try:
        yield Policy(cfg, description, groups, CPU)
    finally:
        stop_model_parallel()


def train(cfg: Config, batch: TrainBatch, steps: int) -> dict[str, Any]:
    """``steps`` optimizer steps on one batch: logprobs before, metrics of each step, and the weights after."""
    with opened(cfg) as policy:
        logprobs = policy.logprobs(batch)
        if cfg.algorithm.kl_coef:
            batch.ref_logprobs = policy.reference_logprobs(batch)
        history = _steps(policy, batch, steps)
        return {"logprobs": logprobs, "history": history, "weights": weights_on_rank_0(policy)}


def _steps(policy: Policy, batch: TrainBatch, steps: int) -> list[dict[str, float]]:
    objective = make_objective(policy.cfg.algorithm, is_moe=policy.description.is_moe, max_new_tokens=64)
    return [
        {name: value_of(metric) for name, metric in policy.train_step(batch, objective).items()} for _ in range(steps)
    ]


def weights_on_rank_0(policy: Policy) -> dict[str, Tensor] | None:
    weights = {name: tensor.clone() for name, tensor in policy.export_hf()}
    return weights if rank() == 0 else None


def failure(cfg: Config, batch: TrainBatch) -> str:
    """The message with which a training step stops."""
    with opened(cfg) as policy, pytest.raises(NonFiniteError) as error:
        _steps(policy, batch, 1)
    return str(error.value)


def refusal(cfg: Config) -> str:
    """The message with which opening the policy is refused."""
    try:
        with opened(cfg):
            return ""
    except InputError as error:
        return str(error)
