"""Train a Hugging Face model on the answers or dialogues of a .jsonl file, in place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from pydantic import Field

from ..command_line import Options, parse_options
from ..config import Positive


class WarmUp(Options):
    """Train the model of a Hugging Face folder on the answers or dialogues of a .jsonl file.

    The training uses plain transformers. It overwrites the folder.
    """

    model: Path
    """Folder of the model."""
    data: Path
    """File with one JSON object per line: the keys problem and answer, or the key messages with a dialogue.
    The messages of its assistant are trained; the chat template must mark them by {% generation %}."""
    steps: Positive = 200
    """Number of optimizer steps."""
    batch_size: Positive = 64
    """Number of rows per step."""
    lr: Annotated[float, Field(gt=0)] = 2e-3
    """Learning rate of AdamW."""
    seed: int = 0
    """Seed of the order of the rows."""


def main(argv: list[str]) -> None:
    options = parse_options(WarmUp, argv, "megatron-gmpo warm_up")

    from transformers.utils import logging

    from ..testing.warm_up import warm_up

    logging.disable_progress_bar()
    rows = [json.loads(line) for line in options.data.read_text().splitlines()]
    loss = warm_up(
        options.model,
        rows,
        steps=options.steps,
        batch_size=options.batch_size,
        lr=options.lr,
        seed=options.seed,
    )
    print(f"{options.model}: loss {loss:.3f} nats per token after {options.steps} steps")
