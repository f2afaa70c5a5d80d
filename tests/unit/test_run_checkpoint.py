"""A damaged file of a checkpoint is found and named, with the newest checkpoint that is whole."""

from __future__ import annotations

import json
import math
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from megatron_gmpo.checkpoint import go_back, room_to_save
from megatron_gmpo.config import Config
from megatron_gmpo.errors import CollapseError, InputError
from megatron_gmpo.metrics.collapse import Collapse, CollapseDetector
from megatron_gmpo.metrics.logger import MetricLogger
from megatron_gmpo.state import TrainingState
from megatron_gmpo.supervision.records import LATEST
from megatron_gmpo.weights import checksums
from megatron_gmpo.weights.run_checkpoint import (
    check_whole,
    choose_whole,
    find_candidates,
    full_damage,
    quick_damage,
    read_state,
    write_state,
)
from megatron_gmpo.weights.torch_dist import checkpoint_folder

from ..support.run_states import newest, run_state

FILES = [".metadata", "metadata.json", "common.pt", "__0_0.distcp", "__1_0.distcp"]
RANDOM = "random/rank_00000.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with the checkpoints of steps 4, 5 and 6, of which 6 is the newest."""
    noise = random.Random(0)
    for step in (4, 5, 6):
        checkpoint = tmp_path / f"iter_{step:07d}"
        (checkpoint / "random").mkdir(parents=True)
        for name in (*FILES, RANDOM):
            (checkpoint / name).write_bytes(noise.randbytes(200))
        recorded = checksums.checksums_of(checkpoint, [checkpoint / name for name in (*FILES, RANDOM)])
        write_state(checkpoint, run_state(step, model={"1": 0.1}, files=recorded))
    (tmp_path / LATEST).write_text("6")
    return tmp_path


def chosen(folder: Path, *, fall_back: bool = False) -> tuple[Path | None, str]:
    return choose_whole(find_candidates(folder), fall_back=fall_back, damage_of=full_damage)


def test_the_checksum_is_xxh3() -> None:
    """The value is from XXH3's own list of test vectors (xxHash, tests/sanity_test_vectors.h, length 0)."""
    assert checksums.checksum(b"") == "2d06800538d394c2"


def test_a_whole_checkpoint_is_taken(folder: Path) -> None:
    assert chosen(folder) == (folder / "iter_0000006", "")
    assert read_state(folder / "iter_0000006").model == {"1": 0.1}
    (folder / LATEST).write_text(" 5\n")
    assert chosen(folder)[0] == folder / "iter_0000005"
    shutil.rmtree(folder / "iter_0000006")
    go_back(folder / "iter_0000005", {"config": {"train": {"freeze_router": True}}})
    assert read_state(folder / "iter_0000005").config.train.freeze_router
    assert chosen(folder) == (folder / "iter_0000005", "")


STATES: dict[str, tuple[Callable[[dict], object], str]] = {
    "empty": (lambda state: "", "cannot be read"),
    "cut": (lambda state: json.dumps(state)[:-20], "cannot be read"),
    "no object": (lambda state: json.dumps([state]), "is not a JSON object"),
    "nothing in it": (lambda state: "{}", "lacks step"),
    "edited": (lambda state: json.dumps(state | {"model": {}}), "has another content than was written"),
    "no checksum": (lambda state: json.dumps(state | {"checksum": None}), "has another content than was "),
    "nested": (lambda state: "[" * 100_000, "cannot be read"),
}


@pytest.mark.parametrize("name", STATES)
def test_a_damaged_state_is_named_before_anything_is_loaded(name: str, folder: Path) -> None:
    file = folder / "iter_0000006" / "state.json"
    change, message = STATES[name]
    file.write_text(str(change(json.loads(file.read_text()))))
    with pytest.raises(
        InputError, match=rf"iter_0000006 is damaged: state\.json {re.escape(message)}"
    ) as error:
        newest(folder)
    assert "\n" not in str(error.value)
    assert str(error.value).endswith(
        "; the newest whole checkpoint is iter_0000005: set checkpoint.fall_back = true to go on from it"
    )
    found, damage = choose_whole(find_candidates(folder), fall_back=True)
    assert found == folder / "iter_0000005"
    assert message in damage


STREAM = {"seed": 5, "epoch": 0, "position": 3, "num_prompts": 10}
VALUES: list[tuple[dict[str, Any], str]] = [
    ({"step": "6"}, "has step = '6' (Input should be a valid integer)"),
    ({"step": 5}, "states step 5"),
    ({"updates": -1}, "has updates = -1 ("),
    ({"updates": 2**63}, f"has updates = {2**63} ("),
    ({"updates": None}, "has updates = None ("),
    ({"world_size": 2.5}, "has world_size = 2.5 ("),
    ({"world_size": True}, "has world_size = True ("),
    ({"model": None}, "has model = None ("),
    ({"config": []}, "has config = [] ("),
    ({"config": {}}, "lacks config.train"),
    ({"files": {"a": [1]}}, "lacks files.a.1"),
    ({"files": {"a": ["1", ""]}}, "has files.a.0 = '1' ("),
    ({"files": {"a": [1, 2]}}, "has files.a.1 = 2 ("),
    ({"prompts": []}, "has prompts = [] ("),
    ({"prompts": STREAM | {"position": 11}}, "(position = 11 is beyond the 10 prompts)"),
    ({"prompts": STREAM | {"position": 10**30}}, "(position = 1000"),
    ({"prompts": STREAM | {"position": -1}}, "has prompts.position = -1 ("),
    ({"prompts": STREAM | {"position": 3.5}}, "has prompts.position = 3.5 ("),
    ({"prompts": STREAM | {"epoch": True}}, "has prompts.epoch = True ("),
    ({"prompts": STREAM | {"num_prompts": 0}}, "has prompts.num_prompts = 0 ("),
    ({"prompts": STREAM | {"seed": "x" * 9999}}, "has prompts.seed = 'xxxxxxxxxxxx...xxxxxxxxxxxxx' ("),
    ({"prompts": STREAM | {"fingerprint": {}}}, "lacks prompts.fingerprint.prompts"),
    ({"clip": {"low": 0.1}}, "lacks clip.high"),
    ({"files": {"a\nb": 0}}, r"has files.a\nb = 0 ("),
    ({"clip": {"low": 0.1, "high": math.inf}}, "has clip.high = inf ("),
    ({"collapse": []}, "has collapse = [] ("),
]


@pytest.mark.parametrize(("changes", "message"), VALUES)
def test_a_wrong_value_in_a_state_is_named(changes: dict[str, Any], message: str, folder: Path) -> None:
    """The checksum does not tell: whoever writes the file by hand can write it too."""
    newest_one = folder / "iter_0000006"
    write_state(newest_one, run_state(6) | changes)
    with pytest.raises(InputError) as error:
        newest(folder)
    line = str(error.value)
    assert line.startswith(f"{newest_one} is damaged: state.json ")
    assert message in line
    assert "\n" not in line
    assert len(line) < 600
    found, _ = choose_whole(find_candidates(folder), fall_back=True)
    assert found == folder / "iter_0000005"


def test_the_states_of_earlier_versions_are_read(folder: Path) -> None:
    """They count the updates in the state of the schedule, and have no checksums and fewer fields."""
    state = run_state(6, clip={"low": 0.1, "high": 0.2}, prompts=STREAM)
    state["scheduler"] = {"num_steps": state.pop("updates")}
    del state["files"], state["collapse"]["window"]
    file = folder / "iter_0000006" / "state.json"
    file.write_text(json.dumps(state))
    found = read_state(file.parent)
    assert found.collapse
    assert (found.updates, found.files, found.collapse.window) == (6, {}, None)
    for name in ("model", "prompts", "clip", "collapse", "config"):
        file.write_text(json.dumps({field: value for field, value in state.items() if field != name}))
        assert not getattr(read_state(file.parent), name) or name == "config"
    for scheduler in ({}, None, [], {"num_steps": "6"}):
        file.write_text(json.dumps(state | {"scheduler": scheduler}))
        with pytest.raises(InputError, match=r"state\.json (lacks updates|has scheduler\.num_steps = '6')"):
            read_state(file.parent)


@pytest.mark.parametrize("file", [*FILES, RANDOM])
@pytest.mark.parametrize("kind", ["gone", "empty", "cut", "longer", "flipped"])
def test_a_damaged_file_is_named(kind: str, file: str, folder: Path) -> None:
    path = folder / "iter_0000006" / file
    content = path.read_bytes()
    flipped = bytes([*content[:100], content[100] ^ 4, *content[101:]])
    path.unlink()
    if kind != "gone":
        path.write_bytes(
            {"empty": b"", "cut": content[:-1], "longer": content + b"x", "flipped": flipped}[kind]
        )
    with pytest.raises(InputError, match=rf"iter_0000006 is damaged: {re.escape(file)} .*iter_0000005: set "):
        chosen(folder)
    found, damage = chosen(folder, fall_back=True)
    assert found == folder / "iter_0000005"
    assert file in damage


def test_a_checkpoint_is_whole_under_any_name(folder: Path) -> None:
    newest_one = folder / "iter_0000006"
    check_whole(newest_one, "take it", "skip it")
    (folder / "iter_0000004").rename(folder / "best")
    check_whole(folder / "best", "take it", "skip it")
    (folder / "iter_0000005").rename(folder / "iter_0000007")
    with pytest.raises(
        InputError, match=r"iter_0000007 is damaged: state\.json states step 5; .* is iter_0000006"
    ):
        check_whole(folder / "iter_0000007", "take it", "skip it")
    for checkpoint in (newest_one, folder / "best"):
        (checkpoint / RANDOM).write_bytes(bytes(200))
        with pytest.raises(
            InputError,
            match=rf"{checkpoint.name} is damaged: {RANDOM} has the checksum .*; no older .* or skip it$",
        ):
            check_whole(checkpoint, "take it", "skip it")
    shutil.rmtree(newest_one)
    (folder / "best" / "state.json").unlink()  # as in a conversion, or in a checkpoint of Megatron-LM
    check_whole(folder / "best", "take it", "skip it")


def test_every_flipped_bit_is_found(folder: Path) -> None:
    checkpoint, noise = folder / "iter_0000006", random.Random(1)
    for path in sorted(found for found in checkpoint.rglob("*") if found.is_file()):
        content = path.read_bytes()
        for _ in range(40):
            at = noise.randrange(len(content))
            path.write_bytes(
                bytes([*content[:at], content[at] ^ (1 << noise.randrange(8)), *content[at + 1 :]])
            )
            changed_space = path.name == "state.json" and json.loads(content) == _json(path)
            assert full_damage(checkpoint) or changed_space, (path, at)
        path.write_bytes(content)
    assert full_damage(checkpoint) == ""


def _json(path: Path) -> object:
    try:
        return json.loads(path.read_bytes())
    except ValueError:
        return None


@pytest.mark.parametrize(
    "content", [None, b"", b"release", b"iter_0000006", b"-6", b"6.0", b"\xff\x00", b"6 5"]
)
def test_a_lost_pointer_is_no_new_run(content: bytes | None, folder: Path) -> None:
    (folder / LATEST).unlink()
    if content is not None:
        (folder / LATEST).write_bytes(content)
    with pytest.raises(InputError) as error:
        newest(folder)
    shown = "" if content is None else f" contains {content.decode(errors='replace')!r}"
    assert str(error.value).startswith(f"{folder / LATEST}{shown or ' is missing'}")
    assert str(error.value).endswith(
        "the newest whole checkpoint is iter_0000006: write 6 into latest_checkpointed_iteration.txt, or "
        "set checkpoint.fall_back = true to go on from it"
    )
    assert choose_whole(find_candidates(folder), fall_back=True)[0] == folder / "iter_0000006"


def test_conversions_and_resumes_read_one_pointer(folder: Path) -> None:
    """Megatron-LM writes "release" for weights without a step (training/checkpointing.py: read_metadata)."""
    (folder / "iter_0000006").rename(folder / "release")
    for content, name in ((" 5\n", "iter_0000005"), ("release\n", "release")):
        (folder / LATEST).write_text(content)
        assert checkpoint_folder(folder) == folder / name
    for content in ("iter_0000005", "../x", "5 4", "-5", ""):
        (folder / LATEST).write_text(content)
        with pytest.raises(InputError, match=r"instead of the number of a step: correct it, or give one"):
            checkpoint_folder(folder)
    assert checkpoint_folder(folder / "release") == folder / "release"
    with pytest.raises(InputError, match=r"state\.json' holds no \.metadata"):
        checkpoint_folder(folder / "release" / "state.json")


def test_a_pointer_to_a_missing_checkpoint(folder: Path) -> None:
    (folder / LATEST).write_text("7")
    with pytest.raises(
        InputError, match=r"iter_0000007 is damaged: state\.json is missing; .* is iter_0000006"
    ):
        newest(folder)


def test_before_and_after_the_first_save(tmp_path: Path, folder: Path) -> None:
    """A kill after the first checkpoint's rename leaves the pointer at 0: nothing is lost."""
    assert chosen(tmp_path / "nowhere") == (None, "")
    (folder / LATEST).write_text("0")
    assert chosen(folder) == (folder / "iter_0000006", "")
    for step in (4, 5, 6):
        shutil.rmtree(folder / f"iter_{step:07d}")
    assert chosen(folder) == (None, "")


def test_the_oldest_may_be_the_only_whole_one(folder: Path) -> None:
    (folder / "iter_0000006" / ".metadata").unlink()
    (folder / "iter_0000005" / "__1_0.distcp").write_bytes(b"")
    assert quick_damage(folder / "iter_0000005") == ""  # the large files wait for the process group
    assert chosen(folder, fall_back=True)[0] == folder / "iter_0000004"
    (folder / "iter_0000004" / "state.json").unlink()
    for fall_back in (False, True):
        with pytest.raises(
            InputError, match=r"iter_0000006 is damaged: \.metadata .*no older checkpoint is whole"
        ):
            chosen(folder, fall_back=fall_back)


@pytest.mark.parametrize(
    ("verify", "saved_step", "taken"),
    [
        (True, 6, 4),
        (False, 6, 5),  # the user chose to compare sizes only
        (False, 4, 4),  # the run has fallen back to 4, and 5 is of its discarded steps
    ],
)
def test_a_rollback_takes_a_whole_checkpoint_of_this_run(
    verify: bool, saved_step: int, taken: int, folder: Path
) -> None:
    """Step 5 has a flipped bit in a large file. The collapse began at step 7, so 5 is the first candidate."""
    file = folder / "iter_0000005" / "__1_0.distcp"
    content = file.read_bytes()
    file.write_bytes(bytes([content[0] ^ 4, *content[1:]]))
    cfg = Config.model_validate({"collapse": {"action": "stop"}, "checkpoint": {"verify": verify}})
    state = TrainingState.__new__(TrainingState)  # without a policy, which "stop" does not use
    state._cfg, state._run = cfg, Mock(checkpoint_dir=folder)
    state._detector, state.step, state.saved_step = CollapseDetector(cfg.collapse), 8, saved_step
    state._save = None
    with pytest.raises(CollapseError, match=rf"from before the collapse is .*iter_000000{taken};"):
        state.react(Collapse("entropy", began=7), Mock())


def test_metrics_are_on_the_disk_before_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the checkpoint's own step can be missing for good after a power loss."""
    order: list[str] = []
    # a test cannot cut the power, so it records which files the kernel is asked to flush
    monkeypatch.setattr(
        os, "fsync", lambda number: order.append(Path(os.readlink(f"/proc/self/fd/{number}")).name)
    )
    state = TrainingState.__new__(TrainingState)
    state._save = Mock(step=1, finish=lambda: order.append("checkpoint"), began=0.0)
    logger = MetricLogger(tmp_path, tensorboard=False)
    logger.log(1, {"loss": 1.0})
    logger.event("resume")
    state.finish_save(logger)
    assert {"metrics.jsonl", "events.jsonl"} <= {*order[: order.index("checkpoint")]}


@pytest.mark.parametrize(
    ("existing", "keep_last", "saves", "more"),
    # most at a time: keep_last and the one being written; a run that is stopped also saves
    [
        (0, 2, 9, 3),
        (1, 2, 9, 2),
        (2, 2, 9, 1),
        (3, 2, 9, 1),
        (0, 2, 1, 1),
        (0, 2, 2, 2),
        (0, 2, 0, 1),
        (0, 1, 9, 2),
    ],
)
def test_keep_last_needs_room_for_one_more(
    existing: int, keep_last: int, saves: int, more: int, tmp_path: Path
) -> None:
    for step in range(existing):
        (tmp_path / f"iter_{step:07d}").mkdir()
    assert room_to_save(tmp_path, keep_last, saves)[0] == more
