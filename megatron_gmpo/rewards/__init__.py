"""Rewards: callables (Prompt, response text) -> float. ``REWARDS`` has the built-in rewards."""

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
    """Return the reward ``cfg.name``: one of ``REWARDS``, or ``module:function`` from the Python path.

    Several threads may call a reward at the same time. A reward that counts timeouts, like ``MathReward``,
    has an int attribute ``timeouts``.

    Raises:
        InputError: the name, module or function does not exist, or is not callable. The returned reward also
            raises it if a user's function returns a value that is not a finite number.
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
