"""From prompts to scored groups: generate, score, and choose the groups to train on."""

from __future__ import annotations

from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from statistics import pstdev
from typing import Any, Protocol

import numpy as np

from ..batch.samples import Prompt, SampleGroup
from ..config import RolloutConfig
from ..distributed import all_gather_objects, rank, world_size
from ..metrics.figures import Metric
from ..rewards import Reward
from .engine import RolloutEngine, SamplingParams


class Prompts(Protocol):
    """A stream of prompts, the same on every rank."""

    def next(self, n: int) -> list[Prompt]: ...

    def state_dict(self) -> dict[str, int]: ...


@dataclass(frozen=True)
class Collected:
    """The groups of a step, with rewards, and figures over everything generated for it, dropped groups too."""

    groups: list[SampleGroup]
    metrics: dict[str, Metric]


class Collector:
    """Draws prompts, has them answered, up to ``max_staleness`` steps ahead of their use, and chooses the groups of each step.

    A step's prompts are submitted together and it waits for all of them, however long a response is: taking whoever finishes first
    would prefer short ones. So no sample is older than ``max_staleness`` steps, unless its server kept older weights; groups with such
    a sample are dropped whole, and counted.
    """

    def __init__(self, engine: RolloutEngine, prompts: Prompts, reward: Reward, cfg: RolloutConfig) -> None:
        self.cfg, self._engine, self._prompts, self._reward = cfg, engine, prompts, reward
        self._sampling = SamplingParams(
            n=cfg.samples_per_prompt,
            max_new_tokens=cfg.max_new_tokens,
            temperature=cfg.temperature,
            top_p=cfg.top_p,
            top_k=cfg.top_k,
            stop=cfg.stop,
            router_noise=cfg.router_noise,
        )
        self._ahead: deque[tuple[dict[str, int], Any]] = (
            deque()
        )  # state of the stream before a draw, its ticket

    def state_dict(self) -> dict[str, int]:
        """Where the stream of prompts goes on after a resume: with those that were drawn and not yet trained on."""
        return self._ahead[0][0] if self._ahead else self._prompts.state_dict()

    def drop_ahead(self) -> None:
        """Waits for what is being generated ahead and throws it away, with its prompts: its weights are not to be trained on."""
        engine: Any = self._engine
        while self._ahead:
            engine.wait(self._ahead.popleft()[1])

    def collect(self, steps_left: int = 1) -> Collected:
        """Generates and scores ``cfg.prompts_per_step`` groups; collective, with equal results on every rank.

        A sample's reward is the reward function's plus ``overlong_penalty``. Dynamic sampling (DAPO, arXiv 2503.14476, section 3.2)
        judges groups by it, since a group whose rewards are all equal has no advantage and so no gradient. ``drop`` leaves such groups
        out; ``resample`` also draws new prompts in their place, at most ``max_resample_rounds`` times. If no group at all has variance
        the first draw is kept: a step of gradient zero rather than none.

        Args:
            steps_left: steps still to collect for, this one included: nothing is generated ahead for more.
        """
        cfg = self.cfg
        rounds = 1 + (cfg.max_resample_rounds if cfg.dynamic_sampling == "resample" else 0)
        drawn: list[SampleGroup] = []
        kept: list[SampleGroup] = []
        raw_rewards: list[float] = []
        timeouts = stale = used = 0
        while used < rounds and len(kept) < cfg.prompts_per_step:
            if used == 0 and cfg.max_staleness:
                groups, stale = self._generated_ahead(steps_left)
            else:
                groups = self._engine.generate(
                    self._prompts.next(cfg.prompts_per_step - len(kept)), self._sampling
                )
            timeouts += score(groups, self._reward)
            for sample in (s for g in groups for s in g.samples):
                raw_rewards.append(sample.reward)
                sample.reward += overlong_penalty(sample.response_length, cfg)
            drawn += groups
            kept += [g for g in groups if cfg.dynamic_sampling == "off" or len(set(g.rewards)) > 1]
            used += 1

        chosen = kept or drawn[: cfg.prompts_per_step]
        metrics = rollout_figures(drawn) | {
            "reward/timeouts": Metric(timeouts),
            "rollout/dropped_groups": Metric(len(drawn) - len(chosen)),
            "rollout/resample_rounds": Metric(used - 1),
        }
        if cfg.overlong_buffer:
            metrics["reward/raw_mean"] = Metric(sum(raw_rewards), len(raw_rewards))
        if cfg.max_staleness:
            metrics |= self._staleness(drawn) | {"rollout/stale_groups": Metric(stale)}
        return Collected(chosen, metrics)

    def _generated_ahead(self, steps_left: int) -> tuple[list[SampleGroup], int]:
        """The groups submitted longest ago, and how many of them were too stale; the queue is filled up again."""
        engine: Any = self._engine  # the config lets only engines with submit and wait be ahead
        while len(self._ahead) < min(1 + self.cfg.max_staleness, steps_left):
            state = self._prompts.state_dict()
            self._ahead.append(
                (state, engine.submit(self._prompts.next(self.cfg.prompts_per_step), self._sampling))
            )
        _, ticket = self._ahead.popleft()
        groups: list[SampleGroup] = engine.wait(ticket)
        oldest = self._engine.version - self.cfg.max_staleness
        fresh = [
            group for group in groups if all(sample.policy_version >= oldest for sample in group.samples)
        ]
        return fresh or engine.generate([group.prompt for group in groups], self._sampling), len(
            groups
        ) - len(fresh)

    def _staleness(self, groups: list[SampleGroup]) -> dict[str, Metric]:
        """How many steps older than the policy the weights behind the response tokens are."""
        samples = [sample for group in groups for sample in group.samples]
        ages = self._engine.version - np.concatenate([s.token_versions[s.response_mask] for s in samples])
        return {
            "rollout/staleness_mean": Metric(float(ages.sum()), len(ages)),
            "rollout/staleness_max": Metric(float(ages.max()), op="max"),
        }


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
        pending = [
            [pool.submit(reward, g.prompt, s.text) for s in g.samples] for g in groups[rank() :: world_size()]
        ]
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
