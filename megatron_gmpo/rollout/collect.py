"""From prompts to scored groups: generate responses, score them, and choose the groups to train on."""

from __future__ import annotations

from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import fsum
from statistics import pstdev
from typing import Any, Protocol

import numpy as np

from ..batch.samples import Prompt, SampleGroup
from ..config import RolloutConfig
from ..distributed import agreed, all_gather_objects, rank, world_size
from ..metrics.figures import Metric
from ..rewards import Reward
from .engine import RolloutEngine, SamplingParams


class Prompts(Protocol):
    """A stream of prompts, equal on every rank."""

    def next(self, n: int) -> list[Prompt]: ...

    def state_dict(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Collected:
    """The scored groups of a step, and metrics over all groups generated for it, including dropped ones."""

    groups: list[SampleGroup]
    metrics: dict[str, Metric]


class Collector:
    """Draw prompts, generate up to ``max_staleness`` steps ahead, and choose the groups of each step.

    The prompts of a step are submitted together, and the step waits for all of their responses, because
    training on the responses that finish first would prefer short responses. So no sample is older than
    ``max_staleness`` steps, unless its server kept older weights. A group with such a sample is dropped and
    counted.
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
        # for each step generated ahead: state of the prompt stream before its draw, and its ticket
        self._ahead: deque[tuple[dict[str, Any], Any]] = deque()

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the prompt stream of the first prompt that was not trained on yet."""
        return self._ahead[0][0] if self._ahead else self._prompts.state_dict()

    def drop_ahead(self) -> None:
        """Wait for the responses generated ahead and discard them with their prompts.

        A rollback to an older checkpoint calls this, because its weights did not generate the responses.
        """
        engine: Any = self._engine
        while self._ahead:
            engine.wait(self._ahead.popleft()[1])

    def collect(self, steps_left: int = 1) -> Collected:
        """Generate and score ``cfg.prompts_per_step`` groups. Collective; all ranks get equal results.

        A sample's reward is the reward function's value plus ``overlong_penalty``. Dynamic sampling (DAPO,
        arXiv 2503.14476, equation 11) filters groups by the reward function's value alone: a group in which
        all responses are equally good would be trained on its lengths only. ``drop`` leaves such groups out.
        ``resample`` also draws new prompts to replace them, at most ``max_resample_rounds`` times. If no
        group is left, the first draw is kept without its penalties, and the step has a zero gradient.

        Args:
            steps_left: remaining steps, including this one; limits the generation ahead.
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
            kept += [g for g in groups if cfg.dynamic_sampling == "off" or len(set(g.rewards)) > 1]
            for sample in (s for g in groups for s in g.samples):
                raw_rewards.append(sample.reward)
                sample.reward += overlong_penalty(sample.response_length, cfg)
            drawn += groups
            used += 1

        chosen = kept or drawn[: cfg.prompts_per_step]
        metrics = rollout_figures(drawn) | {
            "reward/timeouts": Metric(timeouts),
            "rollout/dropped_groups": Metric(len(drawn) - len(chosen)),
            "rollout/resample_rounds": Metric(used - 1),
        }
        if cfg.overlong_buffer:
            metrics["reward/raw_mean"] = Metric(fsum(raw_rewards), len(raw_rewards))
        if cfg.max_staleness:
            metrics |= self._staleness(drawn) | {"rollout/stale_groups": Metric(stale)}
        if not kept:
            for sample, raw in zip((s for g in drawn for s in g.samples), raw_rewards, strict=True):
                sample.reward = raw
        return Collected(chosen, metrics)

    def _generated_ahead(self, steps_left: int) -> tuple[list[SampleGroup], int]:
        """Refill the queue; return the groups submitted first and the number of groups that are too stale."""
        engine: Any = self._engine  # the config allows max_staleness only for engines with submit and wait
        while len(self._ahead) < min(1 + self.cfg.max_staleness, steps_left):
            state = self._prompts.state_dict()
            self._ahead.append(
                (state, engine.submit(self._prompts.next(self.cfg.prompts_per_step), self._sampling))
            )
        _, ticket = self._ahead.popleft()
        groups: list[SampleGroup] = engine.wait(ticket)
        oldest = self._engine.version - self.cfg.max_staleness
        fresh = [group for group in groups if all(s.policy_version >= oldest for s in group.samples)]
        stale = len(groups) - len(fresh)
        return fresh or engine.generate([group.prompt for group in groups], self._sampling), stale

    def _staleness(self, groups: list[SampleGroup]) -> dict[str, Metric]:
        """Return the age in steps of the weights that generated the response tokens."""
        samples = [sample for group in groups for sample in group.samples]
        ages = self._engine.version - np.concatenate([s.token_versions[s.response_mask] for s in samples])
        return {
            "rollout/staleness_mean": Metric(float(ages.sum()), len(ages)),
            "rollout/staleness_max": Metric(float(ages.max()), op="max"),
        }


def rollout_figures(groups: list[SampleGroup]) -> dict[str, Metric]:
    """Return rewards and lengths of scored groups; ``reward/std`` is the mean over groups."""
    samples = [s for g in groups for s in g.samples]
    lengths = [s.response_length for s in samples]
    # fsum rounds once. The built-in sum does so since Python 3.12 only, so resumed runs would differ across
    # versions.
    return {
        "reward/mean": Metric(fsum(s.reward for s in samples), len(samples)),
        "reward/std": Metric(fsum(pstdev(g.rewards) for g in groups), len(groups)),
        "response_length/mean": Metric(sum(lengths), len(samples)),
        "response_length/max": Metric(max(lengths), op="max"),
        "rollout/truncated_fraction": Metric(sum(s.finish_reason == "length" for s in samples), len(samples)),
    }


def score(groups: list[SampleGroup], reward: Reward) -> int:
    """Set ``reward`` of every sample. Collective: each rank scores its share of the groups.

    Returns:
        The number of timeouts on all ranks. A reward with a time limit counts its timeouts in the attribute
        ``timeouts``.

    Raises:
        RunError: the reward raised it on some rank; see ``agreed``.
    """
    before: int = getattr(reward, "timeouts", 0)
    mine: list[list[float]] = []
    pool = ThreadPoolExecutor()
    with agreed():
        try:
            pending = [
                [pool.submit(reward, g.prompt, s.text) for s in g.samples]
                for g in groups[rank() :: world_size()]
            ]
            mine = [[float(p.result()) for p in row] for row in pending]
        finally:  # an error, or SIGINT, does not wait for the other responses
            pool.shutdown(wait=False, cancel_futures=True)
    timeouts = 0
    for r, (rows, late) in enumerate(all_gather_objects((mine, getattr(reward, "timeouts", 0) - before))):
        for group, values in zip(groups[r :: world_size()], rows, strict=True):
            for sample, value in zip(group.samples, values, strict=True):
                sample.reward = value
        timeouts += late
    return timeouts


def overlong_penalty(response_length: int, cfg: RolloutConfig) -> float:
    """Return DAPO's soft overlong punishment (arXiv 2503.14476, equation 13).

    It is 0 up to ``max_new_tokens - overlong_buffer`` tokens and falls linearly to ``-overlong_penalty`` at
    ``max_new_tokens``.
    """
    if cfg.overlong_buffer == 0:
        return 0.0
    excess = response_length - (cfg.max_new_tokens - cfg.overlong_buffer)
    return -cfg.overlong_penalty * max(0, excess) / cfg.overlong_buffer
