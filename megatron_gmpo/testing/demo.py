"""The demos: a config, and the model and the data that it reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .arithmetic import addition_problems, write_addition_problems
from .household import make_household
from .tiny_models import make_tiny_model
from .warm_up import warm_up

TINY = Path("runs/tiny")
"""Folder in which the config of ``addition`` expects the model and the problems."""
HOUSEHOLD = Path("runs/household")
"""Folder in which the config of ``household`` expects the model and the tasks."""


@dataclass(frozen=True)
class Task:
    """What a demo trains.

    Attributes:
        config: config file, from the root of the repository.
        make: writes the model and the data.
        done: file that ``make`` writes last.
        metric: evaluation metric that shows the progress.
        options: further options of the training command.
    """

    config: str
    make: Callable[[], object]
    done: Path
    metric: str
    options: tuple[str, ...] = ()


def make_addition() -> None:
    """Write the addition problems, and a tiny Qwen3-MoE warmed up on them by supervised learning."""
    write_addition_problems(TINY)
    make_tiny_model(TINY / "model")
    train, _ = addition_problems()
    loss = warm_up(TINY / "model", train)
    (TINY / "warm_up.json").write_text(json.dumps({"loss": loss}))


TASKS = {
    "addition": Task(
        "examples/moe/tiny_cpu.toml",
        make_addition,
        TINY / "warm_up.json",
        "eval/heldout/pass@1",
        ("--parallel.expert_model_parallel_size", "2"),
    ),
    "household": Task(
        "examples/agents/household_tiny_cpu.toml",
        lambda: make_household(HOUSEHOLD),
        HOUSEHOLD / "warm_up.json",
        "eval/unseen/success",
    ),
}
