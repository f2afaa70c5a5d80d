"""A minibatch makes the host wait for the device once, and exchanges no Python objects."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_gmpo.metrics.figures import Metric, Op, value_of, weights_metric
from megatron_gmpo.metrics.histogram import BINS
from megatron_gmpo.testing import Family

from ..support import cases
from ..support.ranks import RankPool
from ..support.stops import Stops
from .test_layouts import EP, PP, TP, Reference, config, make_batch

pytestmark = pytest.mark.distributed

MEGATRON = {
    "clip_grads.py": "the gradient norm decides whether to clip",
    "rope_utils.py": "rotary embedding without Transformer Engine: apply_rope_fusion needs no lengths",
    "moe_utils.py": "permutation without Transformer Engine: moe_permute_fusion needs no sizes",
    "token_dispatcher.py": "the tokens that experts of other ranks get",
    "experts.py": "one matrix product for each expert; grouped products need no sizes",
    "layers.py": "the embedding selects the tokens of other tensor-parallel ranks by a mask",
    "schedules.py": "the backward passes of these",
    "p2p_communication.py": "pipeline stages send the shape of a packed microbatch",
}
"""Megatron's files that wait for the device in a minibatch on a CPU -> reason."""


@pytest.mark.parametrize(
    ("family", "world_size", "parallel", "changes"),
    [
        pytest.param("qwen3", 1, {}, {}, id="dense"),
        pytest.param("qwen3", 2, {PP: 2}, {"algorithm": {"entropy_coef": 0.01}}, id="dense pp2"),
        pytest.param(
            "qwen3_moe",
            2,
            {TP: 2, EP: 2},
            {
                "algorithm": {"moe_routing_replay": "policy"},
                "megatron": {"moe_aux_loss_coeff": 0.01, "moe_z_loss_coeff": 0.01},
            },
            id="moe tp2 ep2",
        ),
    ],
)
def test_one_fetch_at_the_end(
    ranks: RankPool,
    expected: Reference,
    family: Family,
    world_size: int,
    parallel: dict[str, int],
    changes: dict[str, Any],
) -> None:
    cfg = config(
        expected.model(family), parallel, max_tokens=32, train={"minibatches_per_step": 2}, **changes
    )
    for found in ranks.run(world_size, cases.stops, cfg, make_batch()):
        assert len(found) == 2
        for minibatch in found:
            assert [place for place in minibatch["places"] if not place.startswith("megatron")] == []
            files = {place.split()[1].split(":")[0] for place in minibatch["places"]}
            assert files <= MEGATRON.keys(), sorted(set(minibatch["places"]))
            assert "rope_utils.py" in files  # the watch sees the model
            assert (minibatch["fetches"], minibatch["objects"]) == (1, {})


def test_ranks_with_other_names_agree_on_them_once(ranks: RankPool) -> None:
    counts = torch.zeros(BINS, dtype=torch.float64)
    counts[3] = 2
    loss = [Metric(torch.tensor(1.5), 2), Metric(2.25, 1)]
    histogram = Metric(counts, op="histogram")
    parts = [
        # the last pipeline stage alone has metrics
        [{}, {"loss": loss[1], "low": Metric(3.0, op="min")}],
        [{}, {"loss": loss[1], "low": Metric(-3.0, op="min")}],
        # each rank has a name of its own
        [{"loss": loss[0], "high": Metric(-1.0, op="max")}, {"loss": loss[1], "spread": histogram}],
        [{"loss": loss[0], "high": Metric(-4.0, op="max")}, {"high": Metric(-2.0, op="max")}],
        [{}, {}],
        [
            {"spread": histogram, "low": Metric(1.0, op="min")},
            {"spread": histogram, "low": Metric(0, op="min")},
        ],
    ]
    expected = [
        {"loss": 2.25, "low": 3.0},
        {"loss": 2.25, "low": -3.0},
        {"loss": 3.75 / 3, "high": -1.0, "spread": 2.0},
        {"loss": 0.75, "high": -2.0},
        {},
        {"spread": 4.0, "low": 0.0},
    ]
    for results, objects in ranks.run(2, cases.reduce_over_ranks, parts):
        found = [
            {
                name: float(m.total.sum()) if isinstance(m.total, Tensor) else value_of(m)
                for name, m in result.items()
            }
            for result in results
        ]
        assert found == [round_ | {"rank": 1.0} for round_ in expected]
        assert objects == [1, 0, 1, 0, 0, 0]


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("op", ["max", "min"])
def test_nan_on_one_rank_is_the_extreme(ranks: RankPool, which: int, op: Op) -> None:
    """The maximum of two numbers is not defined if one is NaN, so NaN travels in a sum."""
    numbers = [math.nan, 2.0] if which == 0 else [2.0, math.nan]
    parts = [[{"x": Metric(torch.tensor(value), op=op), "y": Metric(value, op=op)} for value in numbers]]
    parts.append([{"x": Metric(1.0, op=op)}, {"x": Metric(-1.0, op=op)}])
    for results, _ in ranks.run(2, cases.reduce_over_ranks, parts):
        assert math.isnan(value_of(results[0]["x"]))
        assert math.isnan(value_of(results[0]["y"]))
        assert value_of(results[1]["x"]) == (1.0 if op == "max" else -1.0)


def test_ranks_with_other_scales_of_weights_agree_on_the_effective_sample_size(ranks: RankPool) -> None:
    """Two ranks have weights of 1, 2 and 4 times e^1000: (1 + 2 + 4)^2 / (3 (1 + 4 + 16)) = 7 / 9."""
    logs = [[1000.0, 1000.0 + math.log(4)], [1000.0 + math.log(2)]]
    rows = [torch.tensor(row, dtype=torch.float64) for row in logs]
    parts = [[{"size": weights_metric(row)} for row in rows] + [{}]] * 2
    for results, _ in ranks.run(3, cases.reduce_over_ranks, parts):
        assert [value_of(result["size"]) for result in results] == pytest.approx([7 / 9] * 2, rel=1e-9)


VALUES = torch.arange(6.0)


@pytest.mark.parametrize(
    "stop",
    [
        lambda x: x.sum().item(),
        lambda x: float(x.max()),
        lambda x: bool((x > 1).any()),
        lambda x: x.tolist(),
        lambda x: (2 * x).cpu(),
        lambda x: x.to("cpu"),
        lambda x: x.numpy(),
        lambda x: x[x > 1],
        lambda x: torch.zeros(6).index_put_((x > 1,), x.new_zeros(())),
        lambda x: x.nonzero(),
        lambda x: x.masked_select(x > 1),
        lambda x: torch.repeat_interleave(x.long()),
        lambda x: torch.zeros(6).add_(x).tolist(),
    ],
)
def test_the_watch_finds(stop: Callable[[Tensor], Any]) -> None:
    stops = Stops()
    with stops.watching():
        stop(VALUES.clone())  # on the host
        assert stops.places == []
        device = VALUES.clone()
        stops.mark([device])
        stop(device)
    assert stops.places == ["ours test_stops.py:<lambda>"]
