"""Functions that the ranks of the conversion tests run.

``python -m tests.support.conversion_cases HF MEGATRON TENSORS`` runs a conversion that kills itself after
TENSORS tensors.
"""

from __future__ import annotations

import os
import random
import signal
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, apply_factories
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from torch import Tensor

from megatron_gmpo.batch.columns import TrainBatch
from megatron_gmpo.commands.conversion_job import processes
from megatron_gmpo.config import Config
from megatron_gmpo.distributed import rank, world_size
from megatron_gmpo.errors import InputError
from megatron_gmpo.models.attention import PackedAttention
from megatron_gmpo.models.description import describe_model
from megatron_gmpo.policy.build import build_chunks
from megatron_gmpo.policy.parallel import start_model_parallel, stop_model_parallel
from megatron_gmpo.weights.export import Export
from megatron_gmpo.weights.hf_to_megatron import HFToMegatron
from megatron_gmpo.weights.megatron_to_hf import MegatronToHF
from megatron_gmpo.weights.parameters import unwrapped
from megatron_gmpo.weights.torch_dist import checkpoint_folder

from . import cases

CPU = torch.device("cpu")


def to_megatron(hf: Path, megatron: Path) -> int:
    """Convert, verify and return the number of bytes that this rank converted."""
    done: list[int] = []
    HFToMegatron(hf).convert(megatron, verify=True, advance=done.append)
    return sum(done)


def to_hf(
    megatron: Path,
    hf: Path,
    template: Path | None = None,
    dtype: str | None = None,
    max_shard_size: int = 10**9,
) -> int:
    """Convert, verify and return the number of bytes that this rank converted."""
    done: list[int] = []
    conversion = MegatronToHF(megatron, template, dtype, max_shard_size)
    conversion.convert(hf, verify=True, advance=done.append)
    return sum(done)


def refusal(conversion: Callable[..., Any], *arguments: Any) -> str:
    """Return the error message with which one of the functions above stops, or an empty string."""
    try:
        conversion(*arguments)
    except InputError as error:
        return str(error)
    return ""


def weights_loaded_by_megatron(cfg: Config, checkpoint: Path) -> dict[str, Tensor] | None:
    """Load a checkpoint with Megatron's own loader and return the weights by Hugging Face name on rank 0."""
    description = describe_model(cfg, world_size(), CPU)
    groups = start_model_parallel(cfg.parallel, cfg.seed, cfg.distributed_timeout_s)
    try:
        chunks = build_chunks(description, groups, CPU)
        for chunk in chunks:
            gpt: Any = chunk
            for parameter in gpt.parameters():
                parameter.data.fill_(float("nan"))
            loaded: Any = dist_checkpointing.load(
                {"model": gpt.sharded_state_dict()}, str(checkpoint_folder(checkpoint))
            )
            gpt.load_state_dict(loaded["model"])
        weights = {name: tensor.clone() for name, tensor in Export(chunks, description.mapping, groups)}
        return weights if rank() == 0 else None
    finally:
        stop_model_parallel()


def save_as_megatron_lm(
    cfg: Config, batch: TrainBatch, folder: Path, optimizer_format: str
) -> dict[str, Tensor]:
    """Write a checkpoint in the format of Megatron-LM and slime, and return its weights on rank 0.

    Source: generate_state_dict in training/checkpointing.py of Megatron-LM.
    """
    with cases.opened(cfg) as policy:
        metadata = {
            "distrib_optim_sharding_type": optimizer_format,
            "chained_optim_avoid_prefix": False,
            "dp_cp_group": policy.groups.dp_cp,
        }
        (chunk,) = policy.chunks
        gpt: Any = unwrapped(chunk)
        random_states = [{"random_rng_state": random.getstate(), "torch_rng_state": torch.get_rng_state()}]
        cases._steps(policy, policy.share(batch), 1)  # creates the moments
        model = gpt.sharded_state_dict(metadata=metadata)
        for extra_state in nested_values(model):
            if isinstance(extra_state, ShardedObject):
                extra_state.data = Evil(folder / "evil")
        state = {
            "args": Namespace(num_layers=3, params_dtype=torch.bfloat16),
            "checkpoint_version": 3.0,
            "iteration": 7,
            "model": model,
            "optimizer": policy.model.optimizer.sharded_state_dict(
                gpt.sharded_state_dict(metadata=metadata), metadata=metadata
            ),
            "opt_param_scheduler": policy.model.scheduler.state_dict(),
            "rng_state": ShardedObject("rng_state", random_states, (1, world_size()), (0, rank())),
        }
        (folder / "iter_0000007").mkdir(parents=True, exist_ok=True)
        dist_checkpointing.save(state, str(folder / "iter_0000007"))
        (folder / "latest_checkpointed_iteration.txt").write_text("7")
        return cases.weights_on_rank_0(policy)


@dataclass
class Evil:
    """Object that touches a file when it is unpickled."""

    file: Path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.file,))


def keys_of_the_plain_spec(cfg: Config) -> set[str]:
    """Return the checkpoint keys of a GPTModel with Megatron's plain layer spec and our core attention."""
    description = describe_model(cfg, world_size(), CPU)
    groups = start_model_parallel(cfg.parallel, cfg.seed, cfg.distributed_timeout_s)
    try:
        transformer = description.transformer
        spec: Any = get_gpt_decoder_block_spec(
            transformer, use_transformer_engine=False, normalization="RMSNorm"
        )
        # Megatron's own core attention cannot be built with latent attention.
        for layer in spec.layer_specs:
            layer.submodules.self_attention.submodules.core_attention = PackedAttention
        gpt = GPTModel(
            transformer,
            spec,
            description.padded_vocab_size,
            64,
            position_embedding_type="rope",
            pg_collection=groups,
        )
        sharded = gpt.sharded_state_dict()
        apply_factories(sharded)
        return {value.key for value in nested_values(sharded) if isinstance(value, ShardedTensor)}
    finally:
        stop_model_parallel()


def main(hf: Path, megatron: Path, tensors: int) -> None:
    todo = iter(range(tensors))

    def die(_: int) -> None:
        if next(todo, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

    with processes():
        HFToMegatron(hf).convert(megatron, verify=False, advance=die)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
