"""Draw geometry problems and make a tiny vision-language model that solves some of them.

The model and the problems are those of examples/vision/geometry_tiny_cpu.toml. Problems for a larger model:

    megatron-gmpo geometry --problems_only --out data/geometry --side 336 --num_train 10000
"""

from __future__ import annotations

from pathlib import Path

from ..command_line import Options, parse_options
from ..config import Positive
from ..errors import InputError


class GeometryOptions(Options):
    """Draw geometry problems of five kinds and make a model that is warmed up on solved problems.

    The output is train.parquet and heldout.parquet with the columns problem, answer, images and type,
    blank.parquet with the problems of heldout.parquet and white pictures, the folder model with the model,
    and warm_up.json with the loss of the warm-up.
    """

    out: Path = Path("runs/geometry")
    """Folder to write."""
    num_train: Positive = 2000
    """Number of problems in train.parquet."""
    num_heldout: Positive = 200
    """Number of problems in heldout.parquet. Neither train.parquet nor the warm-up contains them."""
    num_solved: Positive = 8000
    """Number of solved problems for the warm-up."""
    side: Positive = 56
    """Width and height of a picture in pixels, 56 at least."""
    problems_only: bool = False
    """Write the problems and make no model."""
    warm_up_steps: Positive = 350
    """Number of batches of solved problems on which the model is trained."""
    seed: int = 0
    """Seed of problems, weights and order."""


def main(argv: list[str]) -> None:
    options = parse_options(GeometryOptions, argv, "megatron-gmpo geometry")
    if not 56 <= options.side <= 4096:
        raise InputError(f"--side {options.side}: give a number of pixels from 56 to 4096")

    from transformers.utils import logging

    from ..testing.geometry import make_geometry

    logging.disable_progress_bar()
    counts, loss = make_geometry(
        options.out,
        num_train=options.num_train,
        num_heldout=options.num_heldout,
        num_solved=options.num_solved,
        side=options.side,
        warm_up_steps=None if options.problems_only else options.warm_up_steps,
        seed=options.seed,
    )
    for path, count in counts.items():
        print(f"{path}: {count:,} problems")
    if loss is not None:
        model = options.out / "model"
        print(f"{model}: loss {loss:.3f} nats per token after {options.warm_up_steps} steps")
