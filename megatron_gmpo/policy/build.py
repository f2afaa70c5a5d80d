"""The Megatron model, its gradient buffers, optimizer and learning-rate schedule."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.process_groups_config import ProcessGroupCollection

from ..config import OptimizerConfig
from ..models.config import ModelDescription
from ..models.spec import decoder_spec


@dataclass(frozen=True)
class TrainableModel:
    """Model chunks wrapped for training (one a virtual pipeline stage), with what updates them."""

    chunks: list[torch.nn.Module]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler


def build_chunks(description: ModelDescription, groups: ProcessGroupCollection, device: torch.device) -> list[torch.nn.Module]:
    """This rank's model chunks with weights still to be loaded, in the config's dtype."""
    config = copy.copy(description.transformer)  # schedules and DDP write functions into it
    virtual = config.virtual_pipeline_model_parallel_size
    stages = groups.pp.size() * (virtual or 1)
    chunks: list[torch.nn.Module] = []
    for vp_stage in range(virtual or 1):
        stage = vp_stage * groups.pp.size() + groups.pp.rank()
        stage_number = vp_stage if virtual else None
        model = GPTModel(
            config,
            decoder_spec(config, use_transformer_engine=description.use_transformer_engine, vp_stage=stage_number),  # pyright: ignore[reportArgumentType]
            vocab_size=description.padded_vocab_size,
            max_sequence_length=description.hf.max_position_embeddings,
            pre_process=stage == 0,
            post_process=stage == stages - 1,
            position_embedding_type="rope",
            share_embeddings_and_output_weights=description.mapping.tied,
            parallel_output=True,
            pg_collection=groups,
            vp_stage=stage_number,
            **description.rope,
        ).to(device)
        chunks.append(model)  # not in a Float16Module: that would copy the logits to fp32
    return chunks


def make_trainable(
    chunks: list[torch.nn.Module], cfg: OptimizerConfig, total_updates: int, groups: ProcessGroupCollection
) -> TrainableModel:
    """Adds gradient buffers (summed in fp32), the optimizer, and a schedule over ``total_updates`` optimizer steps.

    The weights must be loaded before: the optimizer copies them as its fp32 main weights.
    """
    config: Any = chunks[0].config
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=cfg.use_distributed_optimizer, overlap_grad_reduce=False
    )
    wrapped: list[Any] = [
        DistributedDataParallel(config, ddp_config, chunk, disable_bucketing=i > 0, pg_collection=groups) for i, chunk in enumerate(chunks)
    ]
    config.finalize_model_grads_func = finalize_model_grads
    optimizer_config = MegatronOptimizerConfig(
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
    )
    optimizer = get_megatron_optimizer(optimizer_config, wrapped, use_gloo_process_groups=False, pg_collection=None)
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=cfg.lr,
        min_lr=cfg.min_lr,
        lr_warmup_steps=cfg.lr_warmup_steps,
        lr_decay_steps=max(total_updates, cfg.lr_warmup_steps) + 1,  # min_lr would come after the last update
        lr_decay_style=cfg.lr_schedule,
        start_wd=cfg.weight_decay,
        end_wd=cfg.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        # a resumed run takes its place in the schedule from the checkpoint, the schedule itself from its config
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
    return TrainableModel(wrapped, optimizer, scheduler)
