"""Play an episode: turns of the policy alternate with observations of an environment."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..batch.samples import Prompt, Sample
from .ending import Ending
from .response import Response
from .turns import TurnTemplate

if TYPE_CHECKING:
    from .environments.pool import EnvironmentPool  # pyright: ignore[reportMissingImports]

Generate = Callable[[np.ndarray, int], Awaitable[Response]]
"""Sample a turn from the (C,) int32 tokens so far and the maximum number of new tokens.

``routed_experts`` of the response, if recorded, are (C + R - 1, layers, topk).
"""


@dataclass(frozen=True)
class EpisodeLimits:
    """Limits of an episode.

    Attributes:
        max_turns: number of turns.
        max_new_tokens: sampled tokens of one turn.
        max_episode_tokens: tokens after the prompt, of turns and observations together.
        max_prompt_tokens: tokens before the first turn.
    """

    max_turns: int
    max_new_tokens: int
    max_episode_tokens: int
    max_prompt_tokens: int


async def play(
    prompt: Prompt,
    number: int,
    draw: int,
    *,
    pool: EnvironmentPool,
    template: TurnTemplate,
    limits: EpisodeLimits,
    ending: Ending,
    generate: Generate,
) -> Sample:
    """Play one episode and return its sample, with ``Sample.episode`` set.

    Args:
        prompt: the task.
        number: number of the sample within its group.
        draw: number of the prompt's draw, so that a prompt that is drawn again meets another seed.
        pool: makes the environment.
        template: gives the tokens between turns.
        limits: ends the episode.
        ending: gives the text of a turn, which is the environment's action.
        generate: samples a turn; its errors end the episode without a sample.
    """
    raise NotImplementedError
