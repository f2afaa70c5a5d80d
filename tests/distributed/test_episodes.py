"""Episodes of several turns, in every kind of layout: loss, gradient and weights equal a float64 reference.

The samples take the way of the training loop: index, plan, exchange, and the packed microbatches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron_gmpo.batch.assembly import make_train_batch, whole_batch
from megatron_gmpo.batch.exchange import Exchange
from megatron_gmpo.batch.index import StepIndex
from megatron_gmpo.batch.samples import Episode, Prompt, Sample, SampleGroup
from megatron_gmpo.config import Config
from megatron_gmpo.distributed import Nodes, rank, world_size
from megatron_gmpo.losses.advantages import group_advantages
from megatron_gmpo.losses.objective import make_objective
from megatron_gmpo.metrics.figures import value_of
from megatron_gmpo.rollout.collect import replayed

from ..support import cases, reference
from ..support.batches import whole
from ..support.ranks import RankPool
from .test_layouts import CLIP, CLIP_GRAD, DENSE, EPS, LR, MOE, STEPS, Reference, check, config
from .test_layouts import LAYOUTS as DATA

pytestmark = pytest.mark.distributed

EPISODES = [
    ["pppsssoosooossss", "ppppsoosoossoo", "ppppp", "ppssssssssss"],
    ["pps", "ppsososososos", "ppsssssooooooooooosssss", "ppsoos"],
    ["ppsssoos", "ppsoss"],
]
"""Prompt, sampled and observed tokens. One episode has no turn, and one ends with an observation."""
REWARDS = [[1.0, 0.0, 0.5, -1.0], [2.0, 1.0, 0.0, 0.25], [1.0, 1.0]]
"""The last group has no advantage: its sequences count in N, and only a penalty has a gradient there."""
TRUNCATED = (1, 3)
"""Group and place of the episode that reached a limit, with ``mask_truncated``."""
UNITS = ("episode", "turn")


def make_groups() -> list[SampleGroup]:
    """Return the episodes with tokens that all differ, and experts that no model chose."""
    generator = torch.Generator().manual_seed(5)
    tokens = iter((3 + torch.randperm(256, generator=generator)).tolist())
    groups = []
    for number, (episodes, rewards) in enumerate(zip(EPISODES, REWARDS, strict=True)):
        samples = []
        for place, (episode, reward) in enumerate(zip(episodes, rewards, strict=True)):
            length = len(episode)
            experts = torch.rand(length - 1, 4, 4, generator=generator).topk(2).indices
            samples.append(
                Sample(
                    [next(tokens) for _ in episode],
                    [kind == "s" for kind in episode],
                    [0.0] * length,
                    "",
                    "length" if (number, place) == TRUNCATED else "stop",
                    0,
                    reward,
                    routed_experts=experts.numpy(),
                )
            )
        groups.append(SampleGroup(Prompt(str(number), ""), samples))
    return groups


@pytest.fixture(scope="session")
def known(expected: Reference, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """Return a function that trains the reference on the episodes once for each family, unit and routing."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}

    def train(family: Any, unit: str, replays: bool = False, **penalties: float) -> dict[str, Any]:
        key = (family, unit, replays, *penalties.items())
        if key not in found:
            path, groups = expected.model(family), make_groups()
            batch = whole_batch(groups)
            experts = batch.routed_experts.long() if replays else None
            if experts is not None:
                # of last tokens, which predict nothing
                experts[batch.lengths.cumsum(0) - 1] = torch.tensor([0, 1])
            logprobs = reference.batch_logprobs(path, batch, experts=experts)
            noise = torch.randn(len(logprobs), generator=torch.Generator().manual_seed(1)) * 0.4
            batch.old_logprobs = torch.where(batch.response_mask, logprobs.float() + noise, 0.0)
            rewards = [torch.tensor(row) for row in REWARDS]
            batch.advantages = torch.cat([row - row.mean() for row in rewards])
            bounds = [0, *batch.lengths.cumsum(0).tolist()]
            for number, sample in enumerate(sample for group in groups for sample in group.samples):
                span = slice(bounds[number], bounds[number + 1])
                sample.rollout_logprobs = batch.old_logprobs[span].numpy()
                if sample.finish_reason == "length":
                    batch.response_mask[span] = False
                # without a penalty, a sequence without an advantage is not computed
                left_out = batch.advantages[number] == 0 and not penalties
                if left_out or sample.finish_reason == "length":
                    logprobs[span] = 0
            found[key] = reference.train(
                path,
                batch,
                STEPS,
                tmp_path_factory.mktemp("episodes"),
                lr=LR,
                eps=EPS,
                clip_grad=CLIP_GRAD,
                experts=experts,
                loss="gmpo",
                clip_low=CLIP,
                clip_high=CLIP,
                unit=unit,
                **{"kl_coef": 0.0, "entropy_coef": 0.0} | penalties,
            )
            before = reference.saved_tensors(path)
            found[key] |= {"path": path, "before": before, "logprobs": logprobs, "groups": groups}
        return found[key]

    return train


def train(cfg: Config, groups: list[SampleGroup], steps: int) -> dict[str, Any]:
    """Run ``steps`` optimizer steps like ``train.Loop``; the groups lie with different ranks."""
    with cases.opened(cfg) as policy:
        objective = make_objective(cfg.algorithm, is_moe=policy.description.is_moe, max_new_tokens=64)
        mine = {number: g for number, g in enumerate(groups) if number % world_size() == rank()}
        index = StepIndex.gather(mine, len(groups)).without_truncated()
        advantages = group_advantages(index, objective.advantage)
        plan = policy.plan(index, advantages, objective)
        routing = policy.description.routing if cfg.needs_rollout_routing else None
        exchange = Exchange(Nodes("here", 60.0), policy.replica, "", 60.0, routing)
        unit = cfg.algorithm.unit
        batch = make_train_batch(mine, index, advantages, plan, exchange, policy.replica, unit)
        policy.set_old_logprobs(batch)
        logprobs = whole(whole_batch(groups), batch, batch.old_logprobs)
        if policy.reference:
            batch.ref_logprobs = policy.reference_logprobs(batch)
        history = [policy.train_step(batch.minibatch(0), objective) for _ in range(steps)]
        return {
            "logprobs": logprobs,
            "history": [{name: value_of(m) for name, m in step.items()} for step in history],
            "weights": cases.weights_on_rank_0(policy),
        }


CASES = [
    ("qwen3", "dp2", False),
    ("qwen3", "cp2", False),
    ("qwen3", "pp2", False),
    ("qwen3", "cp2 pp2", False),
    ("qwen3_moe", "tp2 ep2", False),
    ("qwen3_moe", "pp2 cp2 ep2", False),
    ("qwen3_moe", "tp2 ep2", True),
    ("qwen3_moe", "pp2 cp2 ep2", True),
]
"""Family, layout, and whether training replays the rollout engine's experts (R3)."""


def settings(path: Any, layout: str, replays: bool, max_tokens: int, **algorithm: Any) -> tuple[int, Config]:
    world_size, parallel, _ = (DATA | DENSE | MOE)[layout]
    # the ratios divide by the engine's log probabilities, which the samples carry
    algorithm |= {"old_logprobs": "rollout", "advantage": "mean"}
    algorithm |= {"moe_routing_replay": "rollout"} if replays else {}
    rollout = {"routed_experts": replays}
    cfg = config(path, parallel, max_tokens=max_tokens, algorithm=algorithm, rollout=rollout)
    return world_size, cfg


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize(("family", "layout", "replays"), CASES)
def test_episodes_equal_the_float64_reference(
    ranks: RankPool, known: Any, family: str, layout: str, replays: bool, unit: str
) -> None:
    wanted = known(family, unit, replays)
    # a sequence each, or all of a replica in one microbatch
    max_tokens = 1 if layout in ("pp2", "tp2 ep2") else 4096
    size, cfg = settings(wanted["path"], layout, replays, max_tokens, unit=unit)
    check(ranks.run(size, train, cfg, wanted["groups"], STEPS), wanted)


def figures(groups: list[SampleGroup], owners: list[int]) -> dict[str, float]:
    """Return the figures of a step whose groups lie with these ranks, without rewards and lengths."""
    mine = {number: group for number, group in enumerate(groups) if owners[number] == rank()}
    metrics = replayed(mine).metrics
    return {name: value_of(metric) for name, metric in metrics.items() if name.startswith("episode/")}


def test_figures_of_episodes_are_those_of_all_ranks(ranks: RankPool) -> None:
    """Only one rank has episodes of a name, and one rank has none at all."""
    groups = make_groups()
    for group, name in zip(groups, ("pick", "look", ""), strict=True):
        for sample in group.samples:
            sample.episode = Episode("done", name, success=sample.reward > 0.5, tool_calls=len(name))
    alone = figures(groups, [0, 0, 0])
    assert alone["episode/success/pick"] == 1 / 4
    assert alone["episode/success"] == (1 + 2 + 2) / 10
    assert ranks.run(3, figures, groups, [0, 2, 2]) == [alone] * 3


def test_the_units_differ(known: Any) -> None:
    """The tests above would not see a wrong unit otherwise."""
    episode, turn = (known("qwen3", unit)["losses"][0] for unit in UNITS)
    assert episode != pytest.approx(turn, rel=0.05)


def test_penalties_are_means_over_the_tokens_of_a_turn(ranks: RankPool, known: Any) -> None:
    penalties = {"kl_coef": 0.2, "entropy_coef": 0.05}
    wanted = known("qwen3", "turn", **penalties)
    size, cfg = settings(wanted["path"], "cp2", False, 40, unit="turn", **penalties)
    check(ranks.run(size, train, cfg, wanted["groups"], STEPS), wanted)
