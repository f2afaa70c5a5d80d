"""From prompts to scored groups: generate responses, score them, and choose the groups to train on."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from math import fsum
from statistics import pstdev
from typing import Any, Protocol, get_args

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import ArrayLike

from ..batch.index import StepIndex
from ..batch.samples import EpisodeEnd, Prompt, Sample, SampleGroup
from ..config import RolloutConfig
from ..distributed import agreed, gather_bytes, rank, sum_over_ranks, world_size
from ..errors import RunError
from ..metrics.across_ranks import RankReduction
from ..metrics.figures import Metric
from ..rewards import Reward, environment_reward
from .engine import RolloutEngine, SamplingParams

log = logging.getLogger(__name__)

Groups = dict[int, SampleGroup]
"""Groups that this rank holds, by their position in the step. Every position is on exactly one rank."""


class Prompts(Protocol):
    """A stream of prompts, equal on every rank; see ``PromptStream``."""

    @property
    def place(self) -> int: ...

    def next(self, n: int) -> list[Prompt]: ...

    def state_dict(self, pending: Sequence[tuple[int, int]] = ()) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Collected:
    """The scored groups of a step.

    Attributes:
        groups: this rank's groups.
        index: the sequences of all ranks' groups.
        metrics: metrics over all groups generated for the step, including dropped ones.
    """

    groups: Groups
    index: StepIndex
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
        self._over_ranks = RankReduction(torch.device("cpu"))
        self._sampling = SamplingParams(
            n=cfg.samples_per_prompt,
            max_new_tokens=cfg.max_new_tokens,
            temperature=cfg.temperature,
            top_p=cfg.top_p,
            top_k=cfg.top_k,
            stop=cfg.stop,
            router_noise=cfg.router_noise,
        )
        # for each step generated ahead: places of its draw in the prompt stream, prompts and ticket
        self._ahead: deque[tuple[tuple[int, int], list[Prompt], Any]] = deque()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the prompt stream from which the steps generated ahead are drawn again."""
        return self._prompts.state_dict([places for places, *_ in self._ahead])

    def drop_ahead(self) -> None:
        """Wait for the responses generated ahead and discard them with their prompts.

        A rollback to an older checkpoint calls this, because its weights did not generate the responses.
        """
        engine: Any = self._engine
        while self._ahead:
            engine.wait(self._ahead.popleft()[2])

    def collect(self, steps_left: int = 1) -> Collected:
        """Generate and score ``cfg.prompts_per_step`` groups. Collective.

        Every rank keeps the groups that it sampled. All ranks choose the same groups. A group in which an
        environment failed is left out, see ``_Failed``.

        A sample's reward is the reward function's value plus ``overlong_penalty``. Dynamic sampling (DAPO,
        arXiv 2503.14476, equation 11) filters groups by the reward function's value alone: a group in which
        all responses are equally good would be trained on its lengths only. ``drop`` leaves such groups out.
        ``resample`` also draws new prompts to replace groups, at most ``max_resample_rounds`` times. If none
        is left, the first draw is kept without its penalties, and the step has a zero gradient.

        Args:
            steps_left: remaining steps, including this one; limits the generation ahead.

        Raises:
            RunError: an environment failed in every group.
        """
        cfg = self.cfg
        rounds = 1 + (cfg.max_resample_rounds if cfg.dynamic_sampling == "resample" else 0)
        groups: Groups = {}
        parts: list[StepIndex] = []
        kept: list[int] = []  # groups that may be trained on
        failed = _Failed(cfg.has_episodes)
        timeouts = stale = used = 0
        while used < rounds and len(kept) < cfg.prompts_per_step:
            if used == 0 and cfg.max_staleness:
                new, count, stale = self._generated_ahead(steps_left, failed)
            else:
                count = cfg.prompts_per_step - len(kept)
                prompts = self._prompts.next(count)
                sampled = self._engine.generate(prompts, self._sampling_at(self._prompts.place - count))
                new, count = failed.leave_out(sampled, count)
            used += 1
            if count == 0:
                continue
            timeouts += score(new, self._reward)
            first = sum(part.num_groups for part in parts)
            groups |= {first + position: group for position, group in new.items()}
            parts.append(StepIndex.gather(new, count))
            for number, rewards in enumerate(parts[-1].rewards_of_groups(), first):
                if cfg.dynamic_sampling == "off" or (rewards != rewards[0]).any():
                    kept.append(number)
        failed.report(end_run=not parts)

        drawn = StepIndex.joined(parts)
        penalized = replace(drawn, reward=drawn.reward + overlong_penalty(drawn.episode_length, cfg))
        chosen = np.array(kept or range(min(cfg.prompts_per_step, drawn.num_groups)))
        episodes = episode_figures([*groups.values(), *failed.mine])
        metrics = rollout_figures(penalized) | self._over_ranks(episodes)[0] | failed.figures()
        metrics |= {
            "reward/timeouts": Metric(timeouts),
            "rollout/dropped_groups": Metric(drawn.num_groups - len(chosen)),
            "rollout/resample_rounds": Metric(used - 1),
        }
        if cfg.overlong_buffer:
            metrics["reward/raw_mean"] = Metric(fsum(drawn.reward.tolist()), len(drawn))
        if cfg.max_staleness:
            metrics |= self._staleness(drawn) | {"rollout/stale_groups": Metric(stale)}
        return self._chosen(groups, (penalized if kept else drawn).take(chosen), chosen, metrics)

    def _chosen(
        self, drawn: Groups, index: StepIndex, chosen: np.ndarray, metrics: dict[str, Metric]
    ) -> Collected:
        """Return this rank's chosen groups with the rewards of the index."""
        groups = _renumbered(drawn, chosen)
        rewards = list(index.rewards_of_groups())
        for position, group in groups.items():
            for sample, reward in zip(group.samples, rewards[position].tolist(), strict=True):
                sample.reward = reward
        return Collected(groups, index, metrics)

    def _generated_ahead(self, steps_left: int, failed: _Failed) -> tuple[Groups, int, int]:
        """Refill the queue; return the groups submitted first, and the numbers of fresh and of stale groups.

        If all groups are too stale, their prompts are sampled again.
        """
        engine: Any = self._engine  # the config allows max_staleness only for engines with submit and wait
        while len(self._ahead) < min(1 + self.cfg.max_staleness, steps_left):
            start, prompts = self._prompts.place, self._prompts.next(self.cfg.prompts_per_step)
            places = (start, self._prompts.place)
            sampling = self._sampling_at(self._prompts.place - len(prompts))
            self._ahead.append((places, prompts, engine.submit(prompts, sampling)))
        places, prompts, ticket = self._ahead.popleft()
        groups, count = failed.leave_out(engine.wait(ticket), len(prompts))
        if count == 0:
            return groups, 0, 0
        index = StepIndex.gather(groups, count)
        oldest = np.minimum.reduceat(index.oldest_version, index.group_bounds[:-1])
        fresh = np.flatnonzero(oldest >= self._engine.version - self.cfg.max_staleness)
        if len(fresh):
            return _renumbered(groups, fresh), len(fresh), count - len(fresh)
        sampled = engine.generate(prompts, self._sampling_at(places[1] - len(prompts)))
        return *failed.leave_out(sampled, len(prompts)), count

    def _sampling_at(self, place: int) -> SamplingParams:
        """Return the sampling of prompts of which the first has this place in the stream."""
        return replace(self._sampling, draw=place)

    def _staleness(self, index: StepIndex) -> dict[str, Metric]:
        """Return the age in steps of the weights that generated the response tokens."""
        version, tokens = self._engine.version, int(index.response_length.sum())
        oldest = index.oldest_version[index.response_length > 0].min()
        return {
            "rollout/staleness_mean": Metric(float(version * tokens - index.version_sum.sum()), tokens),
            "rollout/staleness_max": Metric(float(version - oldest), op="max"),
        }


class _Failed:
    """The groups of a step in which an environment failed.

    The whole group is left out. Its other episodes alone would make a biased group: environments fail more
    often in long episodes, so short ones would be left, and the failed one has no reward to compare with.

    Args:
        has_episodes: whether samples are episodes; if not, nothing is left out.

    Attributes:
        groups: number of groups on all ranks.
        episodes: number of failed episodes on all ranks.
        mine: this rank's groups.
    """

    def __init__(self, has_episodes: bool) -> None:
        self._has_episodes = has_episodes
        self.groups = self.episodes = 0
        self.mine: list[SampleGroup] = []

    def leave_out(self, drawn: Groups, count: int) -> tuple[Groups, int]:
        """Return this rank's other groups, and the number of other groups on all ranks. Collective."""
        if not self._has_episodes:
            return drawn, count
        failures = torch.zeros(count, dtype=torch.int64)
        for position, group in drawn.items():
            failures[position] = sum(sample.finish_reason == "abort" for sample in group.samples)
        if world_size() > 1:
            dist.all_reduce(failures)
        self.mine += [group for position, group in sorted(drawn.items()) if failures[position]]
        self.groups += int((failures > 0).sum())
        self.episodes += int(failures.sum())
        whole = np.flatnonzero(failures == 0)
        return _renumbered(drawn, whole), len(whole)

    def figures(self) -> dict[str, Metric]:
        """Return the counts; none without episodes."""
        if not self._has_episodes:
            return {}
        return {
            "rollout/failed_groups": Metric(self.groups),
            "rollout/environment_errors": Metric(self.episodes),
        }

    def report(self, end_run: bool) -> None:
        """Quote the first error of the lowest rank that has one, if any, in the log of rank 0. Collective.

        Args:
            end_run: raise a ``RunError`` with the error instead, because all groups failed.
        """
        if not self.groups:
            return
        errors = gather_bytes(self._first_error().encode(errors="backslashreplace"))
        first = next((error.decode() for error in errors if error), "")
        if end_run:
            with agreed():
                if rank() == 0:
                    raise RunError(
                        f"environments failed in all {self.groups} groups of the step, first in {first}"
                    )
        elif rank() == 0:
            log.warning(
                "warning: environments failed in %d groups of the step, which are left out, first in %s",
                self.groups,
                first,
            )

    def _first_error(self) -> str:
        """Return the first error of this rank; "" without one."""
        for group in self.mine:
            for number, sample in enumerate(group.samples):
                if sample.episode and sample.episode.error:
                    return f"sample {number} of prompt {group.prompt.id}: {sample.episode.error}"
        return ""


def _renumbered(groups: Groups, chosen: np.ndarray) -> Groups:
    """Return the groups at these positions, which become 0, 1, 2 and so on."""
    return {new: groups[old] for new, old in enumerate(chosen.tolist()) if old in groups}


def replayed(groups: Groups) -> Collected:
    """Return the saved groups of a step, of which each rank has read a share. Collective."""
    index = StepIndex.gather(groups, sum_over_ranks(len(groups)))
    episodes, _ = RankReduction(torch.device("cpu"))(episode_figures(groups.values()))
    return Collected(groups, index, rollout_figures(index) | episodes)


def rollout_figures(index: StepIndex) -> dict[str, Metric]:
    """Return rewards and lengths of scored groups; ``reward/std`` is the mean over groups."""
    # fsum rounds once. The built-in sum does so since Python 3.12 only, so resumed runs would differ across
    # versions.
    deviations = [pstdev(rewards.tolist()) for rewards in index.rewards_of_groups()]
    return {
        "reward/mean": Metric(fsum(index.reward.tolist()), len(index)),
        "reward/std": Metric(fsum(deviations), len(deviations)),
        "response_length/mean": Metric(int(index.response_length.sum()), len(index)),
        "response_length/max": Metric(int(index.response_length.max()), op="max"),
        "rollout/truncated_fraction": Metric(int(index.truncated.sum()), len(index)),
    }


def episode_figures(groups: Iterable[SampleGroup]) -> dict[str, Metric]:
    """Return the figures of this rank's episodes, to reduce over all ranks; none without an episode.

    Those of turns, tools and seconds are means over episodes, ``episode/tokens_per_turn`` is the mean number
    of sampled tokens over turns, and ``episode/ended_{why}`` are shares of the episodes. ``episode/success``,
    and ``episode/success/{name}`` for each name, are shares of the episodes of which the environment told
    success or failure.
    """
    samples = [sample for group in groups for sample in group.samples if sample.episode]
    if not samples:
        return {}
    episodes = [sample.episode for sample in samples if sample.episode]
    turns, count = sum(sample.num_turns for sample in samples), len(episodes)
    figures = {
        "episode/turns": Metric(turns, count),
        "episode/tokens_per_turn": Metric(sum(sample.response_length for sample in samples), turns),
        "episode/tool_calls": Metric(sum(episode.tool_calls for episode in episodes), count),
        "episode/tool_errors": Metric(sum(episode.tool_errors for episode in episodes), count),
        "episode/environment_seconds": Metric(fsum(episode.seconds for episode in episodes), count),
    }
    for why in get_args(EpisodeEnd):
        figures[f"episode/ended_{why}"] = Metric(sum(episode.ended == why for episode in episodes), count)
    told = [(episode.name, episode.success) for episode in episodes if episode.success is not None]
    for name in sorted({"", *(name for name, _ in told)}) if told else ():
        values = [success for other, success in told if name in ("", other)]
        figures["episode/success" + (f"/{name}" if name else "")] = Metric(sum(values), len(values))
    return figures


def score(groups: Mapping[int, SampleGroup], reward: Reward) -> int:
    """Set ``reward`` of every sample of this rank's groups. Collective.

    With ``environment_reward``, episodes have the reward that their environment gave.

    Returns:
        The number of timeouts on all ranks. A reward with a time limit counts its timeouts in the attribute
        ``timeouts``.

    Raises:
        RunError: the reward raised it on some rank; see ``agreed``.
    """
    before: int = getattr(reward, "timeouts", 0)
    pool = ThreadPoolExecutor()
    with agreed():
        try:
            pending = [
                (sample, pool.submit(_reward_of, reward, group.prompt, sample))
                for group in groups.values()
                for sample in group.samples
            ]
            for sample, value in pending:
                sample.reward = float(value.result())
        finally:  # an error, or SIGINT, does not wait for the other responses
            pool.shutdown(wait=False, cancel_futures=True)
    return sum_over_ranks(getattr(reward, "timeouts", 0) - before)


def _reward_of(reward: Reward, prompt: Prompt, sample: Sample) -> float:
    if reward is environment_reward and sample.episode:
        return sample.episode.reward
    return reward(prompt, sample.text)


def overlong_penalty(response_length: ArrayLike, cfg: RolloutConfig) -> np.ndarray:
    """Return DAPO's soft overlong punishment (arXiv 2503.14476, equation 13) of each response length.

    It is 0 up to ``max_response_tokens - overlong_buffer`` tokens and falls linearly to ``-overlong_penalty``
    at ``max_response_tokens``. The length of an episode includes its observations, as that limit does.
    """
    lengths = np.asarray(response_length)
    if cfg.overlong_buffer == 0:
        return np.zeros(lengths.shape)
    excess = lengths - (cfg.max_response_tokens - cfg.overlong_buffer)
    return -cfg.overlong_penalty * np.maximum(0, excess) / cfg.overlong_buffer
