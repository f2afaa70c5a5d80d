"""Properties of an optimizer step that the config promises and test_layouts.py does not cover."""

from __future__ import annotations

import pytest

from ..support import cases
from ..support.ranks import RankPool
from .test_layouts import LR, Reference, config, distance

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
