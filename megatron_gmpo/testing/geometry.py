"""Geometry problems whose numbers stand in a picture, and a tiny Qwen3-VL that solves some of them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import product, starmap
from math import isqrt
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from PIL import Image

from .geometry_figures import FIGURES, Figure, draw
from .tiny_models import make_tiny_model
from .tiny_tokenizers import dialogue_tokenizer
from .warm_up import warm_up

UNSEEN_SHARE = 0.1
"""Share of the problems of each kind that only the held-out set has."""
SIDE = 56
"""Width and height of a picture in pixels."""


@dataclass(frozen=True)
class Problem:
    """A problem.

    Attributes:
        kind: kind of figure, a key of ``geometry_figures.FIGURES``.
        labels: texts in the figure; ``x`` is the unknown.
        question: text of the problem, without a number.
        solution: a calculation that ends with the answer.
    """

    kind: str
    labels: tuple[str, ...]
    question: str
    solution: str

    @property
    def answer(self) -> str:
        return self.solution.rpartition("=")[2]


def geometry_problems() -> dict[str, list[Problem]]:
    """Return kind -> all problems of the kind."""
    problems: dict[str, list[Problem]] = {kind: [] for kind in FIGURES}
    for problem in (*_angles(), *_right_triangles(), *_rectangles(), *_circles()):
        problems[problem.kind].append(problem)
    return problems


def make_geometry(
    out: Path,
    *,
    num_train: int = 2000,
    num_heldout: int = 200,
    num_solved: int = 8000,
    side: int = SIDE,
    warm_up_steps: int | None = 350,
    seed: int = 0,
) -> tuple[dict[Path, int], float | None]:
    """Write train.parquet, heldout.parquet and blank.parquet, then the folder model, then warm_up.json.

    Rows have the columns of hiyouga/geometry3k on the hub, problem, answer and images, a list with one PNG
    file, and the column type with the kind. All kinds are equally frequent. No problem of train.parquet or
    the warm-up is in heldout.parquet. blank.parquet has the problems of heldout.parquet with white pictures.

    Args:
        num_solved: number of solved problems for the warm-up.
        warm_up_steps: number of batches of 64 solved problems on which the model is trained. None makes no
            model.

    Returns:
        The number of rows in each file, and the loss of the warm-up.
    """
    generator = random.Random(seed)
    seen, unseen = split_problems(generator)
    train = draw_problems(num_train, seen, side, generator)
    heldout = draw_problems(num_heldout, unseen, side, generator)
    white = Figure(side).png()
    blank = [(problem, white) for problem, _ in heldout]
    counts: dict[Path, int] = {}
    out.mkdir(parents=True, exist_ok=True)
    for name, problems in (("train", train), ("heldout", heldout), ("blank", blank)):
        path = out / f"{name}.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(starmap(_row, problems))), path)
        counts[path] = len(problems)
    if warm_up_steps is None:
        return counts, None
    make_tiny_model(
        out / "model",
        family="qwen3_vl",
        tokenizer=dialogue_tokenizer((problem.question for kind in seen for problem in kind), images=True),
        num_layers=2,
        hidden_size=96,
        ffn_hidden_size=192,
        vision={
            "depth": 1,
            "deepstack_visual_indexes": [0],
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 4,
            "patch_size": 14,
        },
        seed=seed,
    )
    _make_white_zero(out / "model/preprocessor_config.json")
    dialogues = list(starmap(_dialogue, draw_problems(num_solved, seen, side, generator)))
    loss = warm_up(out / "model", dialogues, steps=warm_up_steps, seed=seed)
    (out / "warm_up.json").write_text(json.dumps({"loss": loss}))
    return counts, loss


def split_problems(generator: random.Random) -> tuple[list[list[Problem]], list[list[Problem]]]:
    """Return the problems for training and the held-out ones, a list of each kind."""
    seen, unseen = [], []
    for problems in geometry_problems().values():
        generator.shuffle(problems)
        share = int(UNSEEN_SHARE * len(problems))
        unseen.append(problems[:share])
        seen.append(problems[share:])
    return seen, unseen


def draw_problems(
    number: int, problems: Sequence[Sequence[Problem]], side: int, generator: random.Random
) -> list[tuple[Problem, bytes]]:
    """Return problems, drawn with replacement from each kind in turn, and their pictures as PNG files."""
    drawn = [generator.choice(problems[place % len(problems)]) for place in range(number)]
    return [(problem, draw(problem.kind, problem.labels, side, generator)) for problem in drawn]


def _make_white_zero(path: Path) -> None:
    """Set the mean colour of an image processor to white, so that a patch without lines has the value 0.

    With the usual mean the white background outweighs the lines, and a small tower learns to read far slower.
    """
    processor = json.loads(path.read_text())
    path.write_text(json.dumps(processor | {"image_mean": [1.0, 1.0, 1.0]}, indent=2))


def _row(problem: Problem, picture: bytes) -> dict[str, Any]:
    return {
        "problem": f"<image>{problem.question}",
        "answer": problem.answer,
        "images": [{"bytes": picture, "path": None}],
        "type": problem.kind,
    }


def _dialogue(problem: Problem, picture: bytes) -> dict[str, Any]:
    """Return the row of a solved problem for ``warm_up``."""
    question = [{"type": "image"}, {"type": "text", "text": problem.question}]
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": problem.solution}]
    return {"messages": messages, "images": [Image.open(BytesIO(picture))]}


def _angles() -> Iterator[Problem]:
    """Yield problems on the sum of the angles of a triangle, and of the angles at a line."""
    angles = range(20, 81, 5)
    for kind, a, b, place in product(("angle_sum", "straight_angle"), angles, angles, range(3)):
        labels = [f"{a}°", f"{b}°"]
        labels.insert(place, "x")
        yield Problem(kind, tuple(labels), "Find the angle x.", f"180-{a}-{b}={180 - a - b}")


def _right_triangles() -> Iterator[Problem]:
    """Yield problems with sides that are whole numbers below 100."""
    for a, b in product(range(1, 100), repeat=2):
        c = isqrt(a * a + b * b)
        if c * c == a * a + b * b and c < 100:
            sides = str(a), str(b), str(c)
            for place, solution in enumerate((f"{b},{c},x={a}", f"{a},{c},x={b}", f"{a},{b},x={c}")):
                labels = *sides[:place], "x", *sides[place + 1 :]
                yield Problem("right_triangle", labels, "Find the length x.", solution)


def _rectangles() -> Iterator[Problem]:
    """Yield problems on the perimeter and the area of a rectangle; the labels are its sides."""
    for a, b in product(range(2, 13), repeat=2):
        yield Problem("rectangle", (str(a), str(b)), "Find the perimeter.", f"2*({a}+{b})={2 * (a + b)}")
        yield Problem("rectangle", (str(a), str(b)), "Find the area.", f"{a}*{b}={a * b}")


def _circles() -> Iterator[Problem]:
    """Yield problems on two circles that touch; the labels are their radii."""
    for a, b in product(range(2, 13), repeat=2):
        question = "Find the distance of the centres."
        yield Problem("circles", (str(a), str(b)), question, f"{a}+{b}={a + b}")
