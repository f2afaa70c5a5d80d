"""The dry run predicts what the ranks of a real run hold: weights, gradients, optimizer and activations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch

from megatron_gmpo.batch.columns import TrainBatch
from megatron_gmpo.config import Config
from megatron_gmpo.models.description import describe_model
from megatron_gmpo.planning.dry_run import dry_run

from ..support import cases
from ..support.ranks import RankPool

pytestmark = pytest.mark.distributed

TP, PP, VPP = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
)
CP, EP, ETP = "context_parallel_size", "expert_model_parallel_size", "expert_tensor_parallel_size"
LENGTH, SEQUENCES, MICROBATCHES = 128, 4, 4
RECOMPUTED = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def batch_for(replicas: int) -> TrainBatch:
    """Return equal sequences that fill ``MICROBATCHES`` microbatches on each of ``replicas`` ranks."""
    count = SEQUENCES * MICROBATCHES * replicas
    mask = (torch.arange(LENGTH) >= 8).repeat(count)
    tokens = torch.randint(3, 16, (count * LENGTH,), generator=torch.Generator().manual_seed(0))
    batch = TrainBatch(tokens, torch.full((count,), LENGTH), mask, torch.ones(count), torch.zeros(len(mask)))
    batch.old_logprobs = torch.zeros(len(mask))
    batch.ref_logprobs = torch.zeros(len(mask))
    return batch


@pytest.mark.parametrize(
    ("family", "world_size", "parallel", "changes"),
    [
        ("qwen3", 1, {}, {}),
        ("qwen3", 2, {TP: 2}, {"optimizer": {"use_distributed_optimizer": False}}),
        ("qwen3_moe", 1, {}, {"model": {"dtype": "fp32"}}),
        ("qwen3_moe", 2, {EP: 2}, {"algorithm": {"kl_coef": 0.1}}),
        ("qwen3_moe", 4, {TP: 2, EP: 2}, {"megatron": RECOMPUTED}),
        ("qwen3_moe", 4, {PP: 2, EP: 2}, {}),
        ("qwen3_moe", 2, {PP: 2, VPP: 2}, {"megatron": RECOMPUTED}),
        ("qwen3_moe", 2, {CP: 2}, {}),
        ("deepseek_v3", 2, {TP: 2, EP: 2}, {}),
    ],
)
def test_memory_of_every_rank(
    ranks: RankPool,
    tiny_model: Callable[..., Path],
    family: Any,
    world_size: int,
    parallel: dict[str, int],
    changes: dict[str, Any],
) -> None:
    tree: dict[str, Any] = {
        "device": "cpu",
        "parallel": parallel,
        "train": {"max_tokens_per_microbatch": LENGTH * SEQUENCES},
        **changes,
        "model": {"path": str(tiny_model(family)), "dtype": "bf16"} | changes.get("model", {}),
    }
    cfg = Config.model_validate(tree)
    found = ranks.run(
        world_size, cases.memory, cfg, batch_for(world_size // cfg.parallel.model_parallel_size)
    )
    description = describe_model(cfg, world_size, torch.device("cpu"))
    stages = parallel.get(PP, 1)
    # On a CPU, torch has no fused attention with a mask or with two head sizes; unfused attention saves more
    # tensors.
    fused = CP not in parallel and family != "deepseek_v3"
    for stage in range(stages):
        plan = dry_run(
            cfg,
            description,
            world_size=world_size,
            stage=stage,
            lengths=[LENGTH] * SEQUENCES,
            num_microbatches=MICROBATCHES,
        )
        of_stage = found[stage * world_size // stages : (stage + 1) * world_size // stages]
        for name in ("weights", "gradients", "optimizer", "reference"):
            assert getattr(plan, name) == pytest.approx(of_stage[0][name], rel=0.01), name
        # Experts receive different shares of the tokens, so the test compares the mean over the ranks. The
        # schedules also keep the outputs that they send, for every pass except the one through the head.
        passed_on = plan.in_flight - (stage == stages - 1)
        kept = mean(rank["saved"] for rank in of_stage) + passed_on * plan.boundary
        if fused:
            assert plan.activations == pytest.approx(kept, rel=0.1)
        if fused and world_size == 1:  # gloo itself allocates memory
            assert plan.total == pytest.approx(
                plan.resident + mean(rank["peak"] for rank in of_stage), rel=0.1
            )
