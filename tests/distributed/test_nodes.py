"""A step whose samples lie on several nodes equals the step of one process.

Each rank has the groups that it sampled. The ranks of a replica get its sequences and nothing else.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from megatron_gmpo.batch.assembly import make_train_batch
from megatron_gmpo.batch.columns import Column, TrainBatch
from megatron_gmpo.batch.exchange import Exchange
from megatron_gmpo.batch.index import StepIndex
from megatron_gmpo.batch.samples import Prompt, Sample, SampleGroup
from megatron_gmpo.config import Config
from megatron_gmpo.distributed import Nodes, rank
from megatron_gmpo.losses.advantages import group_advantages
from megatron_gmpo.losses.correction import correct, rollout_mismatch
from megatron_gmpo.losses.objective import make_objective
from megatron_gmpo.losses.registry import LOSSES, Loss, NewColumn
from megatron_gmpo.metrics.figures import figures_of, reduce_metrics
from megatron_gmpo.supervision.records import node_name

from ..support import cases
from ..support.ranks import RankPool
from .test_layouts import CP, DENSE, EP, MOE, PP, TP, VOCAB, Family, Reference, config
from .test_layouts import LAYOUTS as BASIC

pytestmark = pytest.mark.distributed

LAYERS, TOPK, EXPERTS = 4, 2, 4  # of the tests' MoE


def make_groups(observed: float = 0.0) -> list[SampleGroup]:
    """Return six groups of three: one without variance, one with a response of length 0, one truncated.

    Args:
        observed: share of the tokens after a response's first one that are observations.
    """
    draw = np.random.default_rng(0)
    groups = []
    for number in range(6):
        prompt = draw.integers(3, VOCAB, draw.integers(1, 9)).tolist()
        samples = []
        for place in range(3):
            response = int(draw.integers(1, 40)) if (number, place) != (1, 2) else 0
            sample = Sample.from_response(
                prompt,
                draw.integers(3, VOCAB, response),
                -5.5 + 0.2 * draw.normal(size=response),
                text="",
                finish_reason="length" if (number, place) == (4, 0) else "stop",
                policy_version=number,
                reward=0.0 if number == 2 else float(draw.normal()),
                routed_experts=draw.random((len(prompt) + response - 1, LAYERS, EXPERTS)).argsort()[
                    ..., :TOPK
                ],
            )
            at = np.arange(len(sample.tokens))
            seen = (at > len(prompt)) & (draw.random(len(at)) < observed) if observed else at < 0
            sample.response_mask, sample.rollout_logprobs[seen] = sample.response_mask & ~seen, 0.0
            samples.append(sample)
        groups.append(SampleGroup(Prompt(str(number), ""), samples))
    return groups


def place_in_response(batch: TrainBatch) -> Tensor:
    """Return (L,): the number of the token among its sequence's response tokens."""
    count = batch.response_mask.cumsum(0)
    return (count - count[batch.starts].repeat_interleave(batch.lengths)).float()


def weighted(tokens: Any, *, clip_low: float = 0.2, clip_high: float = 0.2) -> Any:
    sums = tokens.sum_per_sequence({"gain": tokens.columns["place"] * tokens.log_ratio.exp()})
    return tokens.output(tokens.advantages * sums["gain"], sums)


OWN = Loss(weighted, needs=(NewColumn("place", Column(torch.float32, "predicted"), place_in_response),))


def step(cfg: Config, owners: list[int], names: list[str]) -> dict[str, Any]:
    """Do what ``train.Loop`` does. Each group lies with a rank of ``owners``, and each rank on a node."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(LOSSES, "own", OWN)
        patch.setenv("SLURMD_NODENAME", names[rank()])
        return _step(cfg, owners)


def _step(cfg: Config, owners: list[int]) -> dict[str, Any]:
    with cases.opened(cfg) as policy:
        objective = make_objective(cfg.algorithm, is_moe=policy.description.is_moe, max_new_tokens=64)
        observed = 0.4 if cfg.algorithm.unit == "turn" else 0.0
        mine = {number: g for number, g in enumerate(make_groups(observed)) if owners[number] == rank()}
        index = StepIndex.gather(mine, 6)
        if cfg.algorithm.mask_truncated:
            index = index.without_truncated()
        advantages = group_advantages(index, objective.advantage)
        plan = policy.plan(index, advantages, objective)
        routing = policy.description.routing if cfg.needs_rollout_routing else None
        exchange = Exchange(Nodes(node_name(), 60.0), policy.replica, "", 60.0, routing)
        unit = cfg.algorithm.unit
        batch = make_train_batch(mine, index, advantages, plan, exchange, policy.replica, unit)
        figures = policy.prepare(batch) | policy.over_replicas(correct(batch, cfg.algorithm))
        if policy.reference:
            batch.ref_logprobs = policy.reference_logprobs(batch)
        objective.add_columns(batch)
        policy.begin_step(0)
        minibatches = policy.minibatches(batch)
        updates = [policy.train_step(minibatch, objective) for minibatch in minibatches]
        known = [minibatch for minibatch in minibatches if minibatch.old_logprobs is not None]
        figures |= reduce_metrics(updates) | policy.over_replicas(rollout_mismatch(*known))
        return {
            "figures": figures_of(figures),
            "updates": [figures_of(update) for update in updates],
            "weights": cases.weights_on_rank_0(policy),
            "tokens": (policy.replica, len(batch.tokens)),
            "computed": int(index.length[plan.replica_of >= 0].sum()),
        }


CASES: dict[str, dict[str, Any]] = {
    "gmpo": {"train": {"minibatches_per_step": 2}},
    "truncated, kl, token weights, icepop": {
        "train": {"minibatches_per_step": 2},
        "algorithm": {
            "loss": "grpo",
            "mask_truncated": True,
            "kl_coef": 0.1,
            "correction": "token",
            "mask": "icepop",
        },
    },
    "adaptive old log probabilities of the engine": {
        "train": {"minibatches_per_step": 3},
        "algorithm": {"old_logprobs": "rollout", "entropy_coef": 0.05},
    },
    "R2": {"train": {"minibatches_per_step": 2}, "algorithm": {"moe_routing_replay": "policy"}},
    "R3, sequence weights": {
        "train": {"minibatches_per_step": 2},
        "algorithm": {"moe_routing_replay": "rollout", "correction": "geometric"},
        "rollout": {"routed_experts": True},
    },
    "rspo": {"train": {"minibatches_per_step": 2}, "algorithm": {"loss": "rspo"}},
    "R3, turns with weights, truncated": {
        "train": {"minibatches_per_step": 2},
        "algorithm": {
            "unit": "turn",
            "mask_truncated": True,
            "moe_routing_replay": "rollout",
            "correction": "geometric",
        },
        "rollout": {"routed_experts": True},
    },
    "own": {"algorithm": {"loss": "own", "advantage": "mean"}},
}
MOE_ONLY = {"R2", "R3, sequence weights", "R3, turns with weights, truncated", "rspo"}
PLACES = {
    "one node, one sampler": (["a"] * 4, [0] * 6),
    "two nodes, a sampler each": (["a", "a", "b", "b"], [0, 2, 2, 0, 0, 2]),
    "two nodes, ranks in turn": (["a", "b", "a", "b"], [1, 1, 0, 1, 1, 1]),
    "four nodes": (["a", "b", "c", "d"], [3, 1, 0, 2, 1, 3]),
}
LAYOUTS: dict[str, dict[str, int]] = {
    "dp4": {},
    "cp2": {CP: 2},
    "pp2": {PP: 2},
    "tp2 ep2": {TP: 2, EP: 2},
    "tp2": {TP: 2},
}


EVERY_LAYOUT: dict[Family, dict[str, tuple[int, dict[str, int], bool]]] = {
    family: {name: layout for name, layout in layouts.items() if layout[0] > 1}
    for family, layouts in {"qwen3": BASIC | DENSE, "qwen3_moe": BASIC | MOE}.items()
}


OF_THE_OLD_POLICY = ("rollout/", "train/", "moe/load", "moe/router", "moe/routing_differs", "moe/dead")
"""Figures from before the first update."""


def names_of(result: dict[str, Any]) -> set[str]:
    return result["figures"].keys()


@pytest.mark.parametrize(
    ("case", "layout", "place"),
    [
        ("gmpo", "dp4", "one node, one sampler"),
        ("gmpo", "cp2", "two nodes, ranks in turn"),
        ("truncated, kl, token weights, icepop", "pp2", "two nodes, a sampler each"),
        ("truncated, kl, token weights, icepop", "dp4", "four nodes"),
        ("adaptive old log probabilities of the engine", "tp2", "two nodes, ranks in turn"),
        ("R2", "tp2 ep2", "two nodes, a sampler each"),
        ("R2", "pp2", "four nodes"),
        ("R3, sequence weights", "cp2", "two nodes, ranks in turn"),
        ("R3, sequence weights", "tp2 ep2", "four nodes"),
        ("R3, turns with weights, truncated", "cp2", "two nodes, ranks in turn"),
        ("rspo", "cp2", "four nodes"),
        ("own", "dp4", "two nodes, a sampler each"),
    ],
)
def test_a_step_on_nodes_equals_the_step_of_one_process(
    ranks: RankPool, expected: Reference, case: str, layout: str, place: str
) -> None:
    family = "qwen3_moe" if case in MOE_ONLY or "ep" in layout else "qwen3"
    cfg, alone = (
        config(expected.model(family), parallel, max_tokens=40, **CASES[case])
        for parallel in (LAYOUTS[layout], {})
    )
    compare(ranks, cfg, alone, *PLACES[place])


R3 = "R3, sequence weights"


@pytest.mark.parametrize(
    ("family", "layout", "nodes", "name"),
    [
        (family, layout, nodes, name)
        for family, layouts in EVERY_LAYOUT.items()
        for layout, (world_size, _, _) in layouts.items()
        for nodes in (["ab"] if world_size == 2 else ["aabb", "abcd"])
        for name in (["gmpo"] if family == "qwen3" else [R3] if nodes == "aabb" else [R3, "R2"])
    ],
)
def test_every_layout_on_nodes(
    ranks: RankPool, expected: Reference, family: Family, layout: str, nodes: str, name: str
) -> None:
    """The MoE replays the rollout engine's routing, or the policy's own."""
    _, parallel, distributed = EVERY_LAYOUT[family][layout]
    case = CASES[name]
    optimizer = {"use_distributed_optimizer": distributed}
    cfg, alone = (
        config(expected.model(family), each, max_tokens=40, optimizer=optimizer, **case)
        for each in (parallel, {})
    )
    compare(ranks, cfg, alone, list(nodes), [number % len(nodes) for number in (1, 3, 0, 2, 1, 3)])


def compare(ranks: RankPool, cfg: Config, alone: Config, names: list[str], owners: list[int]) -> None:
    """Compare a step of ranks on the nodes ``names`` with the step of one process."""
    (wanted,) = ranks.run(1, step, alone, [0] * 6, ["here"])
    results = ranks.run(len(names), step, cfg, owners, names)
    for result in results:
        assert names_of(result) == names_of(wanted)
        for update, wanted_update in zip(result["updates"], wanted["updates"], strict=True):
            for name in ("loss", "grad_norm", "learning_rate"):
                assert update[name] == pytest.approx(wanted_update[name], rel=2e-4, abs=1e-7), name
        for name, value in wanted["figures"].items():
            # after an update, rounding moves a token over a threshold or into the next bin
            near = {"rel": 1e-4} if name.startswith(OF_THE_OLD_POLICY) else {"rel": 0.03, "abs": 5e-3}
            assert result["figures"][name] == pytest.approx(value, nan_ok=True, **near), name
    for name, tensor in wanted["weights"].items():
        assert_close(results[0]["weights"][name], tensor, atol=2e-4, rtol=0)
    # each sequence lies with one replica
    assert sum(dict(result["tokens"] for result in results).values()) == wanted["computed"]
