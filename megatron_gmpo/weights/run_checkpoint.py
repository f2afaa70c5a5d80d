"""Find the newest whole checkpoint of a training run. ``checkpoint.py`` describes the folder."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .. import files
from ..distributed import all_gather_objects, broadcast_object, rank, world_size
from ..errors import InputError
from ..supervision.records import LATEST, newest_step
from .checksums import checksum, find_damage
from .torch_dist import TorchDistReader, checkpoint_path


class _Config(BaseModel):
    model_config = ConfigDict(strict=True)
    train: dict[str, Any] = {}


class _Scheduler(BaseModel):
    model_config = ConfigDict(strict=True)
    num_steps: int = 0


class _State(BaseModel):
    """Types of the fields that every resume reads. The owners of other fields check them (``SavedState``)."""

    model_config = ConfigDict(strict=True)
    step: int | None = None
    world_size: int | None = None
    updates: Annotated[int, Field(ge=0, lt=2**63)] = 0
    scheduler: _Scheduler = _Scheduler()
    model: dict[str, Any] = {}
    config: _Config = _Config()
    files: dict[str, Annotated[list[int | str], Field(min_length=2, max_length=2)]] = {}


def latest_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint of a run's checkpoint folder, or None.

    Raises:
        InputError: see ``choose_whole``.
    """
    return choose_whole(find_candidates(folder))[0]


@dataclass(frozen=True)
class Candidates:
    """Checkpoints that may be the newest, in order.

    Attributes:
        problem: what is wrong with the file that states the newest step, or "".
        checkpoints: the checkpoint that the file names, which may be missing, and older ones. All, if there
            is a problem.
    """

    problem: str
    checkpoints: list[Path]


def find_candidates(folder: Path) -> Candidates:
    """Return the checkpoints of a run's checkpoint folder that may be the newest."""
    stored = stored_checkpoints(folder)
    try:
        step = newest_step(folder)
    except InputError as error:
        return Candidates(str(error), stored)
    if step is None:
        return Candidates(f"{folder / LATEST} is missing" if stored else "", stored)
    if step == 0:  # a kill between the first checkpoint's rename and the update of the file leaves this
        return Candidates("", stored)
    older = [found for found in stored if step_of(found) < step]
    return Candidates("", [checkpoint_path(folder, step), *older])


def choose_whole(
    candidates: Candidates, *, fall_back: bool = False, damage_of: Callable[[Path], str] | None = None
) -> tuple[Path | None, str]:
    """Return the newest checkpoint, and what is wrong with the one that should be the newest, or "".

    Args:
        fall_back: whether to return the newest whole checkpoint if there is damage, instead of an error.
        damage_of: function that returns what is wrong with a checkpoint, or "". The default is
            ``quick_damage``.

    Returns:
        None if no checkpoint was completed.

    Raises:
        InputError: no file states the newest step, or that checkpoint is damaged. The line names the newest
            whole checkpoint.
    """
    damage = candidates.problem
    for candidate in candidates.checkpoints:
        found = (damage_of or quick_damage)(candidate)
        if found:
            damage = damage or f"{candidate} is damaged: {found}"
        elif damage and not fall_back:
            point = f"write {step_of(candidate)} into {LATEST}, or " if candidates.problem else ""
            raise InputError(
                f"{damage}; the newest whole checkpoint is {candidate.name}: {point}"
                "set checkpoint.fall_back = true to go on from it"
            )
        else:
            return candidate, damage
    if damage:
        raise InputError(
            f"{damage}; no older checkpoint is whole: restore the file, or choose another run_dir"
        )
    return None, ""


def checkpoint_before(folder: Path, step: int, verify: bool) -> Path | None:
    """Return the newest whole checkpoint written before ``step``, or None. Collective.

    Args:
        verify: whether to compare the checksums of all files, or only the sizes of the small ones.
    """
    older = broadcast_object([found for found in stored_checkpoints(folder) if step_of(found) < step])
    damage_of = full_damage if verify else quick_damage
    return broadcast_object(next((found for found in older if not damage_of(found)), None))


def quick_damage(checkpoint: Path) -> str:
    """Return what is wrong with state.json or with the size of another small file, or ""."""
    try:
        recorded = read_state(checkpoint).get("files", {})
    except InputError as error:
        return str(error).removeprefix(f"{checkpoint}/")
    small = {name: about for name, about in recorded.items() if re.fullmatch(r"[^/]+(?<!\.distcp)", name)}
    return find_damage(checkpoint, small, sizes_only=True)


def full_damage(checkpoint: Path) -> str:
    """Return what is wrong with any file of a checkpoint, or "". Collective.

    Each file is read once, by one rank. A checkpoint of an older version has no checksums; the sizes of its
    tensors' files are compared with ``.metadata``.
    """
    found = quick_damage(checkpoint)
    recorded = {} if found else read_state(checkpoint).get("files", {})
    by_size = sorted(recorded.items(), key=lambda item: -item[1][0])
    found = found or find_damage(checkpoint, dict(by_size[rank() :: world_size()]))
    if not found and not recorded and rank() == 0:
        try:
            TorchDistReader(checkpoint)
        except InputError as error:
            found = str(error).removeprefix(f"{checkpoint}/")
    return next(filter(None, all_gather_objects(found)), "")


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Return the JSON state given to ``save_checkpoint``, with ``step``, ``world_size`` and ``files``.

    Raises:
        InputError: the file is missing or damaged, or states another step than the name of its folder.
    """
    path = checkpoint / "state.json"
    try:
        state = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read ({error})") from None
    if not isinstance(state, dict):
        raise InputError(f"{path} is not a JSON object")
    written = state.pop("checksum", None)
    older_version = "files" not in state and written is None
    if not older_version and written != _state_checksum(state):
        raise InputError(f"{path} has another content than was written")
    try:
        _State.model_validate(state)
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"{path} has {'.'.join(map(str, first['loc']))} = {first['input']!r}") from None
    if state.get("step") != step_of(checkpoint):
        raise InputError(f"{path} states step {state.get('step')}")
    return state


def write_state(checkpoint: Path, content: dict[str, Any]) -> None:
    """Write or replace the JSON state of a checkpoint, with the checksum of the state itself."""
    stored = json.loads(json.dumps(content))  # the checksum is one of the values as they are read
    stored["checksum"] = _state_checksum(stored)
    files.write(checkpoint / "state.json", json.dumps(stored, indent=1))


def stored_checkpoints(folder: Path) -> list[Path]:
    """Return the ``iter_*`` folders, newest first."""
    found = [path for path in folder.glob("iter_*") if re.fullmatch(r"iter_\d{7,9}", path.name)]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """Return the number in the name of an ``iter_*`` folder."""
    return int(checkpoint.name.removeprefix("iter_"))


def _state_checksum(state: dict[str, Any]) -> str:
    return checksum(json.dumps(state, sort_keys=True).encode())
