"""Generate text games with TextWorld.

They are games of rooms, objects and a quest, for rollout.environment = "textworld":

    megatron-gmpo textworld --out data/textworld --num_train 1000 --rooms 5 --quest_length 5 --workers 16
"""

from __future__ import annotations

from pathlib import Path

from ..command_line import Options, parse_options
from ..config import Positive
from ..plugins import check_installed


class TextWorldOptions(Options):
    """Write games of TextWorld to the folders train and unseen.

    A game is a .z8 file with a .json file, which holds the goal and the commands that reach it. All games
    have different solutions. ``data.path`` names one of the folders. Needs ``make games``.
    """

    out: Path = Path("data/textworld")
    """Folder to write."""
    num_train: Positive = 100
    """Number of games in the folder train."""
    num_unseen: Positive = 20
    """Number of games in the folder unseen."""
    rooms: Positive = 3
    """Number of rooms."""
    objects: Positive = 6
    """Number of objects."""
    quest_length: Positive = 3
    """Number of commands that reach the goal."""
    seed: int = 0
    """Seed of the games."""
    workers: Positive = 1
    """Number of processes. A game takes a few seconds of one."""


def main(argv: list[str]) -> None:
    options = parse_options(TextWorldOptions, argv, "megatron-gmpo textworld")
    check_installed("megatron-gmpo textworld", "textworld", "run make games")

    from ..testing.textworld_games import Quest, make_textworld_games

    make_textworld_games(
        options.out,
        Quest(options.rooms, options.objects, options.quest_length),
        num_train=options.num_train,
        num_unseen=options.num_unseen,
        seed=options.seed,
        workers=options.workers,
    )
    print(f"{options.out}: {options.num_train:,} games in train, {options.num_unseen:,} in unseen")
