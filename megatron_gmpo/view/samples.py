"""The samples of a run: an index of transcripts.jsonl by step, and the groups of one step."""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import orjson

from ..batch.samples import Prompt
from ..rewards.countdown import answer_in, mistake
from ..rewards.math.final_answer import final_answer
from .lines import MAX_LINE, GrowingLines

_STEP = re.compile(rb'\{"step": ?(\d{1,15}),')
_ENDS = {
    "done": "The environment ended the episode.",
    "turns": "The episode reached the limit of turns.",
    "tokens": "The episode reached the limit of tokens.",
    "error": "The environment failed.",
}


class Transcripts:
    """An index of ``transcripts.jsonl``: the byte offsets of each step's groups, 8 bytes a group.

    Attributes:
        unreadable: number of lines that do not begin as a group does.
    """

    def __init__(self, path: Path) -> None:
        self._lines = GrowingLines(path)
        self._clear()

    def _clear(self) -> None:
        self._offsets: dict[int, array[int]] = {}
        self.unreadable = 0

    def refresh(self) -> None:
        """Index the new lines, or all lines if the file was replaced."""
        if self._lines.replaced():
            self._clear()
        for offset, line in self._lines.new():
            if match := _STEP.match(line):
                self._offsets.setdefault(int(match[1]), array("q")).append(offset)
            else:
                self.unreadable += 1

    @property
    def steps(self) -> list[int]:
        return sorted(self._offsets)

    def groups(self, step: int, reward: str) -> list[dict[str, Any]]:
        """Return the groups of a step; each sample gets ``over_mean``, ``extracted`` and ``why``.

        ``over_mean`` is its reward minus the group's mean; for the others see ``explain``. ``images`` are the
        names of the prompt's images in the folder ``images`` of the run.

        Args:
            reward: ``reward.name`` of the run.
        """
        groups: list[dict[str, Any]] = []
        if step not in self._offsets:
            return groups
        with self._lines.path.open("rb") as file:
            for offset in self._offsets[step]:
                file.seek(offset)
                try:
                    group = orjson.loads(file.readline(MAX_LINE))
                    group["images"] = [str(name) for name in group.get("images", ())]
                    _explain(group, reward)
                except (ValueError, TypeError, KeyError, AttributeError):  # InputError is a ValueError
                    group = {"problem": f"the line at byte {offset} of {self._lines.path.name} is damaged"}
                groups.append(group)
        return groups


def image_names(group: dict[str, Any]) -> Iterator[str]:
    """Yield the names of the images of a group: those of its prompt, and those of observations."""
    yield from group.get("images", ())
    for sample in group.get("samples", ()):
        turns = sample.get("turns", ())
        for turn in turns if isinstance(turns, list) else ():
            content = turn.get("content") if isinstance(turn, dict) else None
            for part in content if isinstance(content, list) else ():
                if isinstance(part, dict) and isinstance(part.get("image"), str):
                    yield part["image"]


def _explain(group: dict[str, Any], reward: str) -> None:
    mean = fmean(float(sample["reward"]) for sample in group["samples"])
    for sample in group["samples"]:
        sample["over_mean"] = sample["reward"] - mean
        sample["extracted"], sample["why"] = explain(reward, str(group["answer"]), sample)


def explain(reward: str, truth: str, sample: dict[str, Any]) -> tuple[str | None, str]:
    """Return the answer that the reward reads in a response, or None, and why it gave its reward.

    The reward itself is the recorded one. Mathematics is not checked again, because a check may take long.
    """
    text, value = str(sample["text"]), sample["reward"]
    cut = " The response reached the length limit." if sample.get("finish_reason") == "length" else ""
    if episode := sample.get("episode"):
        cut = f" {_ENDS[episode['ended']]}"
    if reward == "math":
        found = final_answer(text)
        missing = "The response has no final answer"
    elif reward == "arithmetic":
        found, missing = text.strip() or None, "The response is empty"
    elif reward == "countdown":
        found, missing = answer_in(text) or None, "The response has no expression"
    elif reward == "environment":
        return None, f"The rewards of the steps sum up to {value:g}.{cut}"
    else:
        return None, f"{reward or 'The reward'} gave {value:g} and states no reason.{cut}"
    if found is None:
        return None, f"{missing}.{cut}"
    if reward == "countdown":
        wrong = mistake(Prompt("", truth), text)
        return found, (wrong or "The expression reaches the target with every number.") + cut
    if value > 0:
        reason = "equals the truth"
    elif found.strip() == truth.strip():
        reason = "equals the truth, but the reward is not positive: see reward/timeouts and the penalties"
    else:
        reason = "differs from the truth"
    return found, f"The answer {reason}.{cut}"
