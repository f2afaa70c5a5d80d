"""Worker processes that run environments, one live episode a process."""

from __future__ import annotations

from ...batch.samples import Prompt
from ...config import RolloutConfig
from . import Observation


class EnvironmentPool:
    """The worker processes of one trainer process.

    Args:
        cfg: names the environment or the tools, and the time limit of a call.
        seed: the run's seed.

    Raises:
        InputError: the class or a function cannot be imported, or does not take its arguments.
    """

    def __init__(self, cfg: RolloutConfig, seed: int) -> None:
        raise NotImplementedError

    async def open(self, prompt: Prompt, number: int, draw: int) -> Session:
        """Return the session of a new episode, in an idle process or a new one.

        Args:
            number: number of the sample in its group.
            draw: place of the prompt in the stream, so that a prompt that comes again is played anew.
        """
        raise NotImplementedError

    def close(self) -> None:
        """End all processes."""
        raise NotImplementedError


class Session:
    """One episode of an environment.

    Attributes:
        tool_calls: calls of tools so far.
        tool_errors: how many of them had an error as their result.
        seconds: time inside the environment's calls.
    """

    tool_calls: int = 0
    tool_errors: int = 0
    seconds: float = 0.0

    async def reset(self) -> Observation:
        """Return the first observation.

        Raises:
            EnvironmentFault: the call failed. The process has been killed, and the session is over.
        """
        raise NotImplementedError

    async def step(self, action: str) -> Observation:
        """Return the observation after a turn; see ``reset`` for errors."""
        raise NotImplementedError

    async def close(self) -> None:
        """End the episode. The process serves another one, unless it failed or is in a call."""
        raise NotImplementedError
