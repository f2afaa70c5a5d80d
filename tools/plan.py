"""A dry run of a whole layout without GPUs: python -m tools.plan CONFIG.toml --world_size N [--hardware h100] [--section.key value ...]"""

from __future__ import annotations

import logging
import math
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table

from megatron_gmpo.config import Config, exit_with_one_line, load_config
from megatron_gmpo.errors import InputError
from megatron_gmpo.losses.adaptive_clip import make_adaptive_clip
from megatron_gmpo.losses.objective import make_objective
from megatron_gmpo.models.description import ModelDescription, describe_model
from megatron_gmpo.planning.dry_run import RankPlan, dry_run
from megatron_gmpo.platform import prepare_megatron
from megatron_gmpo.policy.fp8 import total_multiple
from tools.step_estimate import (
    GIB,
    GPUS_PER_NODE,
    HARDWARE,
    RESERVED,
    Batch,
    Hardware,
    Model,
    Servers,
    StepEstimate,
    draw_batch,
    model_of,
)

MODEL_CONFIGS = Path("examples/moe/model_configs")
SERVER_MEMORY = 0.85
"""Share of its memory that a server takes, unless ``sglang.args.mem_fraction_static`` says otherwise."""


@dataclass(frozen=True)
class Options:
    """Prints what every pipeline stage's ranks hold, what a step computes and sends, and about how long it takes.

    Everything else on the command line is a config file and its overrides, as for training. Exit code 2 and one line, if the config would
    be refused or does not fit.
    """

    world_size: int | None = None
    """Ranks of the trainer, one for each of its GPUs; must be given."""
    hardware: Literal["h100", "h200", "b200"] = "h100"
    model_config: Path | None = None
    """Folder with the model's config.json, while model.path is not there yet. By default a folder of that name in
    examples/moe/model_configs."""
    prompt_tokens: int | None = None
    """Mean length of prompts; a quarter of data.max_prompt_tokens by default."""
    response_tokens: int | None = None
    """Mean length of responses; half of rollout.max_new_tokens by default."""


def main(options: Options, argv: list[str], console: Console) -> None:
    """
    Raises:
        InputError: as training would, or a rank's or server's memory does not suffice.
    """
    cfg = _with_model_config(load_config(argv), options.model_config)
    world_size = options.world_size
    if not world_size or world_size < 1:
        raise InputError(
            f"world_size = {world_size}: give the number of the trainer's GPUs, e.g. --world_size 32"
        )
    if options.response_tokens and options.response_tokens > cfg.rollout.max_new_tokens:
        raise InputError(
            f"response_tokens = {options.response_tokens} is above rollout.max_new_tokens = {cfg.rollout.max_new_tokens}"
        )
    prepare_megatron(torch.device("cpu"))
    description = describe_model(cfg, world_size, torch.device("cpu"))
    objective = make_objective(
        cfg.algorithm, is_moe=description.is_moe, max_new_tokens=cfg.rollout.max_new_tokens
    )
    make_adaptive_clip(cfg.algorithm, objective)
    hardware = HARDWARE[options.hardware]
    batch = draw_batch(
        cfg,
        world_size,
        options.prompt_tokens or max(1, cfg.data.max_prompt_tokens // 4),
        options.response_tokens or max(1, cfg.rollout.max_new_tokens // 2),
    )
    lengths = full_microbatch(cfg, batch)
    plans = [
        dry_run(
            cfg,
            description,
            world_size=world_size,
            stage=stage,
            lengths=lengths,
            num_microbatches=max(batch.microbatches),
        )
        for stage in range(cfg.parallel.pipeline_model_parallel_size)
    ]
    tables = (2 if not description.hf.tie_word_embeddings else 1) * (
        description.padded_vocab_size - description.hf.vocab_size
    )
    model = model_of(
        plans,
        description.hf,
        description.transformer,
        tables * description.hf.hidden_size,
        quantized=cfg.rollout.quantization == "fp8",
    )
    console.print(_headline(cfg, description, model, world_size, options.hardware))
    console.print(memory_table(plans, hardware))
    check_trainer(plans, hardware)
    servers = plan_servers(cfg, world_size, model, plans, hardware)
    estimate = StepEstimate(cfg, model, plans, batch, servers, hardware, world_size, sum(lengths))
    for table in (batch_table(cfg, batch, servers), traffic_table(estimate), time_table(estimate)):
        console.print(table)


def full_microbatch(cfg: Config, batch: Batch) -> list[int]:
    """Padded lengths of a microbatch as full as any: train.max_tokens_per_microbatch, or one longest sequence if that is more."""
    multiple = math.lcm(2 * cfg.parallel.context_parallel_size, total_multiple(cfg))
    longest = cfg.data.max_prompt_tokens + cfg.rollout.max_new_tokens
    slots = -(-max(cfg.train.max_tokens_per_microbatch, longest) // multiple) * multiple
    count = max(1, min(slots // multiple, slots // max(1, batch.tokens // len(batch.lengths))))
    length = slots // count // multiple * multiple or multiple
    return [length] * (count - 1) + [slots - length * (count - 1)]


def check_trainer(plans: list[RankPlan], hardware: Hardware) -> None:
    """
    Raises:
        InputError: a stage's ranks need more memory than there is.
    """
    plan = max(plans, key=lambda plan: plan.total)
    over = plan.total + RESERVED - hardware.memory
    if over > 0:
        passing = plan.activations + plan.logits + plan.temporaries
        change = (
            "lower train.max_tokens_per_microbatch, or set megatron.recompute_granularity = 'full'"
            if passing > plan.resident
            else "raise parallel.expert_model_parallel_size, tensor_model_parallel_size or pipeline_model_parallel_size, or the world size"
        )
        raise InputError(
            f"rank {plan.rank} (pipeline stage {plan.stage}) needs {_gib(plan.total + RESERVED)} GiB of {_gib(hardware.memory)}: "
            f"{_gib(over)} too much; {change}"
        )


def plan_servers(
    cfg: Config, world_size: int, model: Model, plans: list[RankPlan], hardware: Hardware
) -> Servers:
    """The rollout servers and their caches.

    Raises:
        InputError: a cache does not hold one response of full length, or servers and the trainer, on the same GPUs, do not fit.
    """
    longest = cfg.data.max_prompt_tokens + cfg.rollout.max_new_tokens
    if cfg.rollout.engine == "embedded":  # a whole model on every rank
        return Servers(world_size, 1, cfg.rollout.batch_size * longest)
    count, gpus = len(cfg.rollout.server_urls) or cfg.rollout.num_servers, cfg.sglang.tensor_parallel_size
    taken = int(float(cfg.sglang.args.get("mem_fraction_static", SERVER_MEMORY)) * hardware.memory)
    if cfg.rollout.placement == "colocated":
        plan = max(plans, key=lambda plan: plan.resident)
        over = taken + plan.resident + RESERVED - hardware.memory
        if count * gpus > world_size:
            raise InputError(
                f"rollout.num_servers = {count} take {count * gpus} GPUs, the trainer has {world_size}: start fewer"
            )
        if over > 0:
            raise InputError(
                f"colocated servers take {_gib(taken)} GiB beside the {_gib(plan.resident)} GiB of rank {plan.rank}: {_gib(over)} too much "
                "for the GPU; lower sglang.args.mem_fraction_static"
            )
    cache_tokens = (taken * gpus - model.served_weights) // model.kv_bytes_on(gpus)
    if cache_tokens < longest:
        raise InputError(
            f"a server's {gpus} GPUs give it {_gib(taken * gpus)} GiB, too little for {_gib(model.served_weights)} GiB of weights and one "
            "response: raise sglang.tensor_parallel_size or sglang.args.mem_fraction_static"
        )
    return Servers(count, gpus, cache_tokens)


def _with_model_config(cfg: Config, folder: Path | None) -> Config:
    """The config with ``model.path`` where its config.json is."""
    if folder is None:
        known = MODEL_CONFIGS / Path(cfg.model.path).name
        if (
            not cfg.model.path
            or (Path(cfg.model.path) / "config.json").is_file()
            or not (known / "config.json").is_file()
        ):
            return cfg
        folder = known
    return cfg.model_copy(update={"model": cfg.model.model_copy(update={"path": str(folder)})})


def _headline(
    cfg: Config, description: ModelDescription, model: Model, world_size: int, hardware: str
) -> str:
    parallel = cfg.parallel
    sizes = {
        "TP": parallel.tensor_model_parallel_size,
        "PP": parallel.pipeline_model_parallel_size,
        "VPP": parallel.virtual_pipeline_model_parallel_size or 1,
        "CP": parallel.context_parallel_size,
        "EP": parallel.expert_model_parallel_size,
        "ETP": parallel.expert_tensor_parallel_size,
        "DP": world_size // parallel.model_parallel_size,
    }
    layout = " ".join(f"{name} {size}" for name, size in sizes.items() if size > 1) or "one rank"
    active = f", {model.active_parameters / 1e9:.2f} B of them active" if description.is_moe else ""
    return (
        f"[bold]{Path(cfg.model.path).name}[/bold] ({description.hf.model_type}): {model.parameters / 1e9:.2f} B parameters{active}; "
        f"{world_size} ranks on {hardware}: {layout}"
    )


def memory_table(plans: list[RankPlan], hardware: Hardware) -> Table:
    """One row a pipeline stage, whose ranks are alike."""
    table = Table("stage", "rank", title="Memory of a rank, GiB", title_justify="left")
    columns = (
        "weights",
        "gradients",
        "optimizer",
        "reference",
        "activations",
        "logits",
        "temporaries",
        "total",
    )
    for name in ("parameters", *columns, "of memory", "in flight"):
        table.add_column(name, justify="right")
    for plan in plans:
        figures = [_gib(getattr(plan, name)) for name in columns]
        share = f"{(plan.total + RESERVED) / hardware.memory:.0%}"
        table.add_row(
            str(plan.stage),
            str(plan.rank),
            f"{plan.parameters / 1e9:.3f} B",
            *figures,
            share,
            str(plan.in_flight),
        )
    table.caption = f"of memory: with {_gib(RESERVED)} GiB reserved, of {_gib(hardware.memory)} GiB"
    return table


def batch_table(cfg: Config, batch: Batch, servers: Servers) -> Table:
    table = Table(title="A step", title_justify="left", show_header=False)
    table.add_row(
        "sequences",
        f"{len(batch.lengths):,}",
        f"{cfg.rollout.prompts_per_step} prompts x {cfg.rollout.samples_per_prompt}",
    )
    table.add_row(
        "tokens", f"{batch.tokens:,}", f"{batch.tokens / len(batch.lengths):,.0f} a sequence (assumed)"
    )
    table.add_row(
        "optimizer steps",
        str(len(batch.microbatches)),
        f"{max(batch.microbatches)} microbatches a rank in each",
    )
    table.add_row(
        "rollout servers",
        str(servers.count),
        f"{servers.gpus} GPUs each, {servers.cache_tokens:,} tokens in the cache",
    )
    return table


def traffic_table(estimate: StepEstimate) -> Table:
    """What the busiest rank sends in a step."""
    table = Table(
        "collective", "group", "ranks", "nodes", title="Sent by a rank in a step", title_justify="left"
    )
    table.add_column("GB", justify="right")
    for traffic in sorted(estimate.traffic(), key=lambda traffic: -traffic.sent):
        nodes = len({rank // GPUS_PER_NODE for rank in traffic.ranks})
        table.add_row(
            traffic.operation, traffic.group, str(len(traffic.ranks)), str(nodes), f"{traffic.sent / 1e9:.2f}"
        )
    if boundary := estimate.boundary():
        table.add_row("send and receive", "pp", str(len(estimate.plans)), "", f"{boundary / 1e9:.2f}")
    table.add_row(
        "weight sync", "world", str(estimate.world_size), "", f"{estimate.model.served_weights / 1e9:.2f}"
    )
    return table


def time_table(estimate: StepEstimate) -> Table:
    table = Table(title="Estimated time", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, seconds in estimate.seconds.items():
        table.add_row(name, f"{seconds:.1f} s")
    table.add_row("step", f"{estimate.step:.1f} s")
    table.add_row("tokens a second and GPU", f"{estimate.batch.tokens / estimate.step / estimate.gpus:,.0f}")
    table.add_row("GPUs", str(estimate.gpus))
    table.add_row("MFU of training", f"{estimate.mfu:.2f}")
    return table


def _gib(nbytes: float) -> str:
    return f"{nbytes / GIB:.1f}"


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    try:
        options, rest = tyro.cli(Options, return_unknown_args=True, use_underscores=True)
        main(options, rest, Console(width=None if sys.stdout.isatty() else 150))
    except InputError as error:
        exit_with_one_line(error)
