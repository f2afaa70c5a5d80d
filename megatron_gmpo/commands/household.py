"""Write tasks of the household game and a tiny model that finishes some of them.

The model and the tasks are those of examples/agents/household_tiny_cpu.toml.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from ..command_line import Options, parse_options
from ..config import Positive

_Number = Annotated[int, Field(ge=1, le=100_000)]  # there are millions of tasks, all different


class HouseholdOptions(Options):
    """Write tasks of the household game and a model that is warmed up on expert episodes.

    The output is train.jsonl and unseen.jsonl with the columns problem and answer, experts.jsonl with the
    expert's episodes in the column messages, the folder model with the model, and warm_up.json with the loss
    of the warm-up.
    """

    out: Path = Path("runs/household")
    """Folder to write."""
    num_train: _Number = 2000
    """Number of tasks in train.jsonl."""
    num_unseen: _Number = 200
    """Number of tasks in unseen.jsonl. Their pairs of thing and place are in no other file."""
    num_experts: _Number = 1000
    """Number of expert episodes."""
    tasks_only: bool = False
    """Write the tasks and the expert episodes, and make no model."""
    warm_up_steps: Positive = 200
    """Number of batches of 32 expert episodes on which the model is trained."""
    seed: int = 0
    """Seed of tasks, weights and order."""


def main(argv: list[str]) -> None:
    options = parse_options(HouseholdOptions, argv, "megatron-gmpo household")

    from transformers.utils import logging

    from ..testing.household import make_household

    logging.disable_progress_bar()
    counts, loss = make_household(
        options.out,
        num_train=options.num_train,
        num_unseen=options.num_unseen,
        num_experts=options.num_experts,
        warm_up_steps=None if options.tasks_only else options.warm_up_steps,
        seed=options.seed,
    )
    for path, count in counts.items():
        print(f"{path}: {count:,} {'episodes' if path.stem == 'experts' else 'tasks'}")
    if loss is not None:
        model = options.out / "model"
        print(f"{model}: loss {loss:.3f} nats per token after {options.warm_up_steps} steps")
