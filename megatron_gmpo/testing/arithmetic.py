"""The demo's problems: two-digit addition, zero padded, e.g. ``{"problem": "07+45=", "answer": "052"}``."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

Problem = dict[str, str]


def addition_problems(num_heldout: int = 200, seed: int = 0) -> tuple[list[Problem], list[Problem]]:
    """Return all 10,000 sums of two two-digit numbers in a random order, split into (train, heldout)."""
    problems = [
        {"problem": f"{a:02d}+{b:02d}=", "answer": f"{a + b:03d}"} for a in range(100) for b in range(100)
    ]
    random.Random(seed).shuffle(problems)
    return problems[num_heldout:], problems[:num_heldout]


def write_addition_problems(out: Path, num_heldout: int = 200, seed: int = 0) -> dict[Path, int]:
    """Write train.jsonl and heldout.jsonl and return the number of problems in each file."""
    train, heldout = addition_problems(num_heldout, seed)
    return write_problems(out, train, heldout)


def write_problems(out: Path, train: Sequence[Problem], heldout: Sequence[Problem]) -> dict[Path, int]:
    """Write problems to ``out`` as train.jsonl and heldout.jsonl, and return the number in each file."""
    out.mkdir(parents=True, exist_ok=True)
    counts: dict[Path, int] = {}
    for name, problems in (("train", train), ("heldout", heldout)):
        path = out / f"{name}.jsonl"
        path.write_text("".join(json.dumps(problem) + "\n" for problem in problems))
        counts[path] = len(problems)
    return counts
