"""The reward of the problems of reasoning-gym: the data set's own scorer."""

from __future__ import annotations

import json

from ..batch.samples import Prompt
from ..data.reasoning_gym import INSTALL, PREFIX
from ..errors import InputError
from ..plugins import check_installed
from .processes import ProcessReward


class ReasoningGymReward(ProcessReward):
    """Score a response with ``score_answer`` of the prompt's data set, from 0 to 1.

    The answer is the content of the last ``<answer> </answer>``, or the whole response without one. An answer
    on which the scorer fails scores 0. The package's scorers evaluate some answers as Python code; see
    ``reasoning_gym_worker`` for what is evaluated here.

    Raises:
        InputError: the package is not installed; in a call, the prompt is none of reasoning-gym.
    """

    worker = "megatron_gmpo.rewards.reasoning_gym_worker"

    def __init__(self, timeout_s: float = 10.0, workers: int = 2) -> None:
        check_installed("reward.name = 'reasoning_gym'", "reasoning_gym", INSTALL)
        super().__init__(timeout_s, workers)

    def __call__(self, prompt: Prompt, response: str) -> float:
        try:
            answer = json.loads(prompt.answer)
            known = {"answer", "data_set", "index"} == set(answer)
        except (ValueError, TypeError):
            known = False
        if not known:
            raise InputError(
                f"reward.name = 'reasoning_gym': {prompt.id} is no problem of reasoning-gym: "
                f'set data.path = "{PREFIX}chain_sum", or choose another reward'
            )
        return super().__call__(prompt, response)
