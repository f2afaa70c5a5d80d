"""Make Megatron's TransformerConfig from architecture, parallel layout, FP8 settings and [megatron] table."""

from __future__ import annotations

import dataclasses
import importlib.util
from enum import EnumType
from typing import Any, Literal, get_type_hints

import torch
from megatron.core.transformer import MLATransformerConfig, TransformerConfig
from pydantic import ConfigDict, TypeAdapter

from ..config import Config, Fp8Config, ParallelConfig
from ..config.values import parse_value
from ..errors import InputError, one_line
from ..losses.objective import needed_columns
from ..plugins import nearest
from .fusions import FUSIONS, fusions_off

_LAYOUT_FIELDS = set(ParallelConfig.model_fields)
_OUR_FIELDS = {
    "params_dtype": "model.dtype",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "pipeline_dtype": "model.dtype",
    "moe_enable_routing_replay": "algorithm.moe_routing_replay",
    "fp8": "fp8.recipe",
    "fp8_recipe": "fp8.recipe",
    "fp8_param": "fp8.param",
    "first_last_layers_bf16": "fp8.num_layers_at_start_in_bf16",
    "num_layers_at_start_in_bf16": "fp8.num_layers_at_start_in_bf16",
    "num_layers_at_end_in_bf16": "fp8.num_layers_at_end_in_bf16",
    "moe_router_padding_for_fp8": "fp8.moe_router_padding_for_quantization",
    "moe_router_padding_for_quantization": "fp8.moe_router_padding_for_quantization",
}
"""Fields that a setting outside the [megatron] table determines."""
_FIXED_FIELDS = {
    "calculate_per_token_loss": "the loss is already divided, and Megatron would sum gradients again",
    "variable_seq_lengths": "packed microbatches differ in length",
    "fp4": "packed microbatches are not padded to the multiple that FP4 kernels require",
    "fp8_dot_product_attention": "packed attention in FP8 is untested",
    "fp8_multi_head_attention": "packed attention in FP8 is untested",
    "mla_down_proj_fusion": "latent attention and its checkpoint keys need the unfused down projections",
    "tp_comm_overlap": "its buffers have a fixed length, and packed microbatches differ in length",
}
"""Field that cannot be set -> reason."""
_LIBRARIES = {
    ("moe_grouped_gemm", True): ("transformer_engine", "Transformer Engine"),
    ("moe_router_fusion", True): ("transformer_engine", "Transformer Engine"),
    # Transformer Engine's layers do not need apex, but Megatron's output layer does
    # (tensor_parallel/layers.py)
    ("gradient_accumulation_fusion", True): (
        "fused_weight_gradient_mlp_cuda",
        "Transformer Engine and NVIDIA apex built from source",
    ),
    ("moe_token_dispatcher_type", "flex"): ("deep_ep", "Transformer Engine and DeepEP"),
}
"""(field, value) -> required module, and the libraries that provide it. All of them need a GPU."""


def transformer_config(
    cfg: Config,
    architecture: dict[str, Any],
    dtype: torch.dtype,
    world_size: int,
    use_te: bool,
) -> TransformerConfig:
    """Check the settings and return Megatron's config.

    Args:
        architecture: fields of TransformerConfig, from ``Family.architecture``.
        dtype: dtype of weights and activations.
        use_te: whether Transformer Engine's layer spec is used.

    Raises:
        InputError: a field is unknown, has a value of another type, contradicts another setting or needs a
            missing library; a setting requires routed experts and the model has none.
    """
    table = _megatron_table(cfg.megatron, architecture, use_te)
    routing_field = _routing_field(cfg)
    if not architecture.get("num_moe_experts"):
        _refuse_expert_settings(cfg, routing_field)
    fields = {
        **architecture,
        **_parallel_fields(cfg.parallel),
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        "variable_seq_lengths": True,  # packed microbatches differ in length
        "use_cpu_initialization": not torch.cuda.is_available() or cfg.device == "cpu",
        "gradient_accumulation_fusion": False,
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": use_te,
        "moe_router_dtype": "fp32",
        "moe_router_bias_update_rate": 0.0,  # with Megatron's default, every step would change the bias
        "moe_enable_routing_replay": routing_field is not None,
    }
    fp8 = fp8_fields(cfg.fp8, architecture, cfg.parallel)
    if use_te:
        off = fusions_off(fields | table)
        fields |= fp8 | {name: name not in off for name in FUSIONS}
    else:  # their fused kernels need Transformer Engine or apex
        fields |= {
            "bias_dropout_fusion": False,
            "masked_softmax_fusion": False,
            "persist_layer_norm": False,
            "apply_rope_fusion": False,
        }
    try:
        transformer = _config_class(architecture)(**(fields | table))
    except (ValueError, AssertionError, TypeError, ImportError) as error:
        raise InputError(
            f"Megatron's TransformerConfig refuses this config: {one_line(error)}; "
            "change [megatron] or [parallel]"
        ) from None
    if routing_field:
        _check_routing_can_be_replayed(transformer, routing_field)
    _check_balancing(transformer, cfg.train.max_tokens_per_microbatch)
    _scale_global_aux_loss(transformer, world_size // cfg.parallel.model_parallel_size)
    return transformer


def _parallel_fields(parallel: ParallelConfig) -> dict[str, Any]:
    interleaved = parallel.virtual_pipeline_model_parallel_size is not None
    return {
        **{name: getattr(parallel, name) for name in _LAYOUT_FIELDS},
        "sequence_parallel": parallel.uses_sequence_parallel,
        # batched sends between two stages of an interleaved pipeline match the wrong receives
        "overlap_p2p_comm": interleaved,
        "batch_p2p_comm": not interleaved,
    }


def fp8_fields(fp8: Fp8Config, architecture: dict[str, Any], parallel: ParallelConfig) -> dict[str, Any]:
    if fp8.recipe is None:
        return {}
    layers = architecture["num_layers"] // parallel.pipeline_model_parallel_size
    for name in ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"):
        if (count := getattr(fp8, name)) > layers:
            raise InputError(
                f"fp8.{name} = {count} is more than the {layers} layers of a pipeline stage: "
                "choose a smaller one"
            )
    padded = bool(architecture.get("num_moe_experts")) and fp8.moe_router_padding_for_quantization
    return {
        "fp8": fp8.format or ("e4m3" if fp8.recipe in ("blockwise", "mxfp8") else "hybrid"),
        "fp8_recipe": fp8.recipe,
        "fp8_param": fp8.param,
        "first_last_layers_bf16": fp8.bf16_layers > 0,
        "num_layers_at_start_in_bf16": fp8.num_layers_at_start_in_bf16,
        "num_layers_at_end_in_bf16": fp8.num_layers_at_end_in_bf16,
        "moe_router_padding_for_quantization": padded,
    }


def _config_class(architecture: dict[str, Any]) -> type[TransformerConfig]:
    return MLATransformerConfig if architecture.get("multi_latent_attention") else TransformerConfig


def _megatron_table(table: dict[str, Any], architecture: dict[str, Any], use_te: bool) -> dict[str, Any]:
    """Check the [megatron] table, and return it with every value as the type of its field."""
    config_class = _config_class(architecture)
    known = {field.name for field in dataclasses.fields(config_class)}
    kinds = get_type_hints(config_class)
    values: dict[str, Any] = {}
    for name, value in table.items():
        if name not in known:
            raise InputError(
                f"unknown config key 'megatron.{name}': did you mean 'megatron.{nearest(name, known)}'?"
            )
        if name in _LAYOUT_FIELDS or name in _OUR_FIELDS:
            ours = _OUR_FIELDS.get(name, f"parallel.{name}")
            raise InputError(f"megatron.{name} = {value!r}: set {ours} instead")
        if name in _FIXED_FIELDS:
            raise InputError(f"megatron.{name} = {value!r}: {_FIXED_FIELDS[name]}; remove it")
        if name in architecture:
            raise InputError(
                f"megatron.{name} = {value!r}: the model's config.json already says {architecture[name]!r}; "
                "remove it"
            )
        values[name] = _field_value(f"megatron.{name}", kinds[name], value)
    for (name, value), (module, libraries) in _LIBRARIES.items():
        if values.get(name) == value and not (use_te and importlib.util.find_spec(module)):
            raise InputError(
                f"megatron.{name} = {value!r} needs {libraries}, and a GPU: "
                "install the missing libraries (docs/install_gpu.md), or remove it"
            )
    return values


def _field_value(field: str, kind: Any, value: Any) -> Any:
    """Return ``value`` as the type of a field; the members of an enum have their names, as in Megatron."""
    if isinstance(kind, EnumType):
        names: Any = Literal[*kind.__members__]
        return kind[parse_value(field, TypeAdapter(names), value)]
    finite = ConfigDict(arbitrary_types_allowed=True, allow_inf_nan=False)
    return parse_value(field, TypeAdapter(kind, config=finite), value)


def _routing_field(cfg: Config) -> str | None:
    """Return the setting that requires routing to be recorded or replayed, as the user wrote it, or None."""
    if "router_shift" in needed_columns(cfg.algorithm):
        return f"algorithm.loss = {cfg.algorithm.loss!r}"
    if cfg.algorithm.moe_routing_replay != "none":
        return f"algorithm.moe_routing_replay = {cfg.algorithm.moe_routing_replay!r}"
    return "rollout.routed_experts = true" if cfg.rollout.routed_experts else None


def _refuse_expert_settings(cfg: Config, routing_field: str | None) -> None:
    noise = f"rollout.router_noise = {cfg.rollout.router_noise:g}" if cfg.rollout.router_noise else None
    for field in (routing_field, noise, "train.freeze_router = true" if cfg.train.freeze_router else None):
        if field:
            raise InputError(f"{field} but this model has no experts: change it")


def _check_routing_can_be_replayed(transformer: TransformerConfig, routing_field: str) -> None:
    """Check that no field bypasses the replay hook in Megatron's router, or changes its result.

    Source: topk_routing_with_score_function in moe_utils.py.
    """
    for name, harmless, why in (
        ("moe_router_fusion", False, "the fused router neither records nor replays"),
        ("moe_expert_capacity_factor", None, "tokens would be dropped from their experts"),
        ("moe_expert_rank_capacity_factor", None, "tokens would be dropped from their experts"),
        ("cuda_graph_impl", "none", "a captured graph does not compute the routing again"),
    ):
        # Megatron-Core 0.16 has no moe_expert_rank_capacity_factor.
        if (value := getattr(transformer, name, harmless)) != harmless:
            raise InputError(f"megatron.{name} = {value!r} with {routing_field}: {why}; remove one of them")
    if transformer.moe_router_load_balancing_type == "sinkhorn":
        raise InputError(
            f"megatron.moe_router_load_balancing_type = 'sinkhorn' with {routing_field}: "
            "this router neither records nor replays; remove one of them"
        )


def _check_balancing(transformer: TransformerConfig, max_tokens_per_microbatch: int) -> None:
    """Check that Megatron computes the configured load balancing as its name says."""
    if "seq_aux_loss" in transformer.moe_router_load_balancing_type and max_tokens_per_microbatch > 1:
        raise InputError(
            "megatron.moe_router_load_balancing_type = 'seq_aux_loss': Megatron treats a packed microbatch "
            "as one sequence; set train.max_tokens_per_microbatch = 1, which packs one sequence each, "
            "or choose 'aux_loss'"
        )
    if (
        transformer.num_moe_experts
        and transformer.moe_router_bias_update_rate
        and not transformer.moe_router_enable_expert_bias
    ):
        raise InputError(
            f"megatron.moe_router_bias_update_rate = {transformer.moe_router_bias_update_rate:g} "
            "but this model's routers have no bias: remove it"
        )


def _scale_global_aux_loss(transformer: TransformerConfig, data_parallel_size: int) -> None:
    """Multiply the coefficient of the global auxiliary loss so that its effect is independent of the layout.

    Each data-parallel rank computes a summand of the global loss
    (moe_utils.py:switch_load_balancing_loss_func), and the gradient buffers average the gradients over these
    ranks.
    """
    kinds, coefficient = transformer.moe_router_load_balancing_type, transformer.moe_aux_loss_coeff
    if isinstance(coefficient, list):
        scales = [data_parallel_size if kind == "global_aux_loss" else 1 for kind in kinds]
        transformer.moe_aux_loss_coeff = [c * scale for c, scale in zip(coefficient, scales, strict=True)]
    elif kinds == "global_aux_loss":
        transformer.moe_aux_loss_coeff = coefficient * data_parallel_size
