"""One rank's error is raised on every rank, and a folder that all ranks write is renamed at the end."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_gmpo.distributed import agreed, folder_written_by_all, rank
from megatron_gmpo.errors import InputError, NodeError

from ..support.ranks import RankPool

pytestmark = pytest.mark.distributed


def raised(errors: list[Exception | None]) -> tuple[str, str]:
    """Return class and message of the error from ``agreed`` if the ranks' blocks raise ``errors``."""
    error = errors[rank()] if rank() < len(errors) else None
    try:
        with agreed():
            if error:
                raise error
    except Exception as stated:
        return type(stated).__name__, str(stated)
    return "", ""


@pytest.mark.parametrize(
    ("errors", "stated"),
    [
        ([None, None, None], [("", "")] * 3),
        ([None, InputError("field = 1: choose 2"), None], [("InputError", "field = 1: choose 2")] * 3),
        ([None, NodeError("node7", "no GPU"), InputError("x")], [("NodeError", "node node7: no GPU")] * 3),
        (
            [None, KeyError("x"), InputError("y")],
            [
                ("RunError", "rank 1 failed with KeyError: 'x'"),
                ("KeyError", "'x'"),
                ("RunError", "rank 1 failed with KeyError: 'x'"),
            ],
        ),
        (
            [InputError("y"), OSError(28, "No space left"), None],
            [("InputError", "y"), ("OSError", "[Errno 28] No space left"), ("InputError", "y")],
        ),
    ],
)
def test_one_ranks_error_is_raised_on_every_rank(
    ranks: RankPool, errors: list[Exception | None], stated: list[tuple[str, str]]
) -> None:
    assert ranks.run(3, raised, errors) == stated


def test_a_single_rank_raises_its_own_error() -> None:
    assert raised([None]) == ("", "")
    assert raised([ValueError("x")]) == ("ValueError", "x")


def write_share(final: Path, failing: int) -> str:
    try:
        with folder_written_by_all(final) as partial, agreed():
            (partial / str(rank())).write_text("share")
            if rank() == failing:
                raise InputError("stop")
    except InputError as error:
        return str(error)
    return ""


def test_every_rank_writes_into_a_new_folder(ranks: RankPool, tmp_path: Path) -> None:
    assert ranks.run(2, write_share, tmp_path / "out", 1) == ["stop"] * 2
    assert list(tmp_path.iterdir()) == []
    assert ranks.run(2, write_share, tmp_path / "out", -1) == [""] * 2
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == [
        "out",
        "out/0",
        "out/1",
    ]
