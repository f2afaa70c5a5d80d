"""A step that leaves out what changes nothing equals a step that computes everything, and float64.

The batch of ``make_batch`` has a sequence with advantage 0 and two without response tokens.
"""

from __future__ import annotations

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
from .test_layouts import (
    CLIP,
    CLIP_GRAD,
    CP,
    EP,
    EPS,
    LR,
    PP,
    TP,
    VPP,
    Reference,
    config,
    distance,
    make_batch,
)

pytestmark = pytest.mark.distributed

LAYOUTS: dict[str, tuple[str, int, dict[str, int], bool]] = {
    "qwen3, one rank": ("qwen3", 1, {}, False),
    "qwen3, dp2 distributed optimizer": ("qwen3", 2, {}, True),
    "qwen3, tp2 cp2": ("qwen3", 4, {TP: 2, CP: 2}, False),
    "qwen3, pp2 vpp2": ("qwen3", 2, {PP: 2, VPP: 2}, False),
    "qwen3_moe, one rank": ("qwen3_moe", 1, {}, False),
    "qwen3_moe, tp2 ep2": ("qwen3_moe", 2, {TP: 2, EP: 2}, True),
    "qwen3_moe, cp2 ep2": ("qwen3_moe", 2, {CP: 2, EP: 2}, False),
}
COMPUTED = 13 + 29 + 40 + 2 + 5
"""Tokens of the sequences with response tokens and an advantage."""
OLD_LOGPROBS = {("qwen3", 1): 0, ("qwen3", 3): 40 + 2 + 5, ("qwen3_moe", 1): 0, ("qwen3_moe", 3): COMPUTED}
"""(family, minibatches) -> tokens of these sequences in the pass for old log probabilities.

The first of three minibatches has three sequences."""


@pytest.mark.parametrize("minibatches", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_changes_nothing(ranks: RankPool, expected: Reference, layout: str, minibatches: int) -> None:
    family, world_size, parallel, distributed = LAYOUTS[layout]
    cfg = config(
        expected.model(family),
        parallel,
        max_tokens=64,
        train={"minibatches_per_step": minibatches},
        optimizer={"use_distributed_optimizer": distributed},
    )
    whole, lean = (
        ranks.run(world_size, cases.learn, cfg, make_batch(), 2, everything) for everything in (True, False)
    )
    for got, wanted in zip(lean, whole, strict=True):
        for update, reference_update in zip(got["history"], wanted["history"], strict=True):
            for name in ("loss", "grad_norm"):
                assert update[name] == pytest.approx(reference_update[name], rel=1e-5, abs=1e-8), name
        assert got["figures"]["train/computed_tokens"] == pytest.approx(COMPUTED / 115)
        old = OLD_LOGPROBS[family, minibatches]
        assert got["figures"]["train/saved"] == pytest.approx(1 - (3 * COMPUTED + old) / (4 * 115))
        trained = make_batch().response_mask & computed_tokens()
        assert_close(got["old_logprobs"][trained], wanted["old_logprobs"][trained], atol=1e-5, rtol=0)
        assert not got["old_logprobs"][~trained].any()
    before = {"before": reference.saved_tensors(expected.model(family))}
    assert distance(lean[0]["weights"], before | {"weights": doubled(whole[0]["weights"])}) < 1e-4


@pytest.mark.parametrize("layout", ["qwen3, one rank", "qwen3_moe, tp2 ep2", "qwen3_moe, cp2 ep2"])
def test_a_step_equals_float64(ranks: RankPool, expected: Reference, tmp_path: Path, layout: str) -> None:
    family, world_size, parallel, distributed = LAYOUTS[layout]
    path, batch = expected.model(family), make_batch()
    old = reference.batch_logprobs(path, batch)
    known = reference.train(
        path,
        replace(batch, old_logprobs=old.float()),
        1,
        tmp_path,
        loss="gmpo",
        clip_low=CLIP,
        clip_high=CLIP,
        kl_coef=0.0,
        entropy_coef=0.0,
        lr=LR,
        eps=EPS,
        clip_grad=CLIP_GRAD,
    )
    cfg = config(path, parallel, max_tokens=64, optimizer={"use_distributed_optimizer": distributed})
    for result in ranks.run(world_size, cases.learn, cfg, batch, 1, False):
        (update,) = result["history"]
        assert update["loss"] == pytest.approx(known["losses"][0], rel=1e-4)
        assert update["grad_norm"] == pytest.approx(known["norms"][0], rel=1e-4)
        trained = batch.response_mask & computed_tokens()
        assert_close(result["old_logprobs"][trained].double(), old[trained], atol=1e-4, rtol=0)


def computed_tokens() -> torch.Tensor:
    batch = make_batch()
    chosen = (batch.advantages != 0) & (batch.response_lengths > 0)
    return torch.repeat_interleave(chosen, batch.lengths)


def doubled(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.double() for name, tensor in weights.items()}


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("qwen3", {"algorithm": {"kl_coef": 0.1}}),
        ("qwen3", {"algorithm": {"entropy_coef": 0.1}}),
        ("qwen3_moe", {"megatron": {"moe_aux_loss_coeff": 0.1}}),
        ("qwen3_moe", {"megatron": {"moe_z_loss_coeff": 0.1}}),
        ("glm4_moe", {"megatron": {"moe_router_bias_update_rate": 0.001}}),
        ("qwen3_moe", {"megatron": {"moe_expert_capacity_factor": 1.0}}),
        ("qwen3_moe", {"megatron": {"moe_router_load_balancing_type": "sinkhorn"}}),
    ],
)
def test_every_token_is_computed_where_a_term_or_the_routing_of_others_uses_it(
    ranks: RankPool, expected: Reference, family: str, changes: dict[str, Any]
) -> None:
    cfg = config(expected.model(family), {}, max_tokens=64, **changes)
    (result,) = ranks.run(1, cases.learn, cfg, make_batch(), 1, False)
    assert result["figures"]["train/computed_tokens"] == 1


def test_without_any_advantage_everything_is_computed(ranks: RankPool, expected: Reference) -> None:
    """The figures of the policy exist, and the gradient is 0."""
    batch = replace(make_batch(), advantages=torch.zeros(8))
    cfg = config(expected.model("qwen3"), {}, max_tokens=64)
    (result,) = ranks.run(1, cases.learn, cfg, batch, 1, False)
    assert result["figures"]["train/computed_tokens"] == 1
    assert result["history"][0]["grad_norm"] == 0
    assert result["history"][0]["policy/entropy"] > 0


def test_a_minibatch_without_advantages_makes_an_update(ranks: RankPool, expected: Reference) -> None:
    """The second of two minibatches has no gradient. Adam's momentum still moves the weights."""
    batch: TrainBatch = make_batch()
    batch = replace(batch, advantages=batch.advantages * (torch.arange(8) < 4))
    cfg = config(expected.model("qwen3_moe"), {EP: 2}, max_tokens=64, train={"minibatches_per_step": 2})
    whole, lean = (ranks.run(2, cases.learn, cfg, batch, 1, everything) for everything in (True, False))
    before = {"before": reference.saved_tensors(expected.model("qwen3_moe"))}
    assert lean[0]["history"][1]["grad_norm"] == 0
    assert distance(lean[0]["weights"], before | {"weights": doubled(whole[0]["weights"])}) < 1e-4


@pytest.mark.parametrize(
    "layout", ["qwen3, one rank", "qwen3, tp2 cp2", "qwen3, pp2 vpp2", "qwen3_moe, cp2 ep2"]
)
def test_the_rollout_engines_log_probabilities_are_the_old_ones(
    ranks: RankPool, expected: Reference, tmp_path: Path, layout: str
) -> None:
    """Two minibatches equal float64 updates whose old log probabilities are those of the engine.

    The second minibatch of the reference starts from the weights that the first one saved. The log
    probabilities of the policy are known for the first minibatch only, and so is the mismatch.
    """
    family, world_size, parallel, _ = LAYOUTS[layout]
    path, batch = expected.model(family), make_batch()
    own = reference.batch_logprobs(path, batch)
    noise = 0.4 * torch.randn(len(own), generator=torch.Generator().manual_seed(2))
    batch.rollout_logprobs = torch.where(batch.response_mask, own.float() + noise, 0.0)
    cfg = config(
        path,
        parallel,
        max_tokens=64,
        train={"minibatches_per_step": 2},
        algorithm={"old_logprobs": "rollout"},
    )
    known, start = [], path
    for number, minibatch in enumerate(split(batch, 2)):
        settings = {"loss": "gmpo", "clip_low": CLIP, "clip_high": CLIP, "kl_coef": 0.0, "entropy_coef": 0.0}
        settings |= {"lr": LR, "eps": EPS, "clip_grad": CLIP_GRAD}
        old = replace(minibatch, old_logprobs=minibatch.rollout_logprobs)
        known.append(reference.train(start, old, 1, start := tmp_path / str(number), **settings))
    first = split(batch, 2)[0]
    trained = first.response_mask & computed_tokens()[: len(first.tokens)]
    differences = (own[: len(trained)] - first.rollout_logprobs.double())[trained].abs()
    for result in ranks.run(world_size, cases.learn, cfg, batch, 1, False):
        for update, wanted in zip(result["history"], known, strict=True):
            assert update["loss"] == pytest.approx(wanted["losses"][0], rel=1e-4)
            assert update["grad_norm"] == pytest.approx(wanted["norms"][0], rel=1e-4)
        assert_close(
            result["old_logprobs"][trained].double(), own[: len(trained)][trained], atol=1e-4, rtol=0
        )
        assert len(result["old_logprobs"]) == len(first.tokens)
        assert result["figures"]["rollout/logprob_diff_mean"] == pytest.approx(
            float(differences.mean()), rel=1e-3
        )
        assert result["history"][0]["policy/clip_fraction_high"] > 0
