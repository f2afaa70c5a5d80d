"""In every layout, RSPO's gamma and the routers' metrics equal those of a float64 model."""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from megatron_gmpo.batch.columns import TrainBatch

from ..support import cases, reference
from ..support.batches import split
from ..support.ranks import RankPool
from .test_layouts import CLIP, CLIP_GRAD, EPS, LR, STEPS, Reference, check
from .test_routing import LAYOUTS, RECOMPUTE, batch, replaying, train_forced

pytestmark = pytest.mark.distributed

__all__ = ["batch"]  # fixture

FLOOR = 0.85


@pytest.fixture(scope="session")
def rspo(expected: Reference, batch: TrainBatch, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Train the reference three steps with RSPO, without replay."""
    path = expected.model("qwen3_moe")
    old = reference.batch_logprobs(path, batch)
    noise = torch.randn(len(old), generator=torch.Generator().manual_seed(1)) * 0.4
    noisy = replace(batch, old_logprobs=torch.where(batch.response_mask, old.float() + noise, 0.0))
    settings = {
        "loss": "rspo",
        "clip_low": CLIP,
        "clip_high": CLIP,
        "kl_coef": 0.0,
        "entropy_coef": 0.0,
        "min_router_shift": FLOOR,
    }
    folder = tmp_path_factory.mktemp("rspo")
    known = reference.train(path, noisy, STEPS, folder, lr=LR, eps=EPS, clip_grad=CLIP_GRAD, **settings)
    before = reference.saved_tensors(path)
    return known | {"path": path, "before": before, "logprobs": old, "old_logprobs": noisy.old_logprobs}


def check_shifts(results: list[dict[str, Any]], known: dict[str, Any], batch: TrainBatch) -> None:
    assert 0.1 < float((known["shifts"][-1] < FLOOR).double().mean()) < 0.9
    inputs = batch.response_mask.roll(-1)  # input tokens of the tokens that carry loss
    not_last = torch.ones(len(batch.tokens), dtype=torch.bool)
    not_last[batch.lengths.cumsum(0) - 1] = False
    for result in results:
        assert_close(
            result["router_shift"].double()[not_last], known["shifts"][-1][not_last], atol=1e-4, rtol=0
        )
        means = [step["policy/router_shift"] for step in result["history"]]
        assert means[0] == 1
        assert means == pytest.approx(
            [float(shift[inputs].mean()) for shift in known["shifts"][:STEPS]], abs=1e-5
        )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rspo_in_every_layout(ranks: RankPool, rspo: dict[str, Any], batch: TrainBatch, layout: str) -> None:
    algorithm = {"loss": "rspo", "options": {"min_router_shift": FLOOR}}
    world_size, cfg = replaying(
        rspo["path"], layout, "none", max_tokens=40, algorithm=algorithm, rollout={"routed_experts": False}
    )
    results = ranks.run(world_size, cases.replay, cfg, batch, 1, STEPS, rspo["old_logprobs"])
    check(results, rspo)
    check_shifts(results, rspo, batch)


def test_rspo_under_replay_compares_the_replayed_experts(
    ranks: RankPool, expected: Reference, batch: TrainBatch, tmp_path: Path
) -> None:
    known = train_forced(expected.model("qwen3_moe"), batch, tmp_path, loss="rspo", min_router_shift=FLOOR)
    algorithm = {"loss": "rspo", "moe_routing_replay": "rollout", "options": {"min_router_shift": FLOOR}}
    world_size, cfg = replaying(
        known["path"], "pp2 vpp2 ep2", "rollout", max_tokens=40, algorithm=algorithm, megatron=RECOMPUTE
    )
    results = ranks.run(world_size, cases.replay, cfg, known["batch"], 1, STEPS, known["old_logprobs"])
    check(results, known)
    check_shifts(results, known, batch)


@pytest.fixture(scope="session")
def figures(expected: Reference, batch: TrainBatch) -> dict[str, float]:
    """Compute the metrics of the routers layer by layer."""
    log_probs = reference.router_log_probs(reference.load_float64(expected.model("qwen3_moe")), batch)
    loads = [
        [sum(e in chosen for chosen in layer) for e in range(4)]
        for layer in log_probs.topk(2).indices.transpose(0, 1).tolist()
    ]
    of_layers = {
        "load_max": [max(load) / statistics.mean(load) for load in loads],
        "load_cv": [statistics.pstdev(load) / statistics.mean(load) for load in loads],
        "dead_experts": [load.count(0) for load in loads],
        "router_entropy": (-(log_probs.exp() * log_probs).sum(-1).mean(0)).tolist(),
    }
    worst = max(of_layers["load_max"])
    return {
        "moe/load_max": worst,
        "moe/load_max_layer": of_layers["load_max"].index(worst),
        "moe/load_cv": statistics.mean(of_layers["load_cv"]),
        "moe/dead_experts": sum(of_layers["dead_experts"]),
        "moe/router_entropy": statistics.mean(of_layers["router_entropy"]),
    } | {
        f"moe/layer_0{layer}/{name}": value
        for name, values in of_layers.items()
        for layer, value in enumerate(values)
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_load_and_entropy(
    ranks: RankPool, expected: Reference, batch: TrainBatch, figures: dict[str, float], layout: str
) -> None:
    path, sections = (
        expected.model("qwen3_moe"),
        {"rollout": {"routed_experts": False}, "megatron": {"moe_per_layer_logging": True}},
    )
    world_size, cfg = replaying(path, layout, "none", max_tokens=40, **sections)
    assert figures["moe/load_cv"] > 0.05
    assert figures["moe/load_max_layer"] > 0
    for result in ranks.run(world_size, cases.replay, cfg, batch, 1, 0):
        assert result["compared"] == pytest.approx(figures, rel=1e-6)


@pytest.mark.parametrize("layout", ["one rank", "tp2 ep2"])
def test_entropy_of_sigmoid_routers(
    ranks: RankPool, expected: Reference, batch: TrainBatch, layout: str
) -> None:
    path = expected.model("glm4_moe")
    log_probs = reference.router_log_probs(reference.load_float64(path), batch)
    world_size, cfg = replaying(path, layout, "none", max_tokens=40, rollout={"routed_experts": False})
    for result in ranks.run(world_size, cases.replay, cfg, batch, 1, 0):
        assert result["compared"]["moe/router_entropy"] == pytest.approx(
            float(-(log_probs.exp() * log_probs).sum(-1).mean()), rel=1e-6
        )


def test_an_expert_without_tokens_is_dead(ranks: RankPool, expected: Reference, batch: TrainBatch) -> None:
    """One token goes to 2 of 4 experts in each of 4 layers; padding on two ranks does not count."""
    world_size, cfg = replaying(
        expected.model("qwen3_moe"), "tp2 cp2 ep2", "none", max_tokens=40, rollout={"routed_experts": False}
    )
    (result, *_) = ranks.run(world_size, cases.replay, cfg, one_token(batch), 1, 0)
    found = {name: result["compared"][name] for name in ("moe/load_max", "moe/load_cv", "moe/dead_experts")}
    assert found == {"moe/load_max": 2, "moe/load_cv": 1, "moe/dead_experts": 8}


def one_token(batch: TrainBatch) -> TrainBatch:
    """Return the sequence of one token."""
    return next(part for part in split(batch, len(batch)) if len(part.tokens) == 1)
