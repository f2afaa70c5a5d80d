"""Environments over games of TextWorld and ALFWorld; ``data.games`` reads their files as prompts."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

try:
    import textworld  # pyright: ignore[reportMissingImports]
    from alfworld.agents.environment import alfred_tw_env  # pyright: ignore[reportMissingImports]
except ImportError as error:
    raise ImportError(f"{error}: run make games, or pip install -e '.[games]'") from None

from ...batch.samples import Prompt
from . import Observation

# jericho's own score is missing for these games; TextWorld has the score
warnings.filterwarnings("ignore", message=r"Game .* is not fully supported")

_MAX_COMMAND = 200
"""Characters of a command that the game reads; the parsers of the games take long for more."""


class TextWorld:
    """A game that ``megatron-gmpo textworld`` or ``tw-make`` wrote: a .z8 file with its .json file beside it.

    A reward is the gain in score divided by the maximum score, so that an episode's is between 0 and 1.
    Success is that the game is won. Turns that the game does not understand get its message.

    Args:
        admissible_commands: append the list of commands that the game accepts to each observation.
        intermediate_reward: reward of a command that comes closer to the goal, and penalty of one that leads
            away from it, by TextWorld's own policy.
    """

    def __init__(self, admissible_commands: bool = True, intermediate_reward: float = 0.0) -> None:
        self._show_commands, self._intermediate = admissible_commands, intermediate_reward

    def reset(self, prompt: Prompt) -> Observation:
        """Start the game whose path is the prompt's answer."""
        self._name = self._kind(Path(prompt.answer))
        self._game, self._score = self._open(prompt.answer), 0
        state = self._game.reset()
        return self._observe(state, self._first_text(state), 0.0, False)

    def step(self, action: str) -> Observation:
        """Play one command; see ``command_in``."""
        state, _, done = self._game.step(command_in(action))
        return self._observe(state, state.feedback, self._reward(state), done or state.won)

    def close(self) -> None:
        self._game.close()

    def _kind(self, path: Path) -> str:
        return "textworld"

    def _open(self, path: str) -> Any:
        names = ("won", "score", "max_score", "description", "admissible_commands", "intermediate_reward")
        return textworld.start(path, textworld.EnvInfos(**dict.fromkeys(names, True)))

    def _first_text(self, state: Any) -> str:
        return state.description  # the feedback starts with a picture

    def _reward(self, state: Any) -> float:
        gain, self._score = state.score - self._score, state.score
        return gain / state.max_score + self._intermediate * state.intermediate_reward

    def _observe(self, state: Any, text: str, reward: float, done: bool) -> Observation:
        text = text.partition("*** The End ***")[0]
        text = re.sub(r"\n>\s.*", "", text).strip()  # the prompt of the game, with the score
        text = re.sub(r"\n{3,}", "\n\n", text)
        if self._show_commands and not done:
            text += "\n\nAvailable commands: " + ", ".join(state.admissible_commands)
        info = {"name": self._name, "success": state.won}
        return Observation.text(text, reward=reward, done=done, info=info)


class ALFWorld(TextWorld):
    """A game of ALFWorld, or one that ``megatron-gmpo alfworld`` wrote: a file game.tw-pddl.

    The reward is 1 for reaching the goal. The game's folder names the kind of task, for the metrics' splits.

    Args:
        admissible_commands: append the list of commands that the game accepts to each observation.
    """

    def __init__(self, admissible_commands: bool = True) -> None:
        super().__init__(admissible_commands)

    def _kind(self, path: Path) -> str:
        # TASK-OBJECT-MOVABLE-RECEPTACLE-SCENE/TRIAL/game.tw-pddl
        return path.parent.parent.name.partition("-")[0]

    def _open(self, path: str) -> Any:
        infos = textworld.EnvInfos(won=True, admissible_commands=True)
        return textworld.start(path, infos, wrappers=[alfred_tw_env.AlfredDemangler()])

    def _first_text(self, state: Any) -> str:
        return state.feedback.partition("=-\n")[2] or state.feedback  # after the title

    def _reward(self, state: Any) -> float:
        return float(state.won)


def command_in(turn: str) -> str:
    """Return the command of a turn.

    It is the content of the last ``<action> </action>`` after the last ``</think>``, or the last line with
    text.
    """
    turn = turn.rpartition("</think>")[2]
    if "<action>" in turn:
        turn = turn.rpartition("<action>")[2].partition("</action>")[0]
    lines = [line for line in turn.splitlines() if line.strip()] or ["look"]
    return " ".join(lines[-1].split())[:_MAX_COMMAND]
