"""Generate household tasks for ALFWorld's engine.

They are scenes on the floor plans of the alfworld package, for rollout.environment = "alfworld":

    megatron-gmpo alfworld --out data/alfworld --num_train 3600 --num_unseen 132 --workers 16
"""

from __future__ import annotations

from pathlib import Path

from ..command_line import Options, parse_options
from ..config import Positive
from ..plugins import check_installed


class ALFWorldOptions(Options):
    """Write games in ALFWorld's format to the folders train and unseen.

    The six kinds of task take turns. The games of the two folders have different floor plans, those of
    ALFRED's splits. Each file game.tw-pddl also holds the commands of an expert, which reach the goal.
    ``data.path`` names one of the folders. Needs ``make games``.
    """

    out: Path = Path("data/alfworld")
    """Folder to write."""
    num_train: Positive = 120
    """Number of games in the folder train."""
    num_unseen: Positive = 30
    """Number of games in the folder unseen."""
    seed: int = 0
    """Seed of scenes and tasks."""
    workers: Positive = 1
    """Number of processes. A game takes a few seconds of one."""


def main(argv: list[str]) -> None:
    options = parse_options(ALFWorldOptions, argv, "megatron-gmpo alfworld")
    check_installed("megatron-gmpo alfworld", "alfworld", "run make games")

    from ..testing.alfworld_games import make_alfworld_games

    lengths = make_alfworld_games(
        options.out,
        num_train=options.num_train,
        num_unseen=options.num_unseen,
        seed=options.seed,
        workers=options.workers,
    )
    for split, length in lengths.items():
        print(f"{options.out / split}: the expert needs {length} commands on average")
