"""Properties of an optimizer step that the config promises and test_layouts.py does not cover."""

from __future__ import annotations

from pathlib import Path

import pytest

from ..support import cases, large_logits, reference
from ..support.ranks import RankPool
from .test_layouts import CLIP, CLIP_GRAD, EPS, LR, TP, Reference, config, distance, make_batch

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_every_update_of_a_decaying_schedule_has_a_learning_rate(
    ranks: RankPool, expected: Reference, schedule: str
) -> None:
    known = expected("qwen3_moe")
    decaying = config(
        known["path"], {}, max_tokens=64, optimizer={"lr_schedule": schedule}, train={"num_steps": 3}
    )
    (result,) = ranks.run(1, cases.train, decaying, known["batch"], 3)
    rates = [step["learning_rate"] for step in result["history"]]
    assert LR > rates[0] > rates[1] > rates[2] > 0


def test_an_auxiliary_loss_needs_only_its_coefficient(ranks: RankPool, expected: Reference) -> None:
    known = expected("qwen3_moe")
    balanced = config(known["path"], {}, max_tokens=64, megatron={"moe_aux_loss_coeff": 1.0})
    (result,) = ranks.run(1, cases.train, balanced, known["batch"], 3)
    # The logged loss does not include the balancing loss.
    assert result["history"][0]["loss"] == pytest.approx(known["losses"][0], rel=1e-4)
    assert distance(result["weights"], known) > 1e-2


def test_a_later_policy_of_a_process_may_have_more_layers(ranks: RankPool, expected: Reference) -> None:
    """Megatron keeps the values of auxiliary losses in one place of the process, with a row per layer."""
    batch = expected("qwen3_moe")["batch"]
    for layers in (1, 3):
        model = expected.model("qwen3_moe", num_layers=layers)
        cfg = config(model, {}, max_tokens=64, megatron={"moe_z_loss_coeff": 0.1})
        (result,) = ranks.run(1, cases.train, cfg, batch, 1)
        assert result["history"][0]["moe/z_loss"] > 0


@pytest.mark.parametrize("parallel", [{}, {TP: 2}])
def test_logits_in_fp32_of_a_bf16_model(ranks: RankPool, tmp_path: Path, parallel: dict[str, int]) -> None:
    """With logits that are not rounded to bf16, log probabilities and loss are closer to float64."""
    path, batch = large_logits.make(tmp_path / "model"), make_batch()
    exact = reference.batch_logprobs(path, batch)
    batch.old_logprobs = exact.float()
    settings = {"loss": "gmpo", "clip_low": CLIP, "clip_high": CLIP, "kl_coef": 0.0, "entropy_coef": 0.0}
    settings |= {"lr": LR, "eps": EPS, "clip_grad": CLIP_GRAD}
    known = reference.train(path, batch, 1, tmp_path / "trained", **settings)
    share, loss_error, norm_error = [], [], []
    for fp32_head in (None, False):
        cfg = config(path, parallel, max_tokens=64, model={"dtype": "bf16", "fp32_head": fp32_head})
        result = ranks.run(parallel.get(TP, 1), cases.train, cfg, batch, 1)[0]
        trained = batch.response_mask
        share.append(large_logits.share_far(result["logprobs"][trained], exact[trained]))
        loss_error.append(abs(result["history"][0]["loss"] - known["losses"][0]))
        norm_error.append(abs(result["history"][0]["grad_norm"] / known["norms"][0] - 1))
    assert share[0] < 0.02
    assert share[1] > 0.05
    assert loss_error[0] < loss_error[1] / 2
    assert norm_error[0] < 0.02
