"""RSPO's gamma and the routers' figures are in every layout those of a float64 model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from megatron_gmpo.types import TrainBatch

from . import cases, reference
from .ranks import RankPool
from .test_layouts import CLIP, CLIP_GRAD, EPS, LR, STEPS, Reference, check, config, expected
from .test_routing import LAYOUTS, batch, replaying

pytestmark = pytest.mark.distributed

__all__ = ["batch", "expected"]  # the fixtures

FLOOR = 0.95


@pytest.fixture(scope="session")
def rspo(expected: Reference, batch: TrainBatch, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Three steps of RSPO with routing left free."""
    path = expected.model("qwen3_moe")
    old = reference.batch_logprobs(path, batch)
    noise = torch.randn(len(old), generator=torch.Generator().manual_seed(1)) * 0.4
    noisy = replace(batch, old_logprobs=torch.where(batch.response_mask, old.float() + noise, 0.0))
    settings = {"loss": "rspo", "clip_low": CLIP, "clip_high": CLIP, "kl_coef": 0.0, "entropy_coef": 0.0, "min_router_shift": FLOOR}
    folder = tmp_path_factory.mktemp("rspo")
    known = reference.train(path, noisy, STEPS, folder, lr=LR, eps=EPS, clip_grad=CLIP_GRAD, **settings)
    before = reference.saved_tensors(path)
    return known | {"path": path, "before": before, "logprobs": old, "old_logprobs": noisy.old_logprobs}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rspo_in_every_layout(ranks: RankPool, rspo: dict[str, Any], batch: TrainBatch, layout: str) -> None:
    algorithm = {"loss": "rspo", "moe_routing_replay": "none", "options": {"min_router_shift": FLOOR}}
    world_size, cfg = replaying(rspo["path"], layout, "none", max_tokens=40, algorithm=algorithm, rollout={"routed_experts": False})
    results = ranks.run(world_size, cases.replay, cfg, batch, 1, STEPS, rspo["old_logprobs"])
    check(results, rspo)
    last = torch.zeros(len(batch.tokens), dtype=torch.bool)
    last[batch.lengths.cumsum(0) - 1] = True
    print("SHIFT", [(float(s.min()), float(s.mean()), float((s<FLOOR).double().mean())) for s in rspo["shifts"]])
    for result in results:
        assert_close(result["router_shift"].double()[~last], rspo["shifts"][-1][~last], atol=1e-4, rtol=0)
        of_inputs = [shift[batch.response_mask.roll(-1)] for shift in rspo["shifts"][:STEPS]]
        means = [step["policy/router_shift"] for step in result["history"]]
        assert means[0] == 1
        assert means == pytest.approx([float(shift.mean()) for shift in of_inputs], abs=1e-5)
