"""Games that TextWorld generates, for ``rollout.environment = "textworld"``."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from ..data.games import check_no_games
from ..errors import InputError, RunError

_GAME_S = 600.0
"""Seconds within which a game must be made; usual are a few."""
_MAX_MISSES = 50
"""Consecutive seeds without a new quest after which the search stops."""


@dataclass(frozen=True)
class Quest:
    """A kind of TextWorld game.

    Attributes:
        rooms: number of rooms.
        objects: number of objects.
        quest_length: number of commands that reach the goal.
    """

    rooms: int = 3
    objects: int = 6
    quest_length: int = 3

    def make(self, seed: int, path: Path) -> tuple[str, ...]:
        """Write the game of a seed to ``path``, a .z8 file, and the .json file beside it.

        Returns:
            The commands that reach the goal.

        Raises:
            RuntimeError: TextWorld finds no quest for this seed.
        """
        import textworld  # pyright: ignore[reportMissingImports]

        options = textworld.GameOptions()
        options.nb_rooms, options.nb_objects = self.rooms, self.objects
        options.quest_length, options.quest_breadth = self.quest_length, 1
        options.seeds, options.path, options.file_ext = seed, str(path), ".z8"
        _, game = textworld.make(options)
        path.with_suffix(".ni").unlink()  # the source text
        return tuple(game.metadata["walkthrough"])


def make_textworld_games(
    out: Path, kind: Quest, *, num_train: int, num_unseen: int, seed: int = 0, workers: int = 1
) -> None:
    """Write num_train games to the folder train and num_unseen to unseen.

    No two games have the same solution, so that none of unseen is solved by heart.

    Args:
        workers: number of games that are made at the same time, one in a process.

    Raises:
        InputError: the folder has games already; TextWorld refuses the kind of game, or there are too few
            different ones.
        RunError: a game took too long.
    """
    check_no_games(out)
    parts = [out / "train" / f"game_{i:05d}.z8" for i in range(num_train)]
    parts += [out / "unseen" / f"game_{i:05d}.z8" for i in range(num_unseen)]
    new = out / "new"
    for folder in (out / "train", out / "unseen", new):
        folder.mkdir(parents=True, exist_ok=True)
    solutions: set[tuple[str, ...]] = set()
    misses = 0
    with ProcessPoolExecutor(workers, mp_context=get_context("forkserver")) as pool:
        games = _in_order(pool, kind, seed, new, workers)
        while parts:
            made, solution = next(games)
            misses = misses + 1 if solution in solutions else 0
            if misses > _MAX_MISSES:
                raise InputError(
                    f"num_train + num_unseen = {num_train + num_unseen}, but only {len(solutions)} different "
                    f"games of {kind} were found: raise rooms, objects or quest_length"
                )
            if misses:
                continue
            solutions.add(solution)
            target = parts.pop(0)
            for suffix in (".json", ".z8"):
                made.with_suffix(suffix).rename(target.with_suffix(suffix))
    for path in new.iterdir():
        path.unlink()
    new.rmdir()


def _in_order(
    pool: ProcessPoolExecutor, kind: Quest, seed: int, folder: Path, workers: int
) -> Iterator[tuple[Path, tuple[str, ...]]]:
    """Yield the path and the solution of each game, in the order of the seeds."""
    for first in itertools.count(0, workers):
        paths = {seed * 1_000_000 + first + i: folder / f"{first + i}.z8" for i in range(workers)}
        futures = [pool.submit(_make, kind, number, path) for number, path in paths.items()]
        for path, future in zip(paths.values(), futures, strict=True):
            try:
                yield path, future.result(timeout=_GAME_S)
            except TimeoutError:
                raise RunError(f"a game of {kind} was not made within {_GAME_S:.0f} s") from None


def _make(kind: Quest, seed: int, path: Path) -> tuple[str, ...]:
    try:
        return kind.make(seed, path)
    except Exception as error:
        raise InputError(f"TextWorld makes no game of {kind} ({error}): change its numbers") from None


def commands_of(game: Path) -> list[str]:
    """Return the commands that solve a game of this module: the expert's episode."""
    return json.loads(game.with_suffix(".json").read_text())["metadata"]["walkthrough"]
