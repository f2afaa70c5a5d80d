"""Write the demo's addition problems."""

from __future__ import annotations

from pathlib import Path

from ..command_line import Options, parse_options
from ..config import Positive
from ..testing.arithmetic import write_addition_problems


class Arithmetic(Options):
    """Write train.jsonl and heldout.jsonl with the columns problem and answer.

    The problems are two-digit additions, zero padded.
    """

    out: Path
    """Folder to write."""
    num_heldout: Positive = 200
    """Number of problems in heldout.jsonl; train.jsonl does not contain them."""
    seed: int = 0
    """Seed of the split."""


def main(argv: list[str]) -> None:
    options = parse_options(Arithmetic, argv, "megatron-gmpo arithmetic")
    for path, count in write_addition_problems(options.out, options.num_heldout, options.seed).items():
        print(f"{path}: {count:,} problems")
