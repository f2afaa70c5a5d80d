"""Write Countdown problems and a tiny model that solves some of them.

The model and the problems are those of examples/moe/countdown_tiny_cpu.toml. Problems for a larger model:

    megatron-gmpo countdown --problems_only --out data/countdown --count 4 --max_number 99 --max_target 999 \
      --num_train 100000
"""

from __future__ import annotations

from pathlib import Path

from ..command_line import Options, parse_options
from ..config import Positive


class CountdownOptions(Options):
    """Write Countdown problems and a model that supervised learning has warmed up on such problems.

    The output is train.jsonl and heldout.jsonl with the columns problem and answer, the folder model with the
    model, and warm_up.json with the loss of the warm-up.
    """

    out: Path = Path("runs/countdown")
    """Folder to write."""
    num_train: Positive = 4000
    """Number of problems in train.jsonl."""
    num_heldout: Positive = 200
    """Number of problems in heldout.jsonl. Neither train.jsonl nor the warm-up contains them."""
    count: Positive = 3
    """Numbers per problem."""
    max_number: Positive = 12
    """Largest number."""
    max_target: Positive = 99
    """Largest target."""
    problems_only: bool = False
    """Write the problems and make no model."""
    warm_up_steps: Positive = 1000
    """Number of batches of solved problems on which the model is trained."""
    seed: int = 0
    """Seed of problems, weights and order."""


def main(argv: list[str]) -> None:
    options = parse_options(CountdownOptions, argv, "megatron-gmpo countdown")

    from transformers.utils import logging

    from ..testing.countdown import Countdown, make_countdown

    logging.disable_progress_bar()
    counts, loss = make_countdown(
        options.out,
        Countdown(options.count, options.max_number, options.max_target),
        num_train=options.num_train,
        num_heldout=options.num_heldout,
        warm_up_steps=None if options.problems_only else options.warm_up_steps,
        seed=options.seed,
    )
    for path, count in counts.items():
        print(f"{path}: {count:,} problems")
    if loss is not None:
        model = options.out / "model"
        print(f"{model}: loss {loss:.3f} nats per token after {options.warm_up_steps} steps")
