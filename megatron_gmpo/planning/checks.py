"""Check that a layout fits into the memory of its GPUs."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, TypeAdapter

from ..config import Config
from ..config.values import parse_value
from ..errors import InputError
from ..models.description import DTYPES
from ..rollout.sglang.start import check_colocated_gpus
from .hardware import GIB, RESERVED, SERVER_MEMORY, Hardware
from .model_size import Model
from .rank_plan import RankPlan
from .step_estimate import Servers


def check_trainer(plans: list[RankPlan], hardware: Hardware) -> None:
    """Check that the ranks of every pipeline stage fit.

    Raises:
        InputError: a rank needs more memory than the GPU has.
    """
    plan = max(plans, key=lambda plan: plan.total)
    over = plan.total + RESERVED - hardware.memory
    if over > 0:
        passing = plan.activations + plan.temporaries
        remedy = (
            "lower train.max_tokens_per_microbatch, or set megatron.recompute_granularity = 'full'"
            if passing > plan.resident
            else "raise parallel.expert_model_parallel_size, tensor_model_parallel_size or "
            "pipeline_model_parallel_size, or the world size"
        )
        raise InputError(
            f"rank {plan.rank} (pipeline stage {plan.stage}) needs {gib(plan.total + RESERVED)} GiB of "
            f"{gib(hardware.memory)}: {gib(over)} too much; {remedy}"
        )


def plan_servers(
    cfg: Config, world_size: int, model: Model, plans: list[RankPlan], hardware: Hardware
) -> Servers:
    """Return the rollout servers and the size of their caches.

    Raises:
        InputError: a cache cannot hold one response of full length, or servers and trainer do not fit on the
            same GPUs.
    """
    longest = cfg.data.max_prompt_tokens + cfg.rollout.max_response_tokens
    if cfg.rollout.engine == "embedded":  # each rank holds the whole model, and so serves by itself
        return _embedded_engines(cfg, world_size, model, plans, hardware)
    count, gpus = number_of_servers(cfg), cfg.sglang.tensor_parallel_size
    taken = int(_memory_share(cfg) * hardware.memory)
    if cfg.rollout.placement == "colocated":
        check_colocated_gpus(count, count * gpus, world_size)
        plan = max(plans, key=lambda plan: plan.while_sampling)
        over = taken + plan.while_sampling + RESERVED - hardware.memory
        if over > 0:
            raise InputError(
                f"colocated servers take {gib(taken)} GiB beside the {gib(plan.while_sampling)} GiB of rank "
                f"{plan.rank}: {gib(over)} too much for the GPU; lower sglang.args.mem_fraction_static"
            )
    cache_tokens = (taken * gpus - model.served_weights) // model.kv_bytes_on(gpus)
    if cache_tokens < longest:
        raise InputError(
            f"a server's {gpus} GPUs give it {gib(taken * gpus)} GiB, too little for "
            f"{gib(model.served_weights)} GiB of weights and one response: "
            "raise sglang.tensor_parallel_size or sglang.args.mem_fraction_static"
        )
    return Servers(count, gpus, cache_tokens)


def _embedded_engines(
    cfg: Config, world_size: int, model: Model, plans: list[RankPlan], hardware: Hardware
) -> Servers:
    cache_tokens = cfg.rollout.batch_size * (cfg.data.max_prompt_tokens + cfg.rollout.max_response_tokens)
    weights = model.parameters * DTYPES[cfg.rollout.dtype or cfg.model.dtype].itemsize
    engine = weights + cache_tokens * model.kv_bytes_on(1)
    plan = max(plans, key=lambda plan: plan.resident)
    over = engine + plan.resident + RESERVED - hardware.memory
    if over > 0:
        raise InputError(
            f"rollout.engine = 'embedded' needs {gib(engine)} GiB beside the {gib(plan.resident)} GiB of "
            f"rank {plan.rank}: {gib(over)} too much for the GPU; lower rollout.batch_size, or use 'sglang'"
        )
    return Servers(world_size, 1, cache_tokens)


def number_of_servers(cfg: Config) -> int:
    """Return the number of rollout servers that the run starts or uses."""
    return len(cfg.rollout.server_urls) or cfg.rollout.num_servers


def _memory_share(cfg: Config) -> float:
    name = "mem_fraction_static"
    share = Annotated[float, Field(gt=0, lt=1)]
    return parse_value(f"sglang.args.{name}", TypeAdapter(share), cfg.sglang.args.get(name, SERVER_MEMORY))


def gib(nbytes: float) -> str:
    """Return bytes as GiB with one decimal."""
    return f"{nbytes / GIB:.1f}"
