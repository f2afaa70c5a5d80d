"""The model and the problems of the demo, which examples/moe/tiny_cpu.toml reads."""

from __future__ import annotations

import json
from pathlib import Path

from .arithmetic import addition_problems, write_addition_problems
from .tiny_models import make_tiny_model
from .warm_up import warm_up

CONFIG = "examples/moe/tiny_cpu.toml"
TINY = Path("runs/tiny")
"""Folder in which ``CONFIG`` expects the model and the problems."""
DONE = TINY / "warm_up.json"
"""File with the loss of the warm-up, which is written last."""


def make_demo_model() -> None:
    """Write the addition problems, and a tiny Qwen3-MoE warmed up on them by supervised learning."""
    write_addition_problems(TINY)
    make_tiny_model(TINY / "model")
    train, _ = addition_problems()
    DONE.write_text(json.dumps({"loss": warm_up(TINY / "model", train)}))
