"""Folders of text games as prompts: ``data.path = "data/alfworld/train"``."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from ..errors import InputError

_SUFFIXES = (".z8", ".ulx", ".tw-pddl")
_UNPLAYABLE = re.compile("movable|Sliced")
"""Kinds of ALFWorld's tasks that its own text games leave out (``AlfredTWEnv.collect_game_files``)."""


def games_in(folder: Path) -> list[Path]:
    """Return the files of the games in a folder and its subfolders, in the order of their names."""
    files = (path for path in folder.rglob("*") if path.suffix in _SUFFIXES)
    return sorted(path for path in files if not _UNPLAYABLE.search(str(path.relative_to(folder))))


def check_no_games(out: Path) -> None:
    """Check that games can be written to a folder.

    Raises:
        InputError: it has games already, which would mix with the new ones.
    """
    if found := games_in(out):
        raise InputError(
            f"out = {str(out)!r} has {len(found)} games already: remove them, or choose another folder"
        )


def records(games: list[Path]) -> Iterator[dict[str, str]]:
    """Yield a row for each game that can be solved.

    Yields:
        ``problem``: the goal of the game in words. ``answer``: the path of its file.

    Raises:
        ValueError: a file of ALFWorld names no task.
        OSError: a file of TextWorld has no .json file beside it.
    """
    for path in games:
        if path.suffix == ".tw-pddl":
            game = json.loads(path.read_text(encoding="utf-8"))
            if not game.get("solvable"):
                continue
            found = re.search(r"Your task is to: .*?(?=\.?\")", game["grammar"])
            if not found:
                raise ValueError(f"{path} names no task")
            goal = f"{found[0]}."
        else:
            goal = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["objective"]
        yield {"problem": goal, "answer": str(path)}
