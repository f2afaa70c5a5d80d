"""The demos: a config, and the model and the data that it reads."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from .arithmetic import addition_problems, write_addition_problems
from .geometry import make_geometry
from .household import make_household
from .smollm2 import make_smollm2
from .tiny_models import make_tiny_model
from .warm_up import warm_up
from .word_problems import write_word_problems

TINY = Path("runs/tiny")
"""Folder in which the config of ``addition`` expects the model and the problems."""
HOUSEHOLD = Path("runs/household")
"""Folder in which the config of ``household`` expects the model and the tasks."""
SMOLLM2 = Path("runs/smollm2")
"""Folder in which the config of ``word_problems`` expects the model and the problems."""
GEOMETRY = Path("runs/geometry")
"""Folder in which the config of ``geometry`` expects the model and the problems."""


@dataclass(frozen=True)
class Task:
    """What a demo trains.

    Attributes:
        config: config file, from the root of the repository.
        make: writes the model and the data.
        done: file that ``make`` writes last.
        metric: evaluation metric that shows the progress.
        name: name of this metric in the result.
        options: further options of the training command.
        at_end: name in the result -> further metric of the last evaluation.
    """

    config: str
    make: Callable[[], object]
    done: Path
    metric: str
    name: str
    options: tuple[str, ...] = ()
    at_end: Mapping[str, str] = field(default_factory=dict)


def make_addition() -> None:
    """Write the addition problems, and a tiny Qwen3-MoE warmed up on them by supervised learning."""
    write_addition_problems(TINY)
    make_tiny_model(TINY / "model")
    train, _ = addition_problems()
    loss = warm_up(TINY / "model", train)
    (TINY / "warm_up.json").write_text(json.dumps({"loss": loss}))


def make_word_problems() -> None:
    """Write the word problems, and SmolLM2-135M-Instruct."""
    write_word_problems(SMOLLM2)
    make_smollm2(SMOLLM2 / "SmolLM2-135M-Instruct")


TASKS = {
    "addition": Task(
        "examples/moe/tiny_cpu.toml",
        make_addition,
        TINY / "warm_up.json",
        "eval/heldout/pass@1",
        "pass@1",
        ("--parallel.expert_model_parallel_size", "2"),
    ),
    "household": Task(
        "examples/agents/household_tiny_cpu.toml",
        lambda: make_household(HOUSEHOLD),
        HOUSEHOLD / "warm_up.json",
        "eval/unseen/success",
        "success",
    ),
    "geometry": Task(
        "examples/vision/geometry_tiny_cpu.toml",
        lambda: make_geometry(GEOMETRY),
        GEOMETRY / "warm_up.json",
        "eval/heldout/pass@1",
        "accuracy",
        at_end={"accuracy_blank": "eval/blank/pass@1"},
    ),
    "word_problems": Task(
        "examples/moe/smollm2_135m_cpu.toml",
        make_word_problems,
        SMOLLM2 / "SmolLM2-135M-Instruct" / "README.md",
        "eval/heldout/pass@1",
        "pass@1",
    ),
}
