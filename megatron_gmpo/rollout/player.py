"""What an engine needs to play the episodes of a run."""

from __future__ import annotations

from collections.abc import Coroutine
from dataclasses import replace
from typing import Any

from ..batch.samples import Prompt, Sample
from ..config import Config, RolloutConfig
from ..errors import InputError
from .ending import Ending
from .engine import SamplingParams
from .environments.pool import EnvironmentPool
from .environments.tools import tool_schemas
from .episode import EpisodeLimits, Generate, play
from .images import RunImages
from .turns import TurnTemplate


class Player:
    """The environments, the chat template and the limits of a run's episodes.

    Args:
        cfg: names the environment or the tools.
        seed: the run's seed.
        template: gives the tokens between turns.
        limits: those of training; sampling parameters replace ``max_new_tokens``.
        images: the images of the run; None for a model without vision.
    """

    def __init__(
        self,
        cfg: RolloutConfig,
        seed: int,
        template: TurnTemplate,
        limits: EpisodeLimits,
        images: RunImages | None = None,
    ) -> None:
        self._cfg, self._seed, self._images = cfg, seed, images
        self.template, self.limits = template, limits
        self._pool: EnvironmentPool | None = None

    def start(self) -> None:
        """Start the environments' processes, in a trainer process that plays, unless they run.

        Raises:
            InputError, RunError: see ``EnvironmentPool``.
        """
        self._pool = self._pool or EnvironmentPool(self._cfg, self._seed)

    def play(
        self,
        prompt: Prompt,
        position: int,
        number: int,
        sampling: SamplingParams,
        ending: Ending,
        generate: Generate,
    ) -> Coroutine[Any, Any, Sample]:
        """Play an episode; see ``episode.play``.

        Args:
            position: the prompt's position in its batch.
            number: number of the sample in its group.
        """
        assert self._pool, "start was not called"
        return play(
            prompt,
            number,
            sampling.draw + position,
            pool=self._pool,
            template=self.template,
            limits=replace(self.limits, max_new_tokens=sampling.max_new_tokens),
            ending=ending,
            generate=generate,
            images=self._images,
        )

    def close(self) -> None:
        """End the environments' processes."""
        if self._pool:
            self._pool.close()


def make_player(
    cfg: Config, tokenizer: Any, positions: int, images: RunImages | None = None
) -> Player | None:
    """Return the player of the config's episodes, not started; None without an environment and tools.

    Args:
        tokenizer: the policy's tokenizer.
        positions: maximum tokens of a prompt and its episode together.
        images: the images of the run; None for a model without vision.

    Raises:
        InputError: see ``TurnTemplate`` and ``tool_schemas``; or a benchmark has a chat template of its
            own.
    """
    rollout, data = cfg.rollout, cfg.data
    if not rollout.has_episodes:
        return None
    for name, benchmark in cfg.eval.sets.items():
        for field in ("use_chat_template", "chat_template_kwargs"):
            value, expected = getattr(benchmark, field), getattr(data, field)
            if value != expected:
                raise InputError(
                    f"eval.sets.{name}.{field} = {value!r}: episodes have one chat template, so it must be "
                    f"data.{field} = {expected!r}"
                )
    longest = max(each.max_prompt_tokens for each in (data, *cfg.eval.sets.values()))
    limits = EpisodeLimits(
        max_turns=rollout.max_turns,
        max_new_tokens=rollout.max_new_tokens,
        max_episode_tokens=rollout.max_response_tokens,
        max_prompt_tokens=min(longest, positions - rollout.max_response_tokens),
    )
    template = TurnTemplate(tokenizer, data, tools=tool_schemas(rollout), keep_thinking=rollout.keep_thinking)
    return Player(rollout, cfg.seed, template, limits, images)
