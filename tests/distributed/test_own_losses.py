"""The losses in docs/losses.md, in files outside the repository, equal float64 formulas in two layouts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_gmpo.batch.columns import TrainBatch
from megatron_gmpo.config import Config

from ..support import cases
from ..support.losses import documented_losses
from ..support.ranks import RankPool
from .test_layouts import CLIP, LAYOUTS, STEPS, Reference, check, config

pytestmark = pytest.mark.distributed

CLIP_GRAD = 0.2  # below the gradient norm of every step of both losses, so that the gradient clip acts


def clipped_ratio(log_ratio: Tensor, advantage: Tensor) -> Tensor:
    ratio = log_ratio.exp()
    return torch.where(advantage > 0, ratio.clamp(max=1 + CLIP), ratio.clamp(min=1 - CLIP))


def harmonic(log_ratio: Tensor, advantage: Tensor) -> Tensor:
    return -advantage * len(log_ratio) / (1 / clipped_ratio(log_ratio, advantage)).sum()


def ramped(log_ratio: Tensor, advantage: Tensor) -> Tensor:
    n = len(log_ratio)
    return -advantage * sum(
        (t + 1) / n * ratio for t, ratio in enumerate(clipped_ratio(log_ratio, advantage))
    )


def train(folder: Path, cfg: Config, batch: TrainBatch) -> dict[str, Any]:
    """Train on a rank with ``folder`` on the Python path."""
    sys.path.insert(0, str(folder))
    try:
        return cases.train(cfg, batch, STEPS)
    finally:
        sys.path.remove(str(folder))


@pytest.mark.parametrize("layout", ["one rank", "cp2"])
@pytest.mark.parametrize(("number", "name"), [(0, "harmonic"), (1, "ramped")])
def test_documented_losses_equal_their_formulas(
    ranks: RankPool, expected: Reference, tmp_path: Path, number: int, name: str, layout: str
) -> None:
    (tmp_path / f"documented_{number}.py").write_text(documented_losses()[number])
    formula = [harmonic, ramped][number]
    known = expected("qwen3_moe", loss=formula, per_token=name == "ramped", clip_grad=CLIP_GRAD)
    world_size, parallel, _ = LAYOUTS[layout]
    cfg = config(
        known["path"],
        parallel,
        max_tokens=64,
        algorithm={"loss": f"documented_{number}:{name}"},
        optimizer={"clip_grad": CLIP_GRAD},
    )
    results = ranks.run(world_size, train, tmp_path, cfg, known["batch"])
    assert results[0]["history"][0]["loss"] != pytest.approx(expected("qwen3_moe")["losses"][0], rel=0.01)
    check(results, known)
