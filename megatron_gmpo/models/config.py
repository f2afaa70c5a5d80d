"""Hugging Face config.json + our config -> Megatron's TransformerConfig, checked before any process group starts."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from megatron.core.transformer import MLATransformerConfig, TransformerConfig
from transformers import AutoConfig

from ..batch.columns import RoutingShape
from ..config import Config, Fp8Config, ParallelConfig
from ..errors import InputError
from ..losses.objective import needed_columns
from . import FAMILIES
from .blocks import HFConfig, prediction_layers
from .mapping import Mapping

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class ModelDescription:
    """Everything that says which model to build; no tensor in it.

    Attributes:
        hf: the Hugging Face config.
        transformer: Megatron's config, with the parallel layout.
        mapping: the name table.
        padded_vocab_size: rows of the embedding, a multiple of 128 that tensor parallelism divides.
        rope: GPTModel's rotary arguments.
        use_transformer_engine: the layer spec: TE on a GPU that has it, plain torch elsewhere, which knows no FP8. Whether this machine can
            do what ``cfg.fp8`` asks for is for ``policy.fp8.check_fp8`` to say.
    """

    hf: HFConfig
    transformer: TransformerConfig
    mapping: Mapping
    padded_vocab_size: int
    rope: dict[str, Any]
    use_transformer_engine: bool

    @property
    def is_moe(self) -> bool:
        return bool(self.transformer.num_moe_experts)

    @property
    def routing(self) -> RoutingShape:
        """The MoE layers and their experts."""
        config = self.transformer
        assert config.num_moe_experts
        frequency = (
            config.moe_layer_freq
        )  # "every n-th from the first", or a 0 or 1 for each layer (gpt_layer_specs.py)
        is_moe = (
            frequency
            if isinstance(frequency, list)
            else [layer % frequency == 0 for layer in range(config.num_layers)]
        )
        layers = tuple(layer for layer, moe in enumerate(is_moe) if moe)
        return RoutingShape(config.num_layers, layers, config.num_moe_experts, config.moe_router_topk)


def describe_model(cfg: Config, world_size: int, device: torch.device) -> ModelDescription:
    """Reads ``cfg.model.path`` and checks it against the layout.

    Raises:
        InputError: no model there, a family without a table, a layout that does not divide the world size, the heads, the layers or
            the experts, an unknown or contradictory [megatron] field, or one whose library is missing, more bf16 layers than a stage has,
            routing to be recorded, replayed or disturbed that a dense model does not have or a [megatron] field prevents.
    """
    hf = read_hf_config(cfg.model.path)
    family = FAMILIES[hf.model_type]
    architecture = family.architecture(hf)
    check_layout(
        cfg.parallel, architecture, world_size, uneven_stages=not _UNEVEN_STAGES.isdisjoint(cfg.megatron)
    )
    use_te = device.type == "cuda" and importlib.util.find_spec("transformer_engine") is not None
    transformer = _transformer_config(cfg, architecture, world_size, use_te)
    multiple = math.lcm(128, cfg.parallel.tensor_model_parallel_size)
    padded_vocab_size = -(-hf.vocab_size // multiple) * multiple
    mapping = Mapping(
        family.rows(hf, padded_vocab_size), tied=hf.tie_word_embeddings, left_out=prediction_layers(hf)
    )
    return ModelDescription(hf, transformer, mapping, padded_vocab_size, _rope(hf, architecture), use_te)


def read_hf_config(path: str, field: str = "model.path") -> HFConfig:
    """The config of a model folder, which ``field`` of our config names.

    Raises:
        InputError: no config.json there, or a family without a table.
    """
    if not path:
        raise InputError(f"{field} is empty: give a Hugging Face model folder")
    if not (Path(path) / "config.json").is_file():
        raise InputError(f"{field} = {path!r} has no config.json: give a Hugging Face model folder")
    try:
        hf = AutoConfig.from_pretrained(path)
    except (ValueError, OSError, KeyError, TypeError, StrictDataclassError) as error:
        raise InputError(f"{field} = {path!r}: config.json cannot be read ({_one_line(error)})") from None
    if hf.model_type not in FAMILIES:
        raise InputError(
            f"{field} = {path!r} is a {hf.model_type!r} model, a family without a table: use one of {', '.join(FAMILIES)}"
        )
    return hf


_UNEVEN_STAGES = {"num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"}


def check_layout(
    parallel: ParallelConfig, architecture: dict[str, Any], world_size: int, *, uneven_stages: bool = False
) -> None:
    """Refuses a layout that does not divide the world or the model, naming the fields and both numbers.

    With ``uneven_stages`` the layers are left to Megatron, which is told how many the first or last stage has.
    """
    tp, pp, cp = (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.context_parallel_size,
    )
    ep, etp = parallel.expert_model_parallel_size, parallel.expert_tensor_parallel_size
    experts = architecture.get("num_moe_experts")

    def divides(field: str, value: int, what: str, number: int) -> None:
        if number % value:
            raise InputError(
                f"parallel.{field} = {value} does not divide {what} = {number}: choose a divisor of {number}"
            )

    size = parallel.model_parallel_size
    if world_size % size:
        raise InputError(
            f"parallel: tensor {tp} x pipeline {pp} x context {cp} = {size} does not divide the world size {world_size}: "
            f"start a multiple of {size} processes or choose smaller sizes"
        )
    divides("tensor_model_parallel_size", tp, "num_attention_heads", architecture["num_attention_heads"])
    divides("tensor_model_parallel_size", tp, "num_key_value_heads", architecture["num_query_groups"])
    divides("tensor_model_parallel_size", tp, "intermediate_size", architecture["ffn_hidden_size"])
    if shared := architecture.get("moe_shared_expert_intermediate_size"):
        divides("tensor_model_parallel_size", tp, "shared_expert_intermediate_size", shared)
    stages = pp * (parallel.virtual_pipeline_model_parallel_size or 1)
    if not uneven_stages:
        divides(
            "pipeline_model_parallel_size x virtual_pipeline_model_parallel_size",
            stages,
            "num_layers",
            architecture["num_layers"],
        )
    if not experts:
        for field, value in (("expert_model_parallel_size", ep), ("expert_tensor_parallel_size", etp)):
            if value > 1:
                raise InputError(f"parallel.{field} = {value} but this model has no experts: set it to 1")
        return
    divides("expert_model_parallel_size", ep, "num_experts", experts)
    divides("expert_tensor_parallel_size", etp, "moe_intermediate_size", architecture["moe_ffn_hidden_size"])
    if world_size % (ep * etp * pp):
        raise InputError(
            f"parallel: expert {ep} x expert tensor {etp} x pipeline {pp} = {ep * etp * pp} does not divide the world size "
            f"{world_size}: choose a smaller expert_model_parallel_size"
        )
    if tp > 1 and not parallel.uses_sequence_parallel:
        raise InputError(
            "parallel.sequence_parallel = false with tensor_model_parallel_size > 1 on a MoE model: Megatron needs it true"
        )
    if ep == 1 and etp != tp:  # Megatron-Core then reduces expert gradients over the ranks of the dense part
        raise InputError(
            f"parallel.expert_tensor_parallel_size = {etp} with tensor_model_parallel_size = {tp} and expert_model_parallel_size = 1 gives "
            f"wrong expert gradients in Megatron-Core: set expert_tensor_parallel_size = {tp} or expert_model_parallel_size > 1"
        )


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
_FIXED_FIELDS = {
    "calculate_per_token_loss": "the loss already comes divided, and gradients would be summed over ranks a second time",
    "variable_seq_lengths": "packed microbatches differ in length",
    "fp4": "packed microbatches are not padded as its kernels need",
    "fp8_dot_product_attention": "packed attention in FP8 is untested",
    "fp8_multi_head_attention": "packed attention in FP8 is untested",
    "tp_comm_overlap": "its buffers have one length, and packed microbatches differ in theirs",
}
_LIBRARIES = {
    ("moe_grouped_gemm", True): ("transformer_engine", "Transformer Engine"),
    ("moe_router_fusion", True): ("transformer_engine", "Transformer Engine"),
    # Transformer Engine's layers need no other for it, but the output layer is Megatron's own (tensor_parallel/layers.py)
    ("gradient_accumulation_fusion", True): (
        "fused_weight_gradient_mlp_cuda",
        "Transformer Engine and NVIDIA apex built from source",
    ),
    ("moe_token_dispatcher_type", "flex"): ("deep_ep", "Transformer Engine and DeepEP"),
}
"""What a field's value needs: a module, and the libraries that have it. All of them need a GPU."""


def _transformer_config(
    cfg: Config, architecture: dict[str, Any], world_size: int, use_te: bool
) -> TransformerConfig:
    parallel, dtype = cfg.parallel, DTYPES[cfg.model.dtype]
    _check_megatron_table(cfg.megatron, architecture, use_te)
    routing_field = _routing_field(cfg)
    noise = f"rollout.router_noise = {cfg.rollout.router_noise:g}" if cfg.rollout.router_noise else None
    for field in (routing_field, noise, "train.freeze_router = true" if cfg.train.freeze_router else None):
        if field and not architecture.get("num_moe_experts"):
            raise InputError(f"{field} but this model has no experts: change it")
    fields = {
        **architecture,
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline_model_parallel_size,
        "context_parallel_size": parallel.context_parallel_size,
        "expert_model_parallel_size": parallel.expert_model_parallel_size,
        "expert_tensor_parallel_size": parallel.expert_tensor_parallel_size,
        "sequence_parallel": parallel.uses_sequence_parallel,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        "variable_seq_lengths": True,  # packed microbatches differ in length
        # between two stages of an interleaved pipeline, batched sends match the wrong receives
        "overlap_p2p_comm": bool(parallel.virtual_pipeline_model_parallel_size),
        "batch_p2p_comm": not parallel.virtual_pipeline_model_parallel_size,
        "use_cpu_initialization": not torch.cuda.is_available() or cfg.device == "cpu",
        "gradient_accumulation_fusion": False,
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": use_te,
        "moe_router_dtype": "fp32",
        "moe_router_bias_update_rate": 0.0,  # Megatron's own default would move the bias in every step
        "moe_enable_routing_replay": routing_field is not None,
    }
    fp8 = _fp8_fields(cfg.fp8, architecture, parallel)
    if use_te:
        fields |= fp8
    else:  # the fused kernels of these need Transformer Engine or apex
        fields |= {
            "bias_dropout_fusion": False,
            "masked_softmax_fusion": False,
            "persist_layer_norm": False,
            "apply_rope_fusion": False,
        }
    try:
        transformer = _config_class(architecture)(**(fields | cfg.megatron))
    except (ValueError, AssertionError, TypeError, ImportError) as error:
        raise InputError(f"Megatron's TransformerConfig refuses this config: {_one_line(error)}") from None
    if routing_field:
        _check_routing_can_be_replayed(transformer, routing_field)
    _check_balancing(transformer, cfg.train.max_tokens_per_microbatch)
    _scale_global_aux_loss(transformer, world_size // parallel.model_parallel_size)
    return transformer


def _routing_field(cfg: Config) -> str | None:
    """The setting that wants routing recorded or replayed, as the user wrote it."""
    if "router_shift" in needed_columns(cfg.algorithm):
        return f"algorithm.loss = {cfg.algorithm.loss!r}"
    if cfg.algorithm.moe_routing_replay != "none":
        return f"algorithm.moe_routing_replay = {cfg.algorithm.moe_routing_replay!r}"
    return "rollout.routed_experts = true" if cfg.rollout.routed_experts else None


def _check_routing_can_be_replayed(transformer: TransformerConfig, routing_field: str) -> None:
    """Refuses what goes past the hook in Megatron's router (moe_utils.py:topk_routing_with_score_function), or changes its result."""
    for name, harmless, why in (
        ("moe_router_fusion", False, "the fused router neither records nor replays"),
        ("moe_expert_capacity_factor", None, "tokens would be dropped from their experts"),
        ("cuda_graph_impl", "none", "a captured graph does not ask for the routing again"),
    ):
        if (value := getattr(transformer, name)) != harmless:
            raise InputError(f"megatron.{name} = {value!r} with {routing_field}: {why}; remove one of them")
    if transformer.moe_router_load_balancing_type == "sinkhorn":
        raise InputError(
            f"megatron.moe_router_load_balancing_type = 'sinkhorn' with {routing_field}: it neither records nor replays"
        )


def _check_balancing(transformer: TransformerConfig, max_tokens_per_microbatch: int) -> None:
    """Refuses load balancing that would silently be another one, or none."""
    if "seq_aux_loss" in transformer.moe_router_load_balancing_type and max_tokens_per_microbatch > 1:
        raise InputError(
            "megatron.moe_router_load_balancing_type = 'seq_aux_loss': Megatron takes a packed microbatch for one sequence; set "
            "train.max_tokens_per_microbatch = 1, which packs each alone, or choose 'aux_loss'"
        )
    if (
        transformer.num_moe_experts
        and transformer.moe_router_bias_update_rate
        and not transformer.moe_router_enable_expert_bias
    ):
        raise InputError(
            f"megatron.moe_router_bias_update_rate = {transformer.moe_router_bias_update_rate:g} but this model's routers have no bias: "
            "remove it"
        )


def _scale_global_aux_loss(transformer: TransformerConfig, data_parallel_size: int) -> None:
    """Makes its coefficient mean the same in every layout: each data-parallel rank has a summand of the global loss (moe_utils.py:
    switch_load_balancing_loss_func), which the gradient buffers average."""
    kinds, coefficient = transformer.moe_router_load_balancing_type, transformer.moe_aux_loss_coeff
    if isinstance(coefficient, list):
        scales = [data_parallel_size if kind == "global_aux_loss" else 1 for kind in kinds]
        transformer.moe_aux_loss_coeff = [c * scale for c, scale in zip(coefficient, scales, strict=True)]
    elif kinds == "global_aux_loss":
        transformer.moe_aux_loss_coeff = coefficient * data_parallel_size


def _config_class(architecture: dict[str, Any]) -> type[TransformerConfig]:
    return MLATransformerConfig if architecture.get("multi_latent_attention") else TransformerConfig


def _check_megatron_table(table: dict[str, Any], architecture: dict[str, Any], use_te: bool) -> None:
    known = {field.name for field in dataclasses.fields(_config_class(architecture))}
    for name, value in table.items():
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
            raise InputError(f"unknown config key 'megatron.{name}': did you mean 'megatron.{nearest[0]}'?")
        if name in _LAYOUT_FIELDS or name in _OUR_FIELDS:
            ours = _OUR_FIELDS.get(name, f"parallel.{name}")
            raise InputError(f"megatron.{name} = {value!r}: set {ours} instead")
        if name in _FIXED_FIELDS:
            raise InputError(f"megatron.{name} = {value!r}: {_FIXED_FIELDS[name]}; remove it")
        if name in architecture:
            raise InputError(
                f"megatron.{name} = {value!r}: the model's config.json already says {architecture[name]!r}; remove it"
            )
    for (name, value), (module, libraries) in _LIBRARIES.items():
        if table.get(name) == value and not (use_te and importlib.util.find_spec(module)):
            raise InputError(
                f"megatron.{name} = {value!r} needs {libraries}, and a GPU: install what is missing (docs/install_gpu.md), or remove it"
            )


def _fp8_fields(fp8: Fp8Config, architecture: dict[str, Any], parallel: ParallelConfig) -> dict[str, Any]:
    if fp8.recipe is None:
        return {}
    layers = architecture["num_layers"] // parallel.pipeline_model_parallel_size
    for name in ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"):
        if (count := getattr(fp8, name)) > layers:
            raise InputError(
                f"fp8.{name} = {count} is more than the {layers} layers of a pipeline stage: choose a smaller one"
            )
    return {
        "fp8": fp8.format or ("e4m3" if fp8.recipe in ("blockwise", "mxfp8") else "hybrid"),
        "fp8_recipe": fp8.recipe,
        "fp8_param": fp8.param,
        "first_last_layers_bf16": fp8.bf16_layers > 0,
        "num_layers_at_start_in_bf16": fp8.num_layers_at_start_in_bf16,
        "num_layers_at_end_in_bf16": fp8.num_layers_at_end_in_bf16,
        "moe_router_padding_for_quantization": bool(architecture.get("num_moe_experts"))
        and fp8.moe_router_padding_for_quantization,
    }


def _rope(hf: HFConfig, architecture: dict[str, Any]) -> dict[str, Any]:
    if architecture.get(
        "multi_latent_attention"
    ):  # each of its layers rotates by TransformerConfig's own fields
        return {}
    rope = hf.rope_parameters
    base = {"rotary_base": rope["rope_theta"], "rotary_percent": rope.get("partial_rotary_factor", 1.0)}
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return base
    # Megatron-Core (rotary_pos_embedding.py:_apply_scaling) has Llama 3's frequency scaling with these constants built in
    llama3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    if kind == "llama3" and all(rope[key] == value for key, value in llama3.items()):
        return base | {"rope_scaling": True, "rope_scaling_factor": rope["factor"]}
    raise InputError(
        f"config.json of this {hf.model_type} model has rope_parameters = {rope!r}: only default and llama3 are supported"
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
