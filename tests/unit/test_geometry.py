"""The geometry task: answers, pictures, and the split into training and held-out problems."""

from __future__ import annotations

import random
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

from megatron_gmpo.rewards.math.equality import is_correct
from megatron_gmpo.testing.geometry import (
    Problem,
    draw_problems,
    geometry_problems,
    make_geometry,
    split_problems,
)
from megatron_gmpo.testing.geometry_figures import draw

PROBLEMS = geometry_problems()


def lengths(problem: Problem) -> list[int]:
    """Return the numbers of a figure, with the answer in the place of x."""
    return [int(label.strip("°").replace("x", problem.answer)) for label in problem.labels]


def pixels(picture: bytes) -> np.ndarray:
    return np.asarray(Image.open(BytesIO(picture)))


def test_the_answers_satisfy_the_theorems() -> None:
    assert len(PROBLEMS) == 5
    for problem in PROBLEMS["angle_sum"] + PROBLEMS["straight_angle"]:
        assert sum(lengths(problem)) == 180
    for problem in PROBLEMS["right_triangle"]:
        assert abs(complex(*lengths(problem)[:2])) == lengths(problem)[2]
    for problem in PROBLEMS["rectangle"]:
        height, width = lengths(problem)
        asked = {"Find the perimeter.": height + width + height + width, "Find the area.": height * width}
        assert int(problem.answer) == asked[problem.question]
    for problem in PROBLEMS["circles"]:
        assert int(problem.answer) == sum(lengths(problem))


@pytest.mark.parametrize("kind", PROBLEMS)
def test_the_reward_accepts_the_solution_and_no_other_answer(kind: str) -> None:
    for problem in random.Random(0).sample(PROBLEMS[kind], 10):
        assert is_correct(problem.answer, problem.solution)
        assert not is_correct(str(int(problem.answer) + 1), problem.solution)


@pytest.mark.parametrize("kind", PROBLEMS)
def test_the_numbers_are_only_in_the_picture(kind: str) -> None:
    assert not any(character.isdigit() for problem in PROBLEMS[kind] for character in problem.question)
    for side in (56, 84, 336):
        one, other = random.Random(1).sample(PROBLEMS[kind], 2)
        shown = pixels(draw(kind, one.labels, side, random.Random(0)))
        assert shown.shape == (side, side)
        assert (shown != pixels(draw(kind, other.labels, side, random.Random(0)))).any()
        lines = pixels(draw(kind, [" "] * len(one.labels), side, random.Random(0)))
        assert ((lines == 0) <= (shown == 0)).all()


@pytest.mark.parametrize("kind", PROBLEMS)
def test_no_figure_leaves_its_picture(kind: str) -> None:
    for seed, problem in enumerate(random.Random(0).sample(PROBLEMS[kind], 15)):
        picture = pixels(draw(kind, problem.labels, 84, random.Random(seed)))
        border = [picture[0], picture[-1], picture[:, 0], picture[:, -1]]
        assert (np.concatenate(border) == 255).all(), problem


def test_held_out_problems_are_in_no_other_set() -> None:
    seen, unseen = split_problems(random.Random(0))
    for known, held_out in zip(seen, unseen, strict=True):
        assert not set(known) & set(held_out)
        assert len(held_out) == pytest.approx(0.1 * len({*known, *held_out}), abs=1)
    drawn = draw_problems(10, [[problems[0]] for problems in unseen], 56, random.Random(0))
    assert [problem for problem, _ in drawn] == 2 * [problems[0] for problems in unseen]


def test_equal_seeds_write_equal_files(tmp_path: Path) -> None:
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        counts, loss = make_geometry(
            tmp_path / name, num_train=20, num_heldout=10, warm_up_steps=None, seed=seed
        )
    assert loss is None
    assert {path.name: count for path, count in counts.items()} == {
        "train.parquet": 20,
        "heldout.parquet": 10,
        "blank.parquet": 10,
    }
    tables = {
        (name, file): pyarrow.parquet.read_table(tmp_path / name / f"{file}.parquet").to_pylist()
        for name in ("one", "same", "other")
        for file in ("train", "heldout", "blank")
    }
    for file in ("train", "heldout", "blank"):
        assert tables["one", file] == tables["same", file]
        assert tables["one", file] != tables["other", file]
    for row, blank in zip(tables["one", "heldout"], tables["one", "blank"], strict=True):
        assert row | {"images": None} == blank | {"images": None}
        assert row["problem"].startswith("<image>Find ")
        assert (pixels(row["images"][0]["bytes"]) == 0).any()
        assert (pixels(blank["images"][0]["bytes"]) == 255).all()
