"""Predict memory, traffic and step time of a layout, without GPUs.

Usage::

    megatron-gmpo plan CONFIG.toml --world_size N [--hardware h100] [--section.key value ...]
"""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from ..command_line import Options, parse_options_and_config
from ..config import Config, Positive
from ..errors import InputError

MODEL_CONFIGS = Path("examples/moe/model_configs")


class Plan(Options):
    """Print the memory of every pipeline stage, and the work, traffic and estimated time of a step.

    The command refuses a config that training would refuse, or that needs too much memory, with exit code 2.
    """

    world_size: Positive
    """Number of ranks of the trainer, one per GPU."""
    hardware: Literal["h100", "h200", "b200"] | None = None
    """Kind of GPU. None means ``h100``, or no GPU if the config has device = "cpu": the plan then has no
    limits of memory and no times."""
    config_folder: Annotated[Path | None, Field(alias="model_config")] = None
    """Folder with the model's config.json, needed only if model.path does not exist yet. The default is the
    folder with the same name in examples/moe/model_configs; a name on the hub that is not there is looked up
    on the hub."""
    prompt_tokens: Positive | None = None
    """Mean length of prompts in tokens; by default a quarter of data.max_prompt_tokens."""
    response_tokens: Positive | None = None
    """Mean length of responses in tokens; by default half of rollout.max_new_tokens. The length of an episode
    includes its observations, and its limit is rollout.max_episode_tokens."""
    image_tokens: Annotated[int | None, Field(ge=0)] = None
    """Mean tokens of a prompt's image, which are among prompt_tokens; by default half of them if
    data.image_column is set, else 0."""


def main(argv: list[str]) -> None:
    options, cfg = parse_options_and_config(Plan, argv, "megatron-gmpo plan")
    longest = cfg.rollout.max_response_tokens
    if options.response_tokens and options.response_tokens > longest:
        raise InputError(
            f"response_tokens = {options.response_tokens} is above {cfg.rollout.response_limit} = {longest}: "
            f"choose a smaller one"
        )
    prompt_tokens = options.prompt_tokens or max(1, cfg.data.max_prompt_tokens // 4)
    image_tokens = options.image_tokens
    if image_tokens is None:
        image_tokens = prompt_tokens // 2 if cfg.data.image_column else 0
    if image_tokens > prompt_tokens:
        raise InputError(
            f"image_tokens = {image_tokens} is above prompt_tokens = {prompt_tokens}: choose a smaller one"
        )
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)

    from rich.console import Console

    from ..planning.layout import print_plan

    print_plan(
        with_model_config(cfg, options.config_folder),
        options.world_size,
        options.hardware or (None if cfg.device == "cpu" else "h100"),
        prompt_tokens=prompt_tokens,
        image_tokens=image_tokens,
        response_tokens=options.response_tokens or max(1, longest // 2),
        console=Console(width=None if sys.stdout.isatty() else 150),
    )


def with_model_config(cfg: Config, folder: Path | None) -> Config:
    """Return the config with ``model.path`` set to a folder that has the model's config.json."""
    if folder is None:
        known = MODEL_CONFIGS / Path(cfg.model.path).name
        is_there = (Path(cfg.model.path) / "config.json").is_file()
        if not cfg.model.path or is_there:
            return cfg
        if (known / "config.json").is_file():
            folder = known
        else:
            from ..models.snapshot import local_folders

            folder = Path(local_folders({"model.path": cfg.model.path}, ["config.json"])["model.path"])
    return cfg.model_copy(update={"model": cfg.model.model_copy(update={"path": str(folder)})})
