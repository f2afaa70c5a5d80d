"""Rewards: a ``Reward`` is any callable (Prompt, response text) -> float; the built-in ones stand in ``REWARDS``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from math import isfinite, nan
from typing import Any

from ..batch.samples import Prompt
from ..config import RewardConfig
from ..errors import InputError
from ..plugins import check_callable, resolve
from .arithmetic import arithmetic_reward
from .countdown import countdown_reward
from .math import MathReward

Reward = Callable[[Prompt, str], float]

REWARDS: dict[str, Reward] = {
    "math": MathReward(workers=1),
    "arithmetic": arithmetic_reward,
    "countdown": countdown_reward,
}


def resolve_reward(cfg: RewardConfig) -> Reward:
    """The reward that ``cfg.name`` names: one of ``REWARDS``, or ``module:function`` imported from the Python path.

    Rewards are called from several threads at once. One that counts cut-off checks has an int attribute ``timeouts``
    (``MathReward``).

    Raises:
        InputError: no such name, module or function, or it is not callable. The returned reward raises it too, when a function of
            the user's returns something other than a finite number or a bool.
    """
    if cfg.name == "math":
        return MathReward(timeout_s=cfg.timeout_s, workers=cfg.workers)
    if cfg.name in REWARDS:
        return REWARDS[cfg.name]
    function = resolve("reward.name", cfg.name, REWARDS)
    check_callable("reward.name", cfg.name, function, "give a callable (Prompt, str) -> float")
    return _checked(function, cfg.name)


def _checked(function: Callable[[Prompt, str], Any], name: str) -> Reward:
    @functools.wraps(function)
    def reward(prompt: Prompt, response: str) -> float:
        value = function(prompt, response)
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = nan
        if not isfinite(number):
            raise InputError(
                f"reward.name = {name!r} returned {value!r} for {prompt.id}: return a finite number"
            )
        return number

    return reward
