"""Rewards: callables (Prompt, response text) -> float. ``REWARDS`` has the built-in rewards."""

from __future__ import annotations

import os
import reprlib
import sys
import traceback
from collections.abc import Callable
from math import isfinite, nan
from typing import Any

from ..batch.samples import Prompt
from ..config import RewardConfig
from ..errors import InputError, RunError
from ..plugins import check_callable, resolve
from .arithmetic import arithmetic_reward
from .countdown import countdown_reward
from .math import MathReward
from .processes import ProcessReward
from .reasoning_gym import ReasoningGymReward

Reward = Callable[[Prompt, str], float]


def environment_reward(prompt: Prompt, response: str) -> float:
    """Stand for the sum of the rewards of an episode's steps, which ``score`` takes from the episode."""
    raise InputError(f"reward.name = 'environment', but {prompt.id} was not answered in an environment")


WITH_PROCESSES: dict[str, type[ProcessReward]] = {"math": MathReward, "reasoning_gym": ReasoningGymReward}
REWARDS: dict[str, Reward] = {
    "math": MathReward(workers=1),
    "arithmetic": arithmetic_reward,
    "countdown": countdown_reward,
    "environment": environment_reward,
}


def resolve_reward(cfg: RewardConfig) -> Reward:
    """Return the reward ``cfg.name``: one of ``REWARDS``, or ``module:function`` from the Python path.

    Several threads may call a reward at the same time. A reward that counts timeouts, like ``MathReward``,
    has an int attribute ``timeouts``. One with processes of its own has a method ``close``.

    Raises:
        InputError: the name, module or function does not exist, or is not callable. The returned reward also
            raises it if a user's function returns a value that is not a finite number, or closes stdout or
            stderr, and raises ``RunError`` if the function raises an exception. Both name the prompt.
    """
    if cfg.name in WITH_PROCESSES:
        return WITH_PROCESSES[cfg.name](timeout_s=cfg.timeout_s, workers=cfg.workers)
    if cfg.name in REWARDS:
        return REWARDS[cfg.name]
    function = resolve("reward.name", cfg.name, REWARDS | WITH_PROCESSES)
    check_callable("reward.name", cfg.name, function, "give a callable (Prompt, str) -> float")
    return _Checked(function, cfg.name)


class _Checked:
    """A user's reward with checks of what it raises and returns. Its attributes are those of the reward."""

    def __init__(self, function: Callable[[Prompt, str], Any], name: str) -> None:
        self._function, self._name = function, name
        self._streams = {"stderr": sys.stderr, "stdout": sys.stdout}
        self._files = {stream: _file_of(self._streams[stream]) for stream in self._streams}

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._function, attribute)  # such as ``timeouts`` and ``close``

    def __call__(self, prompt: Prompt, response: str) -> float:
        name = self._name
        try:
            value = self._function(prompt, response)
        except BaseException as error:  # also SystemExit, which would end the run with the code it names
            where = traceback.extract_tb(error.__traceback__)[-1]
            raised = " ".join(f"{type(error).__name__}: {error}".split())
            raise RunError(
                f"reward.name = {name!r} raised {raised} for {prompt.id} ({where.filename}:{where.lineno}): "
                "return a number for every response"
            ) from error
        for stream, file in self._files.items():
            if _file_of(self._streams[stream]) != file:
                raise InputError(f"reward.name = {name!r} closed {stream} for {prompt.id}: leave it open")
        try:
            number = float(value)
        except Exception:  # of the value's own __float__, or OverflowError
            number = nan
        if not isfinite(number):
            raise InputError(
                f"reward.name = {name!r} returned {_shown(value)} for {prompt.id}: return a finite number"
            )
        return number


def _file_of(stream: Any) -> tuple[int, int] | None:
    """Return the device and inode of the stream's file, None if it is closed.

    A closed descriptor's number goes to the next file that any thread opens, so that it alone tells nothing.
    """
    try:
        status = os.fstat(stream.fileno())
    except (AttributeError, OSError, ValueError):  # None, a closed descriptor, a closed file
        return None
    return status.st_dev, status.st_ino


def _shown(value: Any) -> str:
    try:
        return " ".join(reprlib.repr(value).split())
    except Exception:  # a number with too many digits for Python, or the value's own __repr__
        return f"a {type(value).__name__}"
