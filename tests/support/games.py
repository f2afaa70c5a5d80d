"""A game for tests of episodes: its answers tell whether it has read the turns that were sampled.

It uses only the characters of the arithmetic tokenizer.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np

from megatron_gmpo.batch.samples import Prompt
from megatron_gmpo.rollout.environments import Observation


class Echo:
    """Answer a turn with a number that depends on it and on the seed.

    Args:
        turns: number of turns after which it is done.
        fails: it raises an error in the second turn for this share of the episodes.
        hold: name of a file. Unless the prompt's answer is "go", the second turn waits until the file exists,
            and has a file ``hold.NUMBER`` meanwhile.
        seconds: time that every turn takes.
        seed: seed of the episode.
    """

    def __init__(
        self, seed: int, turns: int = 3, fails: float = 0.0, hold: str = "", seconds: float = 0.0
    ) -> None:
        self.turns, self.fails, self.hold, self.seconds, self.seed = turns, fails, hold, seconds, seed
        self.step_number = 0

    def reset(self, prompt: Prompt) -> Observation:
        self.prompt = prompt
        return Observation(info={"name": prompt.id[:1]})

    def step(self, action: str) -> Observation:
        self.step_number += 1
        time.sleep(self.seconds)  # the time that a real game would need
        if self.step_number == 2:
            if self.seed % 1000 < 1000 * self.fails:
                raise ValueError(f"seed {self.seed}")
            self._wait()
        number = crc32(f"{self.seed}/{action}".encode()) % 1000
        return Observation.text(
            f"{self.step_number}+{number}=",
            reward=number / 1000,
            done=self.step_number == self.turns,
            info={"success": number % 2 == 0},
        )

    def _wait(self) -> None:
        if self.hold and self.prompt.answer != "go":
            mark = Path(f"{self.hold}.{self.seed}")
            mark.touch()
            while not Path(self.hold).exists():
                time.sleep(0.02)  # interval at which it looks for the file
            mark.unlink()


class DigitTemplate:
    """A chat template for the arithmetic tokenizer: ``+`` and the message, ``=`` before a turn.

    ``TurnTemplate`` needs a tokenizer that encodes any text.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def first(self, prompt: Prompt, messages: Any) -> np.ndarray:
        return np.array(prompt.input_ids, np.int32)

    def following(
        self, start: Any, previous: Any, sampled: np.ndarray, messages: Any, end_ids: Any
    ) -> np.ndarray:
        text = "".join(f"+{message['content']}=" for message in messages)
        return np.array(self._tokenizer(text)["input_ids"], np.int32)
