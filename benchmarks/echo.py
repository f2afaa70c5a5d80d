"""The environment of ``benchmarks.episodes``."""

from megatron_gmpo.batch.samples import Prompt
from megatron_gmpo.rollout.environments import Observation

TURNS = 4


class Echo:
    """Say how long a turn was, ``TURNS`` times."""

    def reset(self, prompt: Prompt) -> Observation:
        self.step_number = 0
        return Observation()

    def step(self, action: str) -> Observation:
        self.step_number += 1
        return Observation.text(f"{len(action)} characters. Go on.", done=self.step_number == TURNS)
