"""Find the newest whole checkpoint of a training run. ``checkpoint.py`` describes the folder."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short_repr
from typing import Annotated, Any

from pydantic import AliasChoices, AliasPath, Field, Strict, ValidationError

from .. import files
from ..config.saved import SavedState
from ..data.stream import StreamState
from ..distributed import all_gather_objects, broadcast_object, rank, world_size
from ..errors import InputError, printable
from ..losses.adaptive_clip import ClipState
from ..metrics.collapse import CollapseState
from ..supervision.records import LATEST, newest_step
from .checksums import checksum, find_damage
from .torch_dist import TorchDistReader, checkpoint_path

_NAME = re.compile(r"iter_\d{7,9}")
_MISSING_EARLIER: dict[str, Any] = {
    "files": {},
    "model": {},
    "prompts": None,
    "clip": None,
    "collapse": None,
    "config": {"train": {}},
}
"""Values of the fields that checkpoints of earlier versions, without checksums, may lack."""


class _TrainConfig(SavedState):
    """The fields of the saved ``train`` section that a resume compares with its own."""

    freeze_router: bool = False


class _RunConfig(SavedState):
    """The sections of the saved config that a resume compares with its own."""

    train: _TrainConfig


class RunState(SavedState):
    """The content of a checkpoint's ``state.json``. Only this class checks it.

    Attributes:
        step: completed steps.
        world_size: number of ranks that wrote the checkpoint.
        updates: optimizer steps that the weights contain. Earlier versions stored it in the state of the
            learning-rate schedule.
        model: ``models.identity.model_identity`` of the model.
        prompts: position in the training data; None if saved rollouts were replayed.
        clip: the adaptive clips; None if the clips were fixed.
        collapse: state of the collapse detector; None in checkpoints of earlier versions.
        config: the run's config, of which the fields that a resume compares are read.
        files: path in the checkpoint -> size in bytes and checksum; empty in checkpoints of earlier versions.
    """

    step: int
    world_size: int
    updates: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        validation_alias=AliasChoices("updates", AliasPath("scheduler", "num_steps"))
    )
    model: dict[str, Any]
    prompts: StreamState | None
    clip: ClipState | None
    collapse: CollapseState | None
    config: _RunConfig
    files: dict[str, Annotated[tuple[int, str], Strict(strict=False)]]


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
    candidates: Candidates,
    *,
    fall_back: bool = False,
    damage_of: Callable[[Path], str] | None = None,
    remedy: str = "set checkpoint.fall_back = true to go on from it",
    last_remedy: str = "use another run",
) -> tuple[Path | None, str]:
    """Return the newest checkpoint, and what is wrong with the one that should be the newest, or "".

    Args:
        fall_back: whether to return the newest whole checkpoint if there is damage, instead of an error.
        damage_of: function that returns what is wrong with a checkpoint, or "". The default is
            ``quick_damage``.
        remedy: what the error line advises to do with the newest whole checkpoint.
        last_remedy: what it advises if there is none.

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
            raise InputError(f"{damage}; the newest whole checkpoint is {candidate.name}: {point}{remedy}")
        else:
            return candidate, damage
    if damage:
        raise InputError(f"{damage}; no older checkpoint is whole: restore the file, or {last_remedy}")
    return None, ""


def check_whole(checkpoint: Path, remedy: str, last_remedy: str) -> None:
    """Compare the files of a training run's checkpoint with their checksums. Collective.

    Checkpoints of conversions and of Megatron-LM have no state.json, and are not checked.

    Raises:
        InputError: a file is damaged; see ``choose_whole``, also for the remedies. Raised on every rank.
    """
    if broadcast_object((checkpoint / "state.json").exists()):
        stored = stored_checkpoints(checkpoint.parent)  # without a checkpoint that the user has renamed
        older = stored[stored.index(checkpoint) + 1 :] if checkpoint in stored else []
        candidates = broadcast_object(Candidates("", [checkpoint, *older]))
        choose_whole(candidates, damage_of=full_damage, remedy=remedy, last_remedy=last_remedy)


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
        recorded = read_state(checkpoint).files
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
    recorded = {} if found else read_state(checkpoint).files
    by_size = sorted(recorded.items(), key=lambda item: -item[1][0])
    found = found or find_damage(checkpoint, dict(by_size[rank() :: world_size()]))
    if not found and not recorded and rank() == 0:
        try:
            TorchDistReader(checkpoint)
        except InputError as error:
            found = str(error).removeprefix(f"{checkpoint}/")
    return next(filter(None, all_gather_objects(found)), "")


def read_state(checkpoint: Path) -> RunState:
    """Return the state of a checkpoint.

    Raises:
        InputError: the file is missing or damaged, lacks a field, has a wrong value, or states another step
            than the name of its ``iter_*`` folder.
    """
    path, content = checkpoint / "state.json", _content(checkpoint)
    try:
        state = RunState.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        field = printable(".".join(map(str, first["loc"])))[:200]
        if first["type"] == "missing":
            raise InputError(f"{path} lacks {field}") from None
        reason = first["msg"].removeprefix("Value error, ")
        raise InputError(f"{path} has {field} = {short_repr(first['input'])} ({reason})") from None
    if _NAME.fullmatch(checkpoint.name) and state.step != step_of(checkpoint):
        raise InputError(f"{path} states step {state.step}")
    return state


def update_state(checkpoint: Path, changes: dict[str, Any]) -> None:
    """Replace fields of a checkpoint's state.

    Raises:
        InputError: the file is missing or damaged.
    """
    write_state(checkpoint, _content(checkpoint) | changes)


def write_state(checkpoint: Path, content: dict[str, Any]) -> None:
    """Write or replace the JSON state of a checkpoint, with the checksum of the state itself."""
    stored = json.loads(json.dumps(content))  # the checksum is one of the values as they are read
    stored["checksum"] = _state_checksum(stored)
    files.write(checkpoint / "state.json", json.dumps(stored, indent=1))


def stored_checkpoints(folder: Path) -> list[Path]:
    """Return the ``iter_*`` folders, newest first."""
    found = [path for path in folder.glob("iter_*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """Return the number in the name of an ``iter_*`` folder."""
    return int(checkpoint.name.removeprefix("iter_"))


def _content(checkpoint: Path) -> dict[str, Any]:
    """Return the JSON object in ``state.json``. Its checksum, if any, is compared and left out."""
    path = checkpoint / "state.json"
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read ({error})") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} is not a JSON object")
    written = content.pop("checksum", None)
    if written is None and "files" not in content:
        return _MISSING_EARLIER | content
    if written != _state_checksum(content):
        raise InputError(f"{path} has another content than was written")
    return content


def _state_checksum(state: dict[str, Any]) -> str:
    return checksum(json.dumps(state, sort_keys=True).encode())
