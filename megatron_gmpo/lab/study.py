"""Read a study's TOML file and make its trials, one training run per arm and seed.

All trials are checked before the first trial starts.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, ValidationError, model_validator

from ..command_line import explain, load_config, read_toml
from ..config import Config
from ..config.section import PathText, RequiredPath, Section, Text
from ..config.values import as_argument
from ..errors import InputError
from ..losses.objective import make_objective
from ..plugins import nearest

RUNS = Path("runs/studies")

EQUAL = (
    "data",
    "reward",
    "eval",
    "train.num_steps",
    "rollout.prompts_per_step",
    "rollout.samples_per_prompt",
    "rollout.max_new_tokens",
)
"""Config keys and sections that must be equal in all arms.

They determine the prompts that ``PromptStream`` draws, so arms with equal seeds get equal prompts."""

_FROM_LAB = ("seed", "run_dir")
_NAME = re.compile(r"[\w+=][\w.+=]*")


class Variant(Section):
    """A label and keys of the training config, such as ``algorithm.loss = "gmpo"``."""

    model_config = ConfigDict(extra="allow")

    label: str = ""
    """Name in the report; empty means the variant's key in the study's file."""

    @property
    def overrides(self) -> dict[str, Any]:
        """Return the keys of the training config."""
        return self.model_extra or {}


class Prepare(Section):
    command: tuple[str, ...] = ()
    """Module and arguments that run once as ``python -m`` before the first trial, e.g. ["megatron_gmpo",
    "demo", "--prepare_only"]."""
    output: PathText = ""
    """File that the command writes. If it exists, the command does not run."""


class StudyFile(Section):
    """The keys of a study's TOML file. The study's name is the name of the file."""

    title: Text
    question: str = ""
    """Question that the study answers, shown in the report; empty lines separate paragraphs."""
    base: RequiredPath
    """Training config that every arm changes; the path is relative to the study's file."""
    prepare: Prepare = Prepare()
    seeds: Annotated[tuple[int, ...], Field(min_length=1)]
    """Seeds; every arm runs once per seed."""
    processes: Annotated[int, Field(ge=1)] = 1
    """Number of ranks per trial."""
    timeout_s: Annotated[float, Field(gt=0)] = 3600.0
    """Time limit of a trial; a trial that exceeds it is killed and counts as failed."""
    baseline: str
    """Arm with which the other arms are compared. In a grid, an arm is compared with the baseline at the same
    values of the other axes."""
    overrides: dict[str, Any] = {}
    """Keys of the training config that hold for all arms."""
    arms: Annotated[dict[str, Variant], Field(min_length=1)]
    """Arms by name."""
    grid: dict[str, dict[str, Variant]] = {}
    """Additional axes, [grid.AXIS.VALUE] with keys of the training config. Every arm runs with every
    combination of their values."""

    @model_validator(mode="after")
    def _names(self) -> StudyFile:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds = {list(self.seeds)} names a seed twice")
        for name in (name for axis in (self.arms, *self.grid.values()) for name in axis):
            if not _NAME.fullmatch(name):
                raise ValueError(
                    f"{name!r} becomes part of a folder's name: use only letters, digits and _ . + =, "
                    "and no dot at its beginning"
                )
        if self.baseline not in self.arms:
            raise ValueError(f"baseline = {self.baseline!r} is not an arm: choose one of {list(self.arms)}")
        return self


@dataclass(frozen=True)
class Arm:
    """A cell of the grid.

    Attributes:
        name: name of the arm and of its values on the other axes, joined by ``-``.
        overrides: dotted key of the training config -> value, without the keys that hold for all arms.
        baseline: name of the arm with which it is compared; for a baseline, its own name.
    """

    name: str
    label: str
    overrides: dict[str, Any]
    baseline: str


@dataclass(frozen=True)
class Trial:
    """A training run.

    Attributes:
        argv: arguments of ``python -m megatron_gmpo.train``.
        cfg: the config that ``argv`` resolves to.
    """

    arm: Arm
    seed: int
    argv: tuple[str, ...]
    cfg: Config

    @property
    def folder(self) -> Path:
        """Return the run folder."""
        return Path(self.cfg.run_dir)


@dataclass(frozen=True)
class Study:
    """A checked study.

    Attributes:
        trials: every arm with the first seed, then every arm with the second seed, and so on, so that an
            interrupted study compares all arms.
    """

    name: str
    file: StudyFile
    base: Path
    arms: tuple[Arm, ...]
    trials: tuple[Trial, ...]

    def choose(self, arms: Collection[str], seeds: Collection[int]) -> list[Trial]:
        """Return the trials of these arms and seeds; empty means all.

        Raises:
            InputError: the study has no such arm or seed.
        """
        for name in arms:
            if name not in (known := [arm.name for arm in self.arms]):
                raise InputError(
                    f"--only {name}: the study has no such arm, did you mean {nearest(name, known)!r}?"
                )
        if unknown := set(seeds) - set(self.file.seeds):
            raise InputError(
                f"--seeds {min(unknown)}: the study's seeds are {list(self.file.seeds)}, add it to the study"
            )
        return [
            t for t in self.trials if t.arm.name in (arms or (t.arm.name,)) and t.seed in (seeds or (t.seed,))
        ]


def load_study(path: Path) -> Study:
    """Read a study and resolve the config of every trial.

    Raises:
        InputError: the file does not exist, or its name cannot be a folder's; a key is unknown (the message
            names the nearest key) or a value is bad; training would refuse the config of an arm, or its
            prompts or budget differ from the first arm's.
    """
    try:
        file = StudyFile.model_validate(read_toml(path))
    except ValidationError as error:
        raise InputError(f"{path}: {explain(error, StudyFile)}") from None
    if not _NAME.fullmatch(path.stem.replace("-", "_")):
        raise InputError(
            f"{path}: the name {path.stem!r} becomes a folder's name: use only letters, digits and "
            "_ . + = -, and no dot at its beginning"
        )
    base = Path(os.path.relpath(path.parent / file.base))
    arms = tuple(_expand(file))
    folder = RUNS / path.stem
    trials = tuple(_trial(path, base, file, arm, seed, folder) for seed in file.seeds for arm in arms)
    _check_equal(path, trials[: len(arms)])
    return Study(path.stem, file, base, arms, trials)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return ``{"a.b": 1}`` for ``{"a": {"b": 1}}``."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= (
            flatten(value, f"{prefix}{key}.")
            if isinstance(value, Mapping) and value
            else {prefix + key: value}
        )
    return flat


def _expand(file: StudyFile) -> Iterable[Arm]:
    for cell in product(file.arms.items(), *(axis.items() for axis in file.grid.values())):
        names, variants = [name for name, _ in cell], [variant for _, variant in cell]
        overrides: dict[str, Any] = {}
        for variant in variants:
            overrides |= flatten(variant.overrides)
        label = ", ".join(variant.label or name for name, variant in cell)
        yield Arm("-".join(names), label, overrides, "-".join([file.baseline, *names[1:]]))


def _trial(path: Path, base: Path, file: StudyFile, arm: Arm, seed: int, folder: Path) -> Trial:
    overrides = flatten(file.overrides) | arm.overrides
    where = f"{path}, arm {arm.name!r}"
    if taken := [key for key in _FROM_LAB if key in overrides]:
        raise InputError(f"{where}: {taken[0]} is set by the lab: leave it out")
    overrides |= {"seed": seed, "run_dir": (folder / arm.name / f"seed_{seed}").as_posix()}
    argv = (
        str(base),
        *(part for key, value in overrides.items() for part in (f"--{key}", as_argument(value))),
    )
    try:
        cfg = load_config(list(argv))
        make_objective(cfg.algorithm, is_moe=True, max_new_tokens=cfg.max_sequence_tokens)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    return Trial(arm, seed, argv, cfg)


def _check_equal(path: Path, trials: Iterable[Trial]) -> None:
    """Check that ``trials``, one per arm, have equal values of the keys ``EQUAL``."""
    first, *others = trials
    expected = _equal_part(first.cfg)
    for trial in others:
        found = _equal_part(trial.cfg)
        for key in sorted(expected.keys() | found.keys()):
            if found.get(key) != expected.get(key):
                raise InputError(
                    f"{path}, arm {trial.arm.name!r}: {key} = {found.get(key)!r}, but {first.arm.name!r} has "
                    f"{expected.get(key)!r}: arms are compared on equal prompts and budgets, set it under "
                    f"[overrides]"
                )


def _equal_part(cfg: Config) -> dict[str, Any]:
    return {
        key: value
        for key, value in flatten(cfg.model_dump()).items()
        if f"{key}.".startswith(tuple(f"{part}." for part in EQUAL))
    }
