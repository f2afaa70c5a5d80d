"""From prompts to scored groups: generate, score, and choose the groups to train on."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from statistics import pstdev
from typing import Protocol

from ..config import RolloutConfig
from ..distributed import all_gather_objects, rank, world_size
from ..types import Metric, Prompt, SampleGroup
from .engine import RolloutEngine, SamplingParams

Reward = Callable[[Prompt, str], float]


class Prompts(Protocol):
    """A stream of prompts, the same on every rank."""

    def next(self, n: int) -> list[Prompt]: ...


@dataclass(frozen=True)
class Collected:
    """The groups of a step, with rewards, and figures over everything generated for it, dropped groups too."""

    groups: list[SampleGroup]
    metrics: dict[str, Metric]


def collect(engine: RolloutEngine, prompts: Prompts, reward: Reward, cfg: RolloutConfig) -> Collected:
    """Generates and scores ``cfg.prompts_per_step`` groups; collective, with equal results on every rank.

    A sample's reward is the reward function's plus ``overlong_penalty``. Dynamic sampling (DAPO, arXiv 2503.14476, section 3.2) judges
    groups by it, since a group whose rewards are all equal has no advantage and so no gradient. ``drop`` leaves such groups out;
    ``resample`` also draws new prompts in their place, at most ``max_resample_rounds`` times. If no group at all has variance the first
    draw is kept: a step of gradient zero rather than none.
    """
    sampling = SamplingParams(
        n=cfg.samples_per_prompt,
        max_new_tokens=cfg.max_new_tokens,
        temperature=cfg.temperature,
        top_p=cfg.top_p,
        top_k=cfg.top_k,
        stop=cfg.stop,
    )
    rounds = 1 + (cfg.max_resample_rounds if cfg.dynamic_sampling == "resample" else 0)
    drawn: list[SampleGroup] = []
    kept: list[SampleGroup] = []
    raw_rewards: list[float] = []
    timeouts = 0
    used = 0
    while used < rounds and len(kept) < cfg.prompts_per_step:
        groups = engine.generate(prompts.next(cfg.prompts_per_step - len(kept)), sampling)
        timeouts += score(groups, reward)
        for sample in (s for g in groups for s in g.samples):
            raw_rewards.append(sample.reward)
            sample.reward += overlong_penalty(sample.response_length, cfg)
        drawn += groups
        kept += [g for g in groups if cfg.dynamic_sampling == "off" or len(set(g.rewards)) > 1]
        used += 1

    metrics = rollout_figures(drawn) | {
        "reward/timeouts": Metric(timeouts),
        "rollout/dropped_groups": Metric(len(drawn) - len(kept)),
        "rollout/resample_rounds": Metric(used - 1),
    }
    if cfg.overlong_buffer:
        metrics["reward/raw_mean"] = Metric(sum(raw_rewards), len(raw_rewards))
    return Collected(kept or drawn[: cfg.prompts_per_step], metrics)


def rollout_figures(groups: list[SampleGroup]) -> dict[str, Metric]:
    """Rewards and lengths of scored groups; ``reward/std`` is the mean of the groups' own."""
    samples = [s for g in groups for s in g.samples]
    lengths = [s.response_length for s in samples]
    return {
        "reward/mean": Metric(sum(s.reward for s in samples), len(samples)),
        "reward/std": Metric(sum(pstdev(g.rewards) for g in groups), len(groups)),
        "response_length/mean": Metric(sum(lengths), len(samples)),
        "response_length/max": Metric(max(lengths), op="max"),
        "rollout/truncated_fraction": Metric(sum(s.finish_reason == "length" for s in samples), len(samples)),
    }


def score(groups: list[SampleGroup], reward: Reward) -> int:
    """Sets ``reward`` of every sample; collective: each rank scores its share of the groups, then all hold all rewards.

    Returns:
        How many answers timed out, on all ranks: a reward with a time limit counts them in its attribute ``timeouts``.
    """
    before: int = getattr(reward, "timeouts", 0)
    with ThreadPoolExecutor() as pool:
        pending = [[pool.submit(reward, g.prompt, s.text) for s in g.samples] for g in groups[rank() :: world_size()]]
        mine = [[float(p.result()) for p in row] for row in pending]
    timeouts = 0
    for r, (rows, late) in enumerate(all_gather_objects((mine, getattr(reward, "timeouts", 0) - before))):
        for group, values in zip(groups[r :: world_size()], rows, strict=True):
            for sample, value in zip(group.samples, values, strict=True):
                sample.reward = value
        timeouts += late
    return timeouts


def overlong_penalty(response_length: int, cfg: RolloutConfig) -> float:
    """DAPO's soft overlong punishment (arXiv 2503.14476, equation 13): 0 up to ``max_new_tokens - overlong_buffer`` tokens, then falling
    linearly to ``-overlong_penalty`` at ``max_new_tokens``."""
    if cfg.overlong_buffer == 0:
        return 0.0
    excess = response_length - (cfg.max_new_tokens - cfg.overlong_buffer)
    return -cfg.overlong_penalty * max(0, excess) / cfg.overlong_buffer
