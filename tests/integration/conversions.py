"""What the ranks of a conversion test run. As a module: a conversion that is killed half-way, ``python -m ... HF MEGATRON TENSORS``."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from torch import Tensor

from megatron_gmpo.checkpoint.convert import HFToMegatron, MegatronToHF
from megatron_gmpo.checkpoint.hf import export_hf
from megatron_gmpo.checkpoint.torch_dist import checkpoint_folder
from megatron_gmpo.config import Config
from megatron_gmpo.distributed import rank, world_size
from megatron_gmpo.models.attention import PackedAttention
from megatron_gmpo.models.config import describe_model
from megatron_gmpo.policy.build import build_chunks
from megatron_gmpo.policy.parallel import start_model_parallel, stop_model_parallel
from megatron_gmpo.types import InputError
from tools.conversion import processes

CPU = torch.device("cpu")


def to_megatron(hf: Path, megatron: Path) -> int:
    """Converts and verifies; the bytes this rank did."""
    done: list[int] = []
    HFToMegatron(hf).convert(megatron, verify=True, advance=done.append)
    return sum(done)


def to_hf(megatron: Path, hf: Path, template: Path | None = None, dtype: str | None = None, max_shard_size: int = 10**9) -> int:
    done: list[int] = []
    MegatronToHF(megatron, template, dtype).convert(hf, max_shard_size=max_shard_size, verify=True, advance=done.append)
    return sum(done)


def refusal(conversion: str, *arguments: Any) -> str:
    """The message with which ``to_megatron`` or ``to_hf`` stops."""
    try:
        globals()[conversion](*arguments)
    except InputError as error:
        return str(error)
    return ""


def weights_loaded_by_megatron(cfg: Config, checkpoint: Path) -> dict[str, Tensor] | None:
    """On rank 0: what Megatron's own loader makes of a checkpoint in a layout, under Hugging Face names."""
    description = describe_model(cfg, world_size(), CPU)
    groups = start_model_parallel(cfg.parallel, cfg.seed, cfg.distributed_timeout_s)
    try:
        chunks = build_chunks(description, groups, CPU)
        for chunk in chunks:
            gpt: Any = chunk
            for parameter in gpt.parameters():
                parameter.data.fill_(float("nan"))
            loaded: Any = dist_checkpointing.load({"model": gpt.sharded_state_dict()}, str(checkpoint_folder(checkpoint)))
            gpt.load_state_dict(loaded["model"])
        weights = {name: tensor.clone() for name, tensor in export_hf(chunks, description.mapping, groups)}
        return weights if rank() == 0 else None
    finally:
        stop_model_parallel()


def keys_of_the_plain_spec(cfg: Config) -> set[str]:
    """What a GPTModel of Megatron's own plain layer spec, but for the core attention, looks for in a checkpoint."""
    description = describe_model(cfg, world_size(), CPU)
    groups = start_model_parallel(cfg.parallel, cfg.seed, cfg.distributed_timeout_s)
    try:
        transformer = description.transformer
        spec: Any = get_gpt_decoder_block_spec(transformer, use_transformer_engine=False, normalization="RMSNorm")
        for layer in spec.layer_specs:  # Megatron's own cannot be built with latent attention
            layer.submodules.self_attention.submodules.core_attention = PackedAttention
        gpt = GPTModel(transformer, spec, description.padded_vocab_size, 64, position_embedding_type="rope", pg_collection=groups)
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
