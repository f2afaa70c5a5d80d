"""Plan a layout: check it, dry-run every pipeline stage, and print memory, traffic and time."""

from __future__ import annotations

import math

import torch
from rich.console import Console

from ..config import Config
from ..losses.adaptive_clip import make_adaptive_clip
from ..losses.objective import make_objective
from ..models.description import ModelDescription, describe_model
from ..platform import prepare_megatron
from ..policy.fp8 import total_multiple
from .checks import check_trainer, plan_servers
from .dry_run import dry_run
from .hardware import HARDWARE
from .model_size import Model, model_of
from .rank_plan import RankPlan
from .report import headline, memory_table, print_step
from .step_estimate import Batch, StepEstimate, StepTraffic, draw_batch


def print_plan(
    cfg: Config,
    world_size: int,
    hardware: str | None,
    *,
    prompt_tokens: int,
    response_tokens: int,
    image_tokens: int = 0,
    console: Console,
) -> None:
    """Print the plan of a layout.

    Args:
        world_size: ranks of the trainer.
        hardware: a key of ``HARDWARE``; None means CPUs, for which nothing depends on a machine's figures.
        prompt_tokens: mean length of prompts.
        response_tokens: mean length of responses.
        image_tokens: mean tokens of the image of a prompt, which are among ``prompt_tokens``.

    Raises:
        InputError: training would refuse the config, or a rank or a server needs too much memory.
    """
    prepare_megatron(torch.device("cpu"))
    description = describe_model(cfg, world_size, torch.device("cpu"))
    objective = make_objective(
        cfg.algorithm, is_moe=description.is_moe, max_new_tokens=cfg.max_sequence_tokens
    )
    make_adaptive_clip(cfg.algorithm, objective)
    batch = draw_batch(cfg, world_size, prompt_tokens, response_tokens)
    lengths = full_microbatch(cfg, batch)
    plans = [
        dry_run(
            cfg,
            description,
            world_size=world_size,
            stage=stage,
            lengths=lengths,
            num_microbatches=max(batch.microbatches),
            image_tokens=image_tokens,
        )
        for stage in range(cfg.parallel.pipeline_model_parallel_size)
    ]
    model = _model(cfg, description, plans)
    console.print(headline(cfg, description, model, world_size, hardware or "CPUs"), soft_wrap=True)
    gpu = HARDWARE[hardware] if hardware else None
    console.print(memory_table(plans, gpu))
    step = StepTraffic(cfg, model, plans, batch, world_size, lengths)
    if gpu:
        check_trainer(plans, gpu)
        servers = plan_servers(cfg, world_size, model, plans, gpu)
        step = StepEstimate(cfg, model, plans, batch, world_size, lengths, servers, gpu)
    print_step(console, cfg, step)


def full_microbatch(cfg: Config, batch: Batch) -> list[int]:
    """Return the padded lengths of a full microbatch.

    It has ``train.max_tokens_per_microbatch`` slots, or the slots of one sequence of the largest length if
    that is longer.
    """
    multiple = math.lcm(cfg.parallel.sequence_multiple, total_multiple(cfg))
    longest = cfg.data.max_prompt_tokens + cfg.rollout.max_response_tokens
    slots = -(-max(cfg.train.max_tokens_per_microbatch, longest) // multiple) * multiple
    count = max(1, min(slots // multiple, slots // max(1, batch.tokens // len(batch.lengths))))
    length = slots // count // multiple * multiple or multiple
    return [length] * (count - 1) + [slots - length * (count - 1)]


def _model(cfg: Config, description: ModelDescription, plans: list[RankPlan]) -> Model:
    hf = description.hf
    tables = 1 if hf.tie_word_embeddings else 2
    padding = tables * (description.padded_vocab_size - hf.vocab_size) * hf.hidden_size
    quantized = cfg.rollout.quantization == "fp8"
    tower = description.vision.numel if description.vision else 0
    return model_of(plans, hf, description.transformer, padding, quantized=quantized, tower=tower)
