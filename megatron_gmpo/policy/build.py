"""The Megatron model, its gradient buffers, optimizer and learning-rate schedule."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from ..config import OptimizerConfig
from ..errors import InputError
from ..models.description import DTYPES, ModelDescription
from ..models.layer_spec import decoder_spec
from ..platform.capabilities import Capabilities
from ..weights.parameters import unwrapped


def check_optimizer(cfg: OptimizerConfig, machine: Capabilities) -> None:
    """Check that the machine has Megatron's precision-aware optimizer, if the config needs it.

    Raises:
        InputError: ``moments_dtype`` or ``offload_fraction`` is set, without a GPU or Transformer Engine.
    """
    for name, value, plain in (
        ("moments_dtype", cfg.moments_dtype, "fp32"),
        ("offload_fraction", cfg.offload_fraction, 0.0),
    ):
        if value != plain and not (machine.device and machine.transformer_engine):
            missing = (
                "Transformer Engine: install it as docs/install_gpu.md says"
                if machine.device
                else "an NVIDIA GPU: use one"
            )
            raise InputError(f"optimizer.{name} = {value!r} needs {missing}, or set it to {plain!r}")


@dataclass(frozen=True)
class TrainableModel:
    """Model chunks wrapped for training, one per virtual pipeline stage, with optimizer and schedule."""

    chunks: list[torch.nn.Module]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler

    def finish_update(self) -> None:
        """Gather the last update into the weights of every rank, before they are read outside a forward pass.

        Collective. Without this call, overlap_param_gather gathers the weights of each module in its next
        forward pass.
        """
        for chunk in self.chunks:
            if chunk.ddp_config.overlap_param_gather:  # pyright: ignore[reportAttributeAccessIssue]
                chunk.start_param_sync(force_sync=True)  # pyright: ignore[reportCallIssue]

    def free_gradients(self) -> None:
        """Free the memory of the gradient buffers until ``restore_gradients``. Not run on a GPU yet."""
        for chunk in self.chunks:
            chunk.offload_grad_buffers()  # pyright: ignore[reportCallIssue]

    def restore_gradients(self) -> None:
        """Allocate freed gradient buffers again, filled with zeros. Otherwise do nothing."""
        for chunk in self.chunks:
            chunk.restore_grad_buffers(synchronize=False)  # pyright: ignore[reportCallIssue]


class HiddenStatesLayer(ColumnParallelLinear):
    """An output layer that returns its inputs, complete on every tensor-parallel rank, instead of logits.

    ``policy.logprobs`` computes log probabilities from them. Their gradients are summed over these ranks.
    """

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        if self.sequence_parallel:
            return gather_from_sequence_parallel_region(input_, group=self.tp_group), None
        return copy_to_tensor_model_parallel_region(input_, group=self.tp_group), None


def without_logits(chunks: list[torch.nn.Module]) -> list[torch.nn.Module]:
    """Let the chunk with the output layer return (1, T, H) hidden states instead of logits."""
    for chunk in chunks:
        if chunk.post_process:
            # GPTModel builds its output layer itself; parameters and their names stay as they are
            chunk.output_layer.__class__ = HiddenStatesLayer  # pyright: ignore[reportAttributeAccessIssue]
    return chunks


def output_weight(chunk: Any) -> Tensor:
    """Return this rank's rows of the output matrix, (V_local, H), of a chunk with the output layer."""
    model = unwrapped(chunk)
    if model.share_embeddings_and_output_weights:
        return model.shared_embedding_or_output_weight()
    return model.output_layer.weight


def build_chunks(
    description: ModelDescription, groups: ProcessGroupCollection, device: torch.device
) -> list[torch.nn.Module]:
    """Return this rank's model chunks in the config's dtype; their weights are not loaded yet."""
    config = copy.copy(description.transformer)  # schedules and DDP store functions in it
    virtual = config.virtual_pipeline_model_parallel_size
    stages = groups.pp.size() * (virtual or 1)
    chunks: list[torch.nn.Module] = []
    for vp_stage in range(virtual or 1):
        stage = vp_stage * groups.pp.size() + groups.pp.rank()
        stage_number = vp_stage if virtual else None
        layers = decoder_spec(
            config, use_transformer_engine=description.use_transformer_engine, vp_stage=stage_number
        )
        options: dict[str, Any] = {
            "vocab_size": description.padded_vocab_size,
            "max_sequence_length": description.hf.max_position_embeddings,
            "pre_process": stage == 0,
            "post_process": stage == stages - 1,
            "share_embeddings_and_output_weights": description.mapping.tied,
            "parallel_output": True,
            "pg_collection": groups,
            "vp_stage": stage_number,
            **description.rope,
        }
        if description.vision:
            from ..models.vision_language import (
                VisionLanguageModel,
            )  # text models do not load transformers' code

            model = VisionLanguageModel(config, layers, description.vision, **options)
        else:
            model = GPTModel(config, layers, position_embedding_type="rope", **options)  # pyright: ignore[reportArgumentType]
        chunks.append(model.to(device))  # without Float16Module, which would copy the logits to fp32
    return chunks


def train_tower(chunks: list[torch.nn.Module]) -> None:
    """Train the vision tower, which is frozen otherwise. Must run before the gradient buffers are built."""
    for chunk in chunks:
        if hasattr(chunk, "visual"):
            tower: Any = chunk.visual.requires_grad_()  # pyright: ignore[reportCallIssue]
            if chunk.config.recompute_granularity == "full":  # pyright: ignore[reportAttributeAccessIssue]
                tower.gradient_checkpointing_enable({"use_reentrant": False})


def make_trainable(
    chunks: list[torch.nn.Module], cfg: OptimizerConfig, total_updates: int, groups: ProcessGroupCollection
) -> TrainableModel:
    """Add fp32 gradient buffers, the optimizer, and a learning-rate schedule over ``total_updates`` steps.

    Load the weights first: the optimizer copies them as its fp32 main weights.
    """
    config: Any = chunks[0].config
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=cfg.use_distributed_optimizer,
        overlap_grad_reduce=cfg.overlap_grad_reduce,
        overlap_param_gather=cfg.overlap_param_gather,
        fp8_param_gather=config.fp8_param,
    )
    wrapped: list[Any] = [
        DistributedDataParallel(config, ddp_config, chunk, disable_bucketing=i > 0, pg_collection=groups)
        for i, chunk in enumerate(chunks)
    ]
    config.finalize_model_grads_func = finalize_model_grads
    if cfg.overlap_grad_reduce:  # reduce gradients only in the last microbatch
        config.no_sync_func = [chunk.no_sync for chunk in wrapped] if len(wrapped) > 1 else wrapped[0].no_sync
    optimizer = get_megatron_optimizer(
        _optimizer_config(cfg, config), wrapped, use_gloo_process_groups=False, pg_collection=None
    )
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=cfg.lr,
        min_lr=cfg.min_lr,
        lr_warmup_steps=cfg.lr_warmup_steps,
        # + 1, because the last update does not use min_lr
        lr_decay_steps=max(total_updates, cfg.lr_warmup_steps) + 1,
        lr_decay_style=cfg.lr_schedule,
        start_wd=cfg.weight_decay,
        end_wd=cfg.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
    return TrainableModel(wrapped, optimizer, scheduler)


def _optimizer_config(cfg: OptimizerConfig, config: Any) -> MegatronOptimizerConfig:
    """Return Megatron's optimizer settings; ``config`` is the ``TransformerConfig`` of the model."""
    return MegatronOptimizerConfig(
        optimizer="adam",
        lr=cfg.lr,
        min_lr=cfg.min_lr,
        weight_decay=cfg.weight_decay,
        adam_beta1=cfg.adam_beta1,
        adam_beta2=cfg.adam_beta2,
        adam_eps=cfg.adam_eps,
        clip_grad=cfg.clip_grad,
        bf16=config.bf16,
        params_dtype=config.params_dtype,
        use_distributed_optimizer=cfg.use_distributed_optimizer,
        overlap_param_gather=cfg.overlap_param_gather,
        fp8_recipe=config.fp8_recipe if config.fp8_param else None,  # the storage format of the weights
        # This optimizer stores the main weights itself. A checkpoint needs complete main weights, so it must
        # not store them as remainders.
        use_precision_aware_optimizer=cfg.moments_dtype != "fp32" or cfg.offload_fraction > 0,
        store_param_remainders=False,
        exp_avg_dtype=DTYPES[cfg.moments_dtype],
        exp_avg_sq_dtype=DTYPES[cfg.moments_dtype],
        optimizer_cpu_offload=cfg.offload_fraction > 0,
        optimizer_offload_fraction=cfg.offload_fraction,
        overlap_cpu_optimizer_d2h_h2d=cfg.offload_fraction > 0,
    )


def move_to_host(chunks: list[torch.nn.Module]) -> None:
    """Move the weights to host memory, pinned if they come from a GPU."""
    for parameter in _parameters(chunks):
        host = parameter.data.cpu()
        parameter.data = host.pin_memory() if parameter.is_cuda else host


@contextmanager
def on_device(chunks: list[torch.nn.Module], device: torch.device) -> Iterator[None]:
    """Copy the weights to ``device`` for the block, then restore the host copies. Changes are lost."""
    parameters = _parameters(chunks)
    host = [parameter.data for parameter in parameters]
    for parameter in parameters:
        parameter.data = parameter.data.to(device, non_blocking=True)
    try:
        yield
    finally:
        for parameter, data in zip(parameters, host, strict=True):
            parameter.data = data
        for module in (module for chunk in chunks for module in chunk.modules()):
            getattr(module, "_fp8_workspaces", {}).clear()  # Transformer Engine's FP8 copies of the weights


def _parameters(chunks: list[torch.nn.Module]) -> list[torch.nn.Parameter]:
    return [parameter for chunk in chunks for parameter in chunk.parameters()]
