"""What the ranks of a layout test run: the real policy on replayed rollouts. Imported by the worker processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_gmpo.algorithms.objective import make_objective
from megatron_gmpo.config import Config
from megatron_gmpo.distributed import rank, world_size
from megatron_gmpo.metrics.logger import value_of
from megatron_gmpo.models.config import describe_model
from megatron_gmpo.policy.parallel import start_model_parallel, stop_model_parallel
from megatron_gmpo.policy.policy import Policy
from megatron_gmpo.types import TrainBatch

CPU = torch.device("cpu")


def open_policy(cfg: Config) -> Policy:
    description = describe_model(cfg, world_size(), CPU)
    groups = start_model_parallel(cfg.parallel, CPU, cfg.seed)
    return Policy(cfg, description, groups, CPU)


def train(cfg: Config, batch: TrainBatch, steps: int) -> dict[str, Any]:
    """``steps`` optimizer steps on one batch; losses, gradient norms, metrics, first logprobs and the weights after."""
    policy = open_policy(cfg)
    try:
        logprobs = policy.logprobs(batch)
        objective = make_objective(cfg.algorithm, is_moe=policy.description.is_moe, max_new_tokens=64)
        history = []
        for _ in range(steps):
            metrics = policy.train_step(batch, objective)
            history.append({name: value_of(metric) for name, metric in metrics.items()})
        weights = weights_on_rank_0(policy)
    finally:
        stop_model_parallel()
    return {"logprobs": logprobs, "history": history, "weights": weights}


def export(cfg: Config) -> dict[str, Tensor] | None:
    """The Hugging Face tensors right after loading."""
    policy = open_policy(cfg)
    try:
        return weights_on_rank_0(policy)
    finally:
        stop_model_parallel()


def weights_on_rank_0(policy: Policy) -> dict[str, Tensor] | None:
    weights = {name: tensor.clone() for name, tensor in policy.export_hf()}
    return weights if rank() == 0 else None


def train_and_save(cfg: Config, batch: TrainBatch, run_dir: Path, *, first: int, last: int) -> dict[str, Any]:
    """Steps ``first`` to ``last`` of a run that saves after the last one and, when ``first`` > 0, resumes before."""
    from megatron_gmpo.checkpoint import native

    policy = open_policy(cfg)
    try:
        if first:
            checkpoint = native.latest_checkpoint(run_dir)
            assert checkpoint is not None
            state = policy.load(checkpoint)
            assert state["step"] == first
        objective = make_objective(cfg.algorithm, is_moe=policy.description.is_moe, max_new_tokens=64)
        losses = [value_of(policy.train_step(batch, objective)["loss"]) for _ in range(first, last)]
        policy.save(run_dir, last, {"note": "kept"}, keep_last=2)
        weights = weights_on_rank_0(policy)
    finally:
        stop_model_parallel()
    return {"losses": losses, "weights": weights}
