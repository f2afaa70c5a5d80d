"""Faults in real runs: nothing good is lost, one line says what happened, and the code is right."""

from __future__ import annotations

import copy
import functools
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_gmpo.batch.samples import Prompt, Sample, SampleGroup
from megatron_gmpo.errors import Exit
from megatron_gmpo.rollout.replay import save_groups
from megatron_gmpo.supervision.records import LATEST
from megatron_gmpo.weights.inspection import inspect_checkpoint
from megatron_gmpo.weights.run_checkpoint import quick_damage, write_state

from ..support.commands import (
    error_lines,
    json_lines,
    options,
    outcome,
    run_module,
    start_module,
    tiny_run,
    wait_until,
)
from ..support.small_disk import fill, small_disk

pytestmark = pytest.mark.distributed

TRAIN, EVALUATE = "megatron_gmpo.train", "megatron_gmpo.evaluate"
TO_HF = "tools.convert_megatron_to_hf"
STEPS = 4
_TIMEOUT_S = 240


@pytest.fixture(scope="module")
def argv(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return a run of four small steps with a checkpoint after each, and an evaluation after the last."""
    folder = tmp_path_factory.mktemp("problems")
    return tiny_run(
        tiny_model("qwen3_moe", num_layers=2),
        folder,
        eval__sets=f'{{held = {{path = "{folder}/heldout.jsonl", max_prompts = 2}}}}',
        eval__before="false",
        optimizer__lr=1e-3,
        train__num_steps=STEPS,
        checkpoint__save_interval=1,
        checkpoint__keep_last=STEPS,
    )


@pytest.fixture(scope="module")
def undisturbed(argv: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the run folder of a run without faults, with a checkpoint of every step."""
    run_dir = tmp_path_factory.mktemp("undisturbed")
    done = run_module(TRAIN, *argv, *options(run_dir=run_dir), ranks=2)
    assert done.returncode == 0, done.stderr
    return run_dir


@pytest.fixture
def run_dir(undisturbed: Path, tmp_path: Path) -> Path:
    """Return a copy of the run as it was after step 3."""
    run_dir = tmp_path / "run"
    shutil.copytree(undisturbed, run_dir)
    checkpoints = run_dir / "checkpoints"
    shutil.rmtree(checkpoints / f"iter_{STEPS:07d}")
    (checkpoints / LATEST).write_text(str(STEPS - 1))
    return run_dir


def events(run_dir: Path) -> list[dict[str, Any]]:
    return json_lines(run_dir / "events.jsonl")


def figures(run_dir: Path) -> list[dict[str, Any]]:
    lines = json_lines(run_dir / "metrics.jsonl")
    return [
        {name: value for name, value in line.items() if not name.startswith(("time/", "throughput/"))}
        for line in lines
    ]


def flip_a_byte(file: Path) -> None:
    with file.open("r+b") as content:
        content.seek(file.stat().st_size // 2)
        (byte,) = content.read(1)
        content.seek(-1, 1)
        content.write(bytes([byte ^ 0x10]))


def changed(state: dict[str, Any], path: tuple[str, ...], *value: object) -> dict[str, Any]:
    """Return a copy of a state whose field ``path`` has another value, or is removed if none is given."""
    copied = copy.deepcopy(state)
    parent = functools.reduce(dict.__getitem__, path[:-1], copied)
    del parent[path[-1]]
    if value:
        parent[path[-1]] = value[0]
    return copied


def fields(tree: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for name, value in tree.items():
        yield (name,)
        if isinstance(value, dict):
            yield from ((name, *path) for path in fields(value))


# --- damaged checkpoints ------------------------------------------------------------------------------------


def test_a_flipped_byte_is_named_and_an_older_checkpoint_taken_on_request(
    argv: list[str], run_dir: Path, undisturbed: Path
) -> None:
    newest = run_dir / "checkpoints" / f"iter_{STEPS - 1:07d}"
    assert inspect_checkpoint(newest)["whole"] == "yes"
    flip_a_byte(newest / "__0_0.distcp")
    assert re.match(r"no: __0_0\.distcp has the checksum ", inspect_checkpoint(newest)["whole"])

    refused = run_module(TRAIN, *argv, *options(run_dir=run_dir), ranks=2)
    assert outcome(run_dir)["code"] == Exit.BAD_INPUT
    (line,) = error_lines(refused.stderr)
    assert line == f"error: {outcome(run_dir)['reason']}"
    assert re.search(
        r"iter_0000003 is damaged: __0_0\.distcp has the checksum \w+ instead of \w+; the newest whole "
        r"checkpoint is iter_0000002: set checkpoint\.fall_back = true to go on from it$",
        line,
    )
    assert figures(run_dir) == figures(undisturbed)  # nothing was lost

    chosen = options(
        run_dir=run_dir, checkpoint__fall_back="true", checkpoint__save_interval=2, checkpoint__keep_last=2
    )
    done = run_module(TRAIN, *argv, *chosen, ranks=2)
    assert done.returncode == 0, done.stderr
    assert f"going on from {run_dir / 'checkpoints' / 'iter_0000002'}" in done.stderr
    assert figures(run_dir) == figures(undisturbed)
    (event,) = [event for event in events(run_dir) if event["event"] == "fall_back"]
    assert event["step"] == STEPS - 2
    assert "iter_0000003 is damaged: __0_0.distcp" in event["reason"]
    # step 3 was repeated and not saved again: the damaged checkpoint does not take a place of keep_last
    stored = sorted((run_dir / "checkpoints").glob("iter_*"))
    assert [path.name for path in stored] == ["iter_0000002", "iter_0000004"]
    assert inspect_checkpoint(stored[0])["whole"] == "yes"

    flip_a_byte(stored[1] / "__0_0.distcp")
    finished = run_module(TRAIN, *argv, *options(run_dir=run_dir))
    assert finished.returncode == Exit.BAD_INPUT, finished.stdout
    (line,) = error_lines(finished.stderr)
    assert "iter_0000004 is damaged: __0_0.distcp has the checksum " in line


def test_the_other_commands_that_read_weights_compare_checksums(argv: list[str], run_dir: Path) -> None:
    newest, hf = run_dir / "checkpoints" / "iter_0000003", run_dir / "hf"
    convert = [TO_HF, "--megatron", newest.parent, "--hf", hf]
    flip_a_byte(newest / "__0_0.distcp")
    for command, remedy in (
        ([EVALUATE, *argv, *options(run_dir=run_dir)], "set checkpoint.fall_back = true "),
        (convert, "give that folder as --megatron, or skip the check with --skip_checksums"),
    ):
        done = run_module(*command)
        assert done.returncode == Exit.BAD_INPUT, done.stdout
        (line,) = error_lines(done.stderr)
        assert f"{newest} is damaged: __0_0.distcp has the checksum " in line
        assert f"; the newest whole checkpoint is iter_0000002: {remedy}" in line
    flip_a_byte(newest / "__0_0.distcp")  # back
    flip_a_byte(newest / "random" / "rank_00001.safetensors")  # which a conversion does not read
    assert run_module(*convert).returncode == Exit.BAD_INPUT
    assert not hf.exists()
    done = run_module(*convert, "--skip_checksums")
    assert done.returncode == 0, done.stderr
    assert (hf / "model.safetensors").exists()


OPTIONAL = {  # earlier versions did not write them
    ("prompts", "shuffle"),
    ("prompts", "fingerprint"),
    ("prompts", "trained"),
    ("clip", "loss"),
    ("clip", "start"),
    ("clip", "start", "low"),
    ("clip", "start", "high"),
    ("collapse", "window"),
    ("config", "train", "freeze_router"),
}


def test_each_field_of_a_state_that_is_gone_or_wrong_is_named(run_dir: Path) -> None:
    """The state is a run's own, with a valid checksum. Fields that no resume reads are left out."""
    checkpoint = run_dir / "checkpoints" / "iter_0000003"
    state = json.loads((checkpoint / "state.json").read_text())
    state["clip"] = {"low": 0.4, "high": 0.4, "loss": "gmpo", "start": {"low": 0.4, "high": 0.4}}
    del state["checksum"]
    paths = [path for path in fields(state) if path[0] not in ("model", "files", "config") or len(path) == 1]
    paths += [("config", "train"), ("config", "train", "freeze_router")]
    assert {("updates",), ("world_size",), ("prompts", "seed"), ("collapse", "signals", "grad_norm")} <= {
        *paths
    }
    for path in paths:
        name = ".".join(path)
        write_state(checkpoint, changed(state, path))
        assert quick_damage(checkpoint) == ("" if path in OPTIONAL else f"state.json lacks {name}")
        wrong = 7 if path[-1] in ("prompts", "answers", "any_order", "loss") else "wrong"
        write_state(checkpoint, changed(state, path, wrong))
        assert quick_damage(checkpoint).startswith(f"state.json has {name} = {wrong!r} (")
    write_state(checkpoint, state)
    assert quick_damage(checkpoint) == ""


def test_a_replay_must_have_the_steps_after_an_older_checkpoint(
    argv: list[str], run_dir: Path, tmp_path: Path
) -> None:
    flip_a_byte(run_dir / "checkpoints" / "iter_0000003" / "__0_0.distcp")
    sample = Sample([3, 2, 1], [False, False, True], [0.0, 0.0, -1.0], "", "stop", 0)
    save_groups(tmp_path / "rollouts", 3, {0: SampleGroup(Prompt("p", answer=""), [sample])})
    chosen = options(
        run_dir=run_dir, checkpoint__fall_back="true", rollout__replay_path=tmp_path / "rollouts"
    )
    done = run_module(TRAIN, *argv, *chosen)
    assert done.returncode == Exit.BAD_INPUT
    (line,) = error_lines(done.stderr)
    assert line.endswith("has no groups for step 2, it has steps 3 to 3: save them with rollout.save_path"), (
        line
    )


def test_the_pointer_and_small_files_are_checked_before_anything_starts(
    argv: list[str], run_dir: Path
) -> None:
    """The same for training and evaluation. tests/unit/test_run_checkpoint.py has the table of damages."""
    pointer, newest = run_dir / "checkpoints" / LATEST, run_dir / "checkpoints" / "iter_0000003"
    faults: list[tuple[Callable[[], object], str]] = [
        (pointer.unlink, r"latest_checkpointed_iteration\.txt is missing; .* is iter_0000003: write 3 into "),
        (lambda: pointer.write_text("release"), r"contains 'release' instead of the number of a step; "),
        (
            lambda: (pointer.write_text("3"), (newest / ".metadata").unlink()),
            r"damaged: \.metadata cannot be",
        ),
        (lambda: (newest / "state.json").write_text("[]"), r"damaged: state\.json is not a JSON object; "),
        (lambda: write_state(newest, changed(state, ("updates",))), r"damaged: state\.json lacks updates; "),
    ]
    state = json.loads((newest / "state.json").read_text())
    del state["checksum"]
    sets = options(eval__sets='{a = {path = "nowhere.jsonl"}}')
    metrics = (run_dir / "metrics.jsonl").read_bytes()
    for fault, message in faults:
        fault()
        for command, more in ((TRAIN, []), (EVALUATE, sets)):
            done = run_module(command, *argv, *options(run_dir=run_dir), *more)
            assert done.returncode == Exit.BAD_INPUT
            (line,) = error_lines(done.stderr)
            assert re.search(message, line), line
            assert "set checkpoint.fall_back = true" in line
            assert "Traceback" not in done.stderr
    assert (run_dir / "metrics.jsonl").read_bytes() == metrics
    assert len(list((run_dir / "checkpoints").glob("iter_*"))) == STEPS - 1


# --- kill -9 ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_killed_in_every_phase_equals_an_undisturbed_one(
    ranks: int, argv: list[str], undisturbed: Path, tmp_path: Path
) -> None:
    run_dir, whole = tmp_path / "killed", undisturbed
    under = {"ranks": ranks} if ranks > 1 else {}
    if ranks == 1:
        whole = tmp_path / "whole"
        assert run_module(TRAIN, *argv, *options(run_dir=whole)).returncode == 0
    kills = [(1, "start", 0), (0, "weight_sync", 0), (0, "checkpoint", 0), (1, "rollout", 1)]
    kills += [(0, "start", 1), (1, "exchange", 1), (1, "logprobs", 1), (1, "checkpoint", 1)]
    kills += [(0, "checkpoint", 2)]
    kills += [(0, "train", 3), (1, "evaluation", 3)]
    for rank, phase, step in kills:
        done = run_module(
            "tests.support.killed", rank % ranks, phase, step, *argv, *options(run_dir=run_dir), **under
        )
        assert done.returncode not in (0, 2), (phase, done.stderr)
        beat = json.loads((run_dir / "heartbeats" / f"rank_{rank % ranks:05d}.json").read_text())
        assert beat["phase"] != "end", phase
    done = run_module(TRAIN, *argv, *options(run_dir=run_dir), **under)
    assert done.returncode == 0, done.stderr
    assert figures(run_dir) == figures(whole)
    assert [line["step"] for line in figures(run_dir)] == list(range(1, STEPS + 1))
    assert not list((run_dir / "checkpoints").glob(".partial_*"))


# --- full disks ---------------------------------------------------------------------------------------------


def test_too_little_shared_memory_ends_the_run_with_one_line(argv: list[str], tmp_path: Path) -> None:
    """The disk has one page, and each of the two replicas needs one."""
    with small_disk(tmp_path / "disk", "4k") as disk:
        small = options(run_dir=tmp_path / "run", rollout__exchange_folder=disk)
        done = run_module(TRAIN, *argv, *small, ranks=2)
        assert not list(disk.iterdir())
    assert done.returncode != 0
    (line,) = error_lines(done.stderr)
    assert re.search(
        rf"rollout\.exchange_folder = '{disk}' of node '.+' has 0\.004 MB free, and the tokens of this step "
        r"need 0\.008 MB: enlarge that file system, choose another folder, or lower rollout\.prompts_per_s",
        line,
    ), line
    outcome = json.loads((tmp_path / "run" / "outcome.json").read_text())
    assert outcome["code"] == Exit.BAD_INPUT


def test_too_small_a_disk_is_refused_before_the_run(argv: list[str], tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "8m") as disk:
        keep = options(run_dir=disk / "run", checkpoint__keep_last=2)
        done = run_module(TRAIN, *argv, *keep)
        assert done.returncode == Exit.BAD_INPUT
        (line,) = error_lines(done.stderr)
        assert re.search(
            r"has 0\.008\d* GB of disk space left, and checkpoint\.keep_last = 2 needs room for 3, 0 exist, "
            r"0\.00\d+ GB each: make room, or choose another run_dir$",
            line,
        ), line
        assert not (disk / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("background", ["false", "true"])
def test_a_disk_that_fills_up_in_a_checkpoint(
    argv: list[str], tmp_path: Path, undisturbed: Path, background: str
) -> None:
    """The incomplete checkpoint is removed; with more room the run goes on as if undisturbed."""
    argv = [*argv, *options(checkpoint__async_save=background)]
    with small_disk(tmp_path / "disk", "9m") as disk:
        run_dir = disk / "run"
        command = [*argv, *options(run_dir=run_dir, supervision__min_free_disk_gb=0)]
        done = run_module(TRAIN, *command, ranks=2)
        assert done.returncode != 0
        assert error_lines(done.stderr) == [f"error: {outcome(run_dir)['reason']}"]
        assert outcome(run_dir)["code"] == Exit.BAD_INPUT  # Slurm does not try again
        assert outcome(run_dir)["reason"].startswith(f"the file system {disk} is full (No space left")
        names = {path.name for path in (run_dir / "checkpoints").iterdir()}
        assert names == {"iter_0000001", "iter_0000002", "hf", LATEST}
        with small_disk(tmp_path / "larger", "64m") as larger:
            shutil.copytree(run_dir, larger / "run")
            done = run_module(TRAIN, *argv, *options(run_dir=larger / "run"), ranks=2)
            assert done.returncode == 0, done.stderr
            assert figures(larger / "run") == figures(undisturbed)


def test_a_disk_that_fills_up_between_two_steps(argv: list[str], tmp_path: Path) -> None:
    """No file can be written any more, neither transcripts nor metrics, errors or outcome.json."""
    with small_disk(tmp_path / "disk", "16m") as disk:
        endless = options(run_dir=disk / "run", train__num_steps=10_000, checkpoint__save_interval=0)
        command = [*argv, *endless, *options(supervision__heartbeat_interval_s=0.2)]
        with start_module(TRAIN, *command) as run:
            wait_until((disk / "run" / "metrics.jsonl").exists, run, "the first step")
            deadline = time.monotonic() + _TIMEOUT_S
            while run.poll() is None and time.monotonic() < deadline:
                fill(disk)  # again, because the run frees space when it removes what it could not finish
                time.sleep(0.05)
            _, said = run.communicate(_TIMEOUT_S)
        assert run.returncode == Exit.BAD_INPUT, said
        (line,) = error_lines(said)
        assert line.startswith(f"error: the file system {disk} is full (No space left on device), so ")
        assert "Traceback" not in said
        assert "Exception" not in said


def test_a_run_ends_well_without_tensorboard_and_heartbeats(argv: list[str], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with (
        small_disk(run_dir / "tensorboard", "4k") as board,
        small_disk(run_dir / "heartbeats", "4k") as beats,
    ):
        fill(board)
        fill(beats)
        few = options(
            run_dir=run_dir, log__tensorboard="true", train__num_steps=2, checkpoint__save_interval=0
        )
        done = run_module(TRAIN, *argv, *few, *options(supervision__heartbeat_interval_s=0.1))
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("heartbeats/rank_00000.json cannot be written") == 1
        assert done.stderr.count("tensorboard cannot be written (No space left on device)") == 1
        assert "Traceback" not in done.stderr
    assert outcome(run_dir)["code"] == Exit.DONE
    assert len(figures(run_dir)) == 2
