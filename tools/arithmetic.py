"""Writes the demo's problems: two-digit addition, zero padded, e.g. ``{"problem": "07+45=", "answer": "052"}``.

python -m tools.arithmetic --out runs/arithmetic
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import tyro


def addition_problems(
    num_heldout: int = 200, seed: int = 0
) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """All 10,000 sums of two two-digit numbers in a random order, as (train, heldout) without a problem in common."""
    problems = [
        {"problem": f"{a:02d}+{b:02d}=", "answer": f"{a + b:03d}"} for a in range(100) for b in range(100)
    ]
    random.Random(seed).shuffle(problems)
    return problems[num_heldout:], problems[:num_heldout]


def main(out: Path, num_heldout: int = 200, seed: int = 0) -> None:
    """Write train.jsonl and heldout.jsonl with the columns problem and answer.

    Args:
        out: Folder to write.
        num_heldout: Problems kept out of train.jsonl.
        seed: Seed of the split.
    """
    out.mkdir(parents=True, exist_ok=True)
    for name, problems in zip(("train", "heldout"), addition_problems(num_heldout, seed), strict=True):
        path = out / f"{name}.jsonl"
        path.write_text("".join(json.dumps(problem) + "\n" for problem in problems))
        print(f"{path}: {len(problems):,} problems")


if __name__ == "__main__":
    tyro.cli(main, use_underscores=True)
