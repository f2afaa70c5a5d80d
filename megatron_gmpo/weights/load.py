"""Load a Hugging Face safetensors folder into a parallel Megatron model."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from ..distributed import agreed, all_gather_objects, broadcast_object, rank
from ..errors import InputError
from ..models.mapping import TOWER, Mapping
from .parameters import LocalParameter, local_parameters
from .safetensors_folder import SafetensorsFolder


@torch.no_grad()
def load_hf(
    chunks: list[torch.nn.Module], mapping: Mapping, path: str, groups: ProcessGroupCollection
) -> None:
    """Fill the model from a Hugging Face folder. Collective; every rank reads the tensors that it holds.

    Raises:
        InputError: the folder has a tensor that no rank loads; a tensor is missing or misshapen. Raised on
            every rank.
    """
    loaded: set[str] = set()
    with agreed():
        source = SafetensorsFolder(path, left_out=mapping.left_out)
        if mapping.tied and rank() == 0:
            source.check_tied()
        for parameter in local_parameters(chunks, groups):
            loaded.update(_load_parameter(parameter, source, mapping, groups))
    tied = {"lm_head.weight"} if mapping.tied else set()
    extra = sorted(source.names - tied.union(*all_gather_objects(loaded)))
    if extra:
        raise InputError(
            f"{path!r} has {len(extra)} tensors that no Megatron parameter takes, the first {extra[0]!r}: "
            "use the config.json of these weights"
        )


def has_tower_of(
    path: str, chunks: list[torch.nn.Module], mapping: Mapping, groups: ProcessGroupCollection
) -> bool:
    """Return whether the vision tower has exactly the weights of a Hugging Face folder. Collective.

    Rank 0, which has the tower like all ranks of the first stage, reads and compares.

    Raises:
        InputError: the folder cannot be read. Raised on every rank.
    """
    equal = True
    with agreed():
        if rank() == 0:
            source = SafetensorsFolder(path, left_out=mapping.left_out)
            for parameter in local_parameters(chunks, groups):
                if equal and parameter.name.startswith(TOWER):
                    (name,) = mapping.find(parameter.name).hf
                    equal = torch.equal(parameter.tensor, source.get(name).to(parameter.tensor))
    return broadcast_object(equal)


def _load_parameter(
    parameter: LocalParameter, source: SafetensorsFolder, mapping: Mapping, groups: ProcessGroupCollection
) -> tuple[str, ...]:
    """Fill one parameter and return the names of the tensors that it needed."""
    where, shape = str(source.path), tuple(parameter.tensor.shape)
    try:
        match = mapping.find(parameter.name)
    except KeyError as error:
        raise InputError(
            f"[megatron] requires parameters that the model does not have: {error.args[0]}; "
            "remove the field that adds it"
        ) from None
    if mapping.tied and match.hf == ("lm_head.weight",):
        match = mapping.find("embedding.word_embeddings.weight")
    names = match.hf
    missing = [name for name in names if name not in source.names]
    if missing:
        raise InputError(
            f"{where!r} lacks the tensor {missing[0]!r} that Megatron parameter {parameter.name!r} needs: "
            "download the model again"
        )
    tp = groups.expt_tp if parameter.is_expert else groups.tp
    try:
        full = match.operation.join([source.get(name) for name in names])
        shard = match.operation.shard(full, tp.rank(), tp.size())
        fits = shard.shape == parameter.tensor.shape
    except RuntimeError:  # the shapes of the parts do not fit together
        fits, shard = False, parameter.tensor
    if not fits:
        shapes = ", ".join(f"{name} {source.shape(name)}" for name in names)
        raise InputError(
            f"{where!r}: {shapes} does not fit Megatron parameter {parameter.name!r}, {shape} on each of "
            f"{tp.size()} tensor-parallel ranks: use the config.json of these weights"
        )
    tensor: Any = parameter.tensor
    tensor.copy_(shard)
    # in an FP8 model, this is the initial value of the optimizer's main weights (distrib_optimizer.py)
    if hasattr(tensor, "_high_precision_init_val"):
        tensor._high_precision_init_val = shard.to(tensor.dtype)
    return names
