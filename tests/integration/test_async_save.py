"""Whole runs with ``checkpoint.async_save``: they equal runs without it, also if stopped during a save."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_gmpo.errors import Exit
from megatron_gmpo.files import partial_path
from megatron_gmpo.supervision.records import LATEST
from megatron_gmpo.weights.inspection import inspect_checkpoint
from megatron_gmpo.weights.run_checkpoint import checkpoint_path

from ..support.commands import json_lines, options, outcome, run_module, start_module, tiny_run, wait_until

pytestmark = pytest.mark.distributed

TRAIN, HELD = "megatron_gmpo.train", "tests.support.held_saves"
STEPS = 6
ASYNC = options(checkpoint__async_save="true")


@pytest.fixture(scope="module")
def argv(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return a run of six small steps with a checkpoint after every second."""
    return tiny_run(
        tiny_model("qwen3_moe", num_layers=2),
        tmp_path_factory.mktemp("problems"),
        eval__before="false",
        algorithm__clip="adaptive",
        optimizer__lr=1e-3,
        train__num_steps=STEPS,
        checkpoint__save_interval=2,
        checkpoint__keep_last=STEPS,
    )


@pytest.fixture(scope="module")
def undisturbed(argv: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the run folder of a run that saves at once."""
    run_dir = tmp_path_factory.mktemp("undisturbed")
    done = run_module(TRAIN, *argv, *options(run_dir=run_dir), ranks=2)
    assert done.returncode == 0, done.stderr
    return run_dir


def figures(run_dir: Path) -> list[dict[str, Any]]:
    lines = json_lines(run_dir / "metrics.jsonl")
    return [
        {name: value for name, value in line.items() if not name.startswith(("time/", "throughput/"))}
        for line in lines
    ]


def events(run_dir: Path) -> list[tuple[str, int]]:
    path = run_dir / "events.jsonl"
    return [(event["event"], event["step"]) for event in json_lines(path)] if path.exists() else []


def contents(checkpoint: Path) -> dict[str, object]:
    """Return what a checkpoint holds, without torch's random number in .metadata and the config's run_dir."""
    found: dict[str, object] = {
        str(file.relative_to(checkpoint)): file.read_bytes()
        for file in checkpoint.rglob("*")
        if file.is_file() and file.name not in (".metadata", "state.json")
    }
    state = json.loads((checkpoint / "state.json").read_text())
    del state["checksum"], state["config"], state["files"][".metadata"]
    return found | {"state": state}


def test_it_equals_a_run_that_saves_at_once(argv: list[str], undisturbed: Path, tmp_path: Path) -> None:
    done = run_module(TRAIN, *argv, *options(run_dir=tmp_path), *ASYNC, ranks=2)
    assert done.returncode == 0, done.stderr
    assert "deprecat" not in done.stderr.lower()
    assert figures(tmp_path) == figures(undisturbed)
    assert events(tmp_path) == events(undisturbed) == [("checkpoint", step) for step in (2, 4, 6)]
    for step in (2, 4, 6):
        name = Path("checkpoints") / f"iter_{step:07d}"
        assert contents(tmp_path / name) == contents(undisturbed / name)
        assert inspect_checkpoint(tmp_path / name)["whole"] == "yes"
    assert not list((tmp_path / "checkpoints").glob(".partial_*"))


def test_a_stop_waits_for_the_save_in_progress(argv: list[str], undisturbed: Path, tmp_path: Path) -> None:
    """SIGTERM comes while step 2 is written; the run then saves its last step too, and can go on."""
    run_dir, go = tmp_path / "run", tmp_path / "go"
    command = [*argv, *options(run_dir=run_dir), *ASYNC]
    with start_module(HELD, *command, ranks=2, WRITE_AFTER=str(go)) as run:
        metrics = run_dir / "metrics.jsonl"
        wait_until(lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= 2, run, "step 2")
        run.send_signal(signal.SIGTERM)
        wait_until(lambda: events(run_dir) or len(figures(run_dir)) == 4, run, "the stop or step 4")
        assert (run_dir / "checkpoints" / LATEST).read_text() == "0"
        go.touch()
        _, said = run.communicate(timeout=200)
    end = outcome(run_dir)
    assert end["code"] == Exit.REQUEUE, said
    named = {(name, end["step"]) for name in ("stop_requested", "checkpoint", "saved_for_requeue")}
    assert {*events(run_dir)} == {("checkpoint", 2)} | named
    assert events(run_dir)[-1] == ("saved_for_requeue", end["step"])

    done = run_module(TRAIN, *command, ranks=2)
    assert done.returncode == 0, done.stderr
    assert figures(run_dir) == figures(undisturbed)


def test_an_error_during_a_save_abandons_it(argv: list[str], tmp_path: Path) -> None:
    """The files of the save would otherwise fill the disk while the outcome is written."""
    partial = partial_path(checkpoint_path(tmp_path / "checkpoints", 1))
    reward = "tests.support.rewards:raises_when_a_file_exists"
    command = [*argv, *options(run_dir=tmp_path, reward__name=reward, checkpoint__save_interval=1), *ASYNC]
    environment = {"RAISE_WHEN": str(partial), "WRITE_AFTER": str(tmp_path / "never")}
    with start_module(HELD, *command, ranks=2, **environment) as run:
        _, said = run.communicate(timeout=200)
    assert "ValueError: no verdict" in outcome(tmp_path)["reason"], said
    assert not partial.exists()
    assert (tmp_path / "checkpoints" / LATEST).read_text() == "0"


def test_a_rank_killed_during_a_save_loses_only_that_save(
    argv: list[str], undisturbed: Path, tmp_path: Path
) -> None:
    run_dir, go = tmp_path / "run", tmp_path / "go"
    command = [*argv, *options(run_dir=run_dir), *ASYNC]
    with start_module(HELD, *command, ranks=2, WRITE_AFTER=str(go)) as run:
        metrics = run_dir / "metrics.jsonl"
        wait_until(lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= 3, run, "step 3")
        # the end of the block kills all processes
    assert (run_dir / "checkpoints" / LATEST).read_text() == "0"
    done = run_module(TRAIN, *command, ranks=2)
    assert done.returncode == 0, done.stderr
    assert figures(run_dir) == figures(undisturbed)
    assert not list((run_dir / "checkpoints").glob(".partial_*"))
