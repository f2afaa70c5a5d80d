"""Environments for tests, which configs name as ``module:Class``. Each does what the action says."""

from __future__ import annotations

import asyncio
import base64
import ctypes
import os
import random
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable
from typing import Any

import numpy as np

from megatron_gmpo.batch.samples import Prompt
from megatron_gmpo.rollout.environments import Observation, image_part, text_part


def write_to_sockets(line: bytes) -> None:
    """Write to every socket of this process, as a library that has confused its files might."""
    for file in range(3, 64):
        try:
            if stat.S_ISSOCK(os.fstat(file).st_mode):
                os.write(file, line)
        except OSError:
            continue


class Obedient:
    """Do what the action says, or report the process, the prompt and what the seeds determine."""

    def __init__(self, greeting: str = "", seed: int = -1) -> None:
        self.greeting, self.seed = greeting, seed
        self.steps = 0

    def reset(self, prompt: Prompt) -> Observation:
        if prompt.id == "bad":
            raise KeyError("no such\ntask")
        return Observation.text(f"{self.greeting}{prompt.text}", info=self.info(prompt))

    def info(self, prompt: Prompt) -> dict[str, Any]:
        return {
            "pid": os.getpid(),
            "prompt": vars(prompt),
            "seed": self.seed,
            "drawn": [random.random(), float(np.random.random()), *{"a", "b", "c", "d"}],
            "heavy": sorted({"torch", "transformers", "pydantic"} & sys.modules.keys()),
        }

    def step(self, action: str) -> Any:
        self.steps += 1
        found: Any = getattr(self, action, None)
        return found() if found else Observation.text(f"{self.steps}: {action}", reward=0.5)

    def close(self) -> None:
        print(f"closed after {self.steps} steps", file=sys.stderr, flush=True)

    def raises(self) -> None:
        raise RuntimeError("two\nlines")

    def recursion(self) -> None:
        self.recursion()

    def hangs(self) -> None:
        time.sleep(600)  # longer than every time limit

    def hangs_in_c(self) -> None:
        """Hold Python's lock for ever: no other thread of the process can run."""
        ctypes.PyDLL(None).sleep(600)

    def hangs_with_a_child(self) -> None:
        subprocess.run(["sleep", "600"])

    def exits(self) -> None:
        sys.exit(3)

    def exits_at_once(self) -> None:
        os._exit(0)

    def crashes(self) -> None:
        ctypes.string_at(0)

    def closes_everything(self) -> None:
        os.closerange(0, 1024)

    def floods(self) -> Observation:
        return Observation.text("x" * 1_000_000)

    def floods_info(self) -> Observation:
        return Observation.text("", info={"map": [0] * 400_000})

    def floods_the_socket(self) -> None:
        while True:
            write_to_sockets(b"x" * 65536)

    def returns_none(self) -> None:
        return None

    def returns_a_dict(self) -> dict[str, Any]:
        return {"messages": [], "reward": 1.0, "done": True, "info": {}}

    def returns_a_set(self) -> Observation:
        return Observation(info={"found": {1}})

    def returns_text(self) -> Observation:
        return Observation("You see a door.")  # pyright: ignore[reportArgumentType]

    def returns_nan(self) -> Observation:
        return Observation(reward=float("nan"))

    def returns_a_wrong_name(self) -> Observation:
        return Observation(info={"name": 3})

    def returns_a_list_as_info(self) -> Observation:
        return Observation(info=["x"])  # pyright: ignore[reportArgumentType]

    def returns_a_text_as_info(self) -> Observation:
        return Observation(info="nothing to tell")  # pyright: ignore[reportArgumentType]

    def returns_fewer_than_no_calls(self) -> Observation:
        return Observation(info={"tool_calls": -1})

    def returns_more_calls_than_a_float_holds(self) -> Observation:
        return Observation(info={"tool_errors": 10**400})

    def replaces_the_info(self) -> Observation:
        """Return an observation whose check has been passed with another info."""
        observation = Observation.text("")
        vars(observation)["info"] = []
        return observation

    def returns_half_a_character(self) -> Observation:
        return Observation.text("\ud83d")

    def changes_an_observation(self) -> Observation:
        """Return an observation whose check has been passed with other values."""
        observation = Observation.text("")
        observation.info.update(tool_calls="many")
        return observation

    def returns_numpy(self) -> Observation:
        reward: Any = np.float32(0.25)
        done: Any = np.bool_(True)
        return Observation(reward=reward, done=done, info={"score": np.int64(3), "name": "x"})

    def speaks_nonsense(self) -> Observation:
        write_to_sockets(b"Traceback (most recent call last):\n")
        return Observation()

    def speaks_deeply_nested_nonsense(self) -> Observation:
        write_to_sockets(b"[" * 100_000 + b"\n")
        return Observation()

    def speaks_later(self) -> Observation:
        threading.Timer(0.2, write_to_sockets, [b"{}\n"]).start()
        return Observation()

    def prints(self) -> Observation:
        print("printed by Python")
        os.write(1, b"written to file 1\n")
        return Observation()

    def is_told_to_end(self) -> Observation:
        """Get the signals of a job's end, and end a program by the usual one."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            os.kill(os.getpid(), number)
            os.kill(os.getppid(), number)
        program = subprocess.Popen(["sleep", "600"])
        program.terminate()
        return Observation.text(str(program.wait()))

    def runs_a_loop(self) -> Observation:
        """Use a library that runs an event loop of its own."""
        return asyncio.run(Later().now())


class Later(Obedient):
    """The same, asynchronously, with a task that runs between the calls."""

    def __init__(self, greeting: str = "", seed: int = -1) -> None:
        super().__init__(greeting, seed)
        self.ticks = 0

    async def reset(self, prompt: Prompt) -> Observation:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.task = asyncio.create_task(self.tick())
        return super().reset(prompt)

    async def step(self, action: str) -> Any:
        await asyncio.sleep(0)
        found = super().step(action)
        return await found if isinstance(found, Awaitable) else found

    async def tick(self) -> None:
        while True:
            await asyncio.sleep(0.01)
            self.ticks += 1

    async def now(self) -> Observation:
        await asyncio.sleep(0)
        return Observation.text("now")

    async def ticked(self) -> Observation:
        return Observation(info={"ticks": self.ticks})

    async def sleeps(self) -> None:
        await asyncio.sleep(600)


class NoSteps:
    def reset(self, prompt: Prompt) -> Observation:
        return Observation()


def no_class(seed: int = 0) -> Obedient:
    return Obedient(seed=seed)


class ShowsPictures:
    """Show one picture at the reset and one after each turn; the last turn has none. Words are not read.

    Args:
        pictures: encoded files in base64.
    """

    def __init__(self, pictures: list[str]) -> None:
        self.pictures = [base64.b64decode(picture) for picture in pictures]

    def reset(self, prompt: Prompt) -> Observation:
        return self._shown("Look")

    def step(self, action: str) -> Observation:
        return self._shown("Again") if self.pictures else Observation(done=True, reward=1.0)

    def _shown(self, word: str) -> Observation:
        content = [text_part(f"{word}: "), image_part(self.pictures.pop(0)), text_part("?")]
        return Observation([{"role": "user", "content": content}])
