"""Check that a parallel layout divides the world size and the model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..config import Config, ParallelConfig
from ..errors import InputError

_UNEVEN_STAGES = {"num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"}


def check_layout(cfg: Config, architecture: dict[str, Any], world_size: int) -> None:
    """Check that ``cfg.parallel`` divides the world size, the heads, the layers and the experts.

    If the [megatron] table sets the number of layers in the first or last stage, Megatron checks the layers.

    Args:
        architecture: fields of TransformerConfig, from ``Family.architecture``.

    Raises:
        InputError: a size does not divide; the message names the field and both numbers.
    """
    parallel = cfg.parallel
    tp, pp, cp = (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.context_parallel_size,
    )
    size = parallel.model_parallel_size
    if world_size % size:
        raise InputError(
            f"parallel: tensor {tp} x pipeline {pp} x context {cp} = {size} does not divide the world size "
            f"{world_size}: start a multiple of {size} processes or choose smaller sizes"
        )
    split = {
        "num_attention_heads": architecture["num_attention_heads"],
        "num_key_value_heads": architecture["num_query_groups"],
        "intermediate_size": architecture["ffn_hidden_size"],
    }
    if shared := architecture.get("moe_shared_expert_intermediate_size"):
        split["shared_expert_intermediate_size"] = shared
    _divides("tensor_model_parallel_size", tp, split)
    if _UNEVEN_STAGES.isdisjoint(cfg.megatron):
        chunks = pp * (parallel.virtual_pipeline_model_parallel_size or 1)
        field = "pipeline_model_parallel_size x virtual_pipeline_model_parallel_size"
        _divides(field, chunks, {"num_layers": architecture["num_layers"]})
    _check_experts(parallel, architecture, world_size)


def _check_experts(parallel: ParallelConfig, architecture: dict[str, Any], world_size: int) -> None:
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    ep, etp = parallel.expert_model_parallel_size, parallel.expert_tensor_parallel_size
    if not architecture.get("num_moe_experts"):
        for field, value in (("expert_model_parallel_size", ep), ("expert_tensor_parallel_size", etp)):
            if value > 1:
                raise InputError(f"parallel.{field} = {value} but this model has no experts: set it to 1")
        return
    experts = architecture["num_moe_experts"]
    _divides("expert_model_parallel_size", ep, {"num_experts": experts})
    _divides(
        "expert_tensor_parallel_size", etp, {"moe_intermediate_size": architecture["moe_ffn_hidden_size"]}
    )
    if world_size % (ep * etp * pp):
        per_stage = world_size // pp
        remedy = (
            f"expert_tensor_parallel_size to a divisor of {per_stage}"
            if per_stage % etp
            else f"expert_model_parallel_size to a divisor of {math.gcd(experts, per_stage // etp)}"
        )
        raise InputError(
            f"parallel: expert {ep} x expert tensor {etp} x pipeline {pp} = {ep * etp * pp} "
            f"does not divide the world size {world_size}: set {remedy}"
        )
    if tp > 1 and not parallel.uses_sequence_parallel:
        raise InputError(
            f"parallel.sequence_parallel = false with tensor_model_parallel_size = {tp} on a MoE model: "
            "Megatron requires sequence parallelism; set it to true"
        )
    if ep == 1 and etp != tp:  # Megatron-Core reduces the expert gradients over the ranks of the dense part
        raise InputError(
            f"parallel.expert_tensor_parallel_size = {etp} with tensor_model_parallel_size = {tp} and "
            "expert_model_parallel_size = 1 gives wrong expert gradients in Megatron-Core: "
            f"set expert_tensor_parallel_size = {tp} or expert_model_parallel_size > 1"
        )


def _divides(field: str, value: int, dimensions: Mapping[str, int]) -> None:
    """Check that ``value`` divides the dimensions that it splits. The remedy holds for all of them."""
    common = math.gcd(*dimensions.values())
    remedy = f"choose a divisor of {common}" if common > 1 else "set it to 1"
    for dimension, number in dimensions.items():
        if number % value:
            raise InputError(f"parallel.{field} = {value} does not divide {dimension} = {number}: {remedy}")
