"""Word problems with one addition of small numbers, which a small instruction-tuned model can learn."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from .arithmetic import Problem, write_problems

NAMES = ("Ada", "Ben", "Carla", "David", "Emma", "Felix", "Grace", "Hugo", "Iris", "Jonas", "Kira", "Leo")
THINGS = ("apples", "books", "cards", "coins", "eggs", "flowers", "marbles", "pencils", "shells", "stamps")
STORIES = (
    "{name} has {a} {thing}. {other} gives {name} {b} more. How many {thing} does {name} have now?",
    "There are {a} {thing} in a box. {name} puts {b} more into it. How many {thing} are in the box?",
    "{name} found {a} {thing} on Monday and {b} on Tuesday. How many {thing} did {name} find?",
    "{name} has {a} {thing} and {other} has {b}. How many {thing} do they have together?",
    "A shop sold {a} {thing} in the morning and {b} in the afternoon. How many {thing} did it sell?",
    "{name} bought {a} {thing} and later {b} more. How many {thing} did {name} buy in all?",
    "{name} keeps {a} {thing} at home and {b} at school. How many {thing} does {name} own?",
    "On a table lie {a} {thing}. {name} lays down {b} more. How many {thing} lie there?",
)
"""Texts of the training problems, with places for two names, a thing and two numbers."""
UNSEEN = (
    "{name} picked {a} {thing} and {other} picked {b}. How many {thing} were picked in total?",
    "{name} had {a} {thing} and got {b} as a present. How many {thing} does {name} have?",
    "One bag holds {a} {thing}, another holds {b}. How many {thing} are in both bags?",
    "{name} made {a} {thing} last week and {b} this week. How many {thing} is that altogether?",
)
"""Texts of the held-out problems."""


def word_problems(number: int, stories: Sequence[str], generator: random.Random) -> list[Problem]:
    """Return ``number`` different problems with numbers from 2 to 10."""
    found: dict[str, Problem] = {}
    while len(found) < number:
        a, b = generator.randint(2, 10), generator.randint(2, 10)
        name, other = generator.sample(NAMES, 2)
        thing = generator.choice(THINGS)
        text = generator.choice(stories).format(name=name, other=other, thing=thing, a=a, b=b)
        found[text] = {"problem": text, "answer": str(a + b)}
    return list(found.values())


def write_word_problems(
    out: Path, num_train: int = 1000, num_heldout: int = 100, seed: int = 0
) -> dict[Path, int]:
    """Write train.jsonl and heldout.jsonl, and return the number of problems in each file."""
    generator = random.Random(seed)
    train = word_problems(num_train, STORIES, generator)
    return write_problems(out, train, word_problems(num_heldout, UNSEEN, generator))
