"""Weights and optimizer state of a policy as the sharded tensors of a checkpoint.

The optimizer is stored by parameter, not by optimizer shard: each fp32 main weight and Adam moment has the
key and the global shape of its parameter. Such a checkpoint loads in every layout, also with another
expert-parallel size, and with or without the distributed optimizer.

Megatron's own format, ``fully_reshardable``, does not (tried with 0.16.1): it does not store the update count
of torch's Adam (KeyError 'step'), and with expert parallelism the parameter groups of its chained optimizers
do not load in a layout without it (KeyError 'pre_wd_mult').
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, is_main_replica
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import FP32Optimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from ..checkpoint import load_tensors
from ..weights.parameters import unwrapped
from .build import TrainableModel


def tensors_to_save(
    model: TrainableModel, groups: ProcessGroupCollection, updates: int
) -> tuple[dict[str, Any], Iterator[Tensor]]:
    """Return weights and optimizer (fp32) as a sharded state dict, and the optimizer's tensors. Collective.

    In the sharded state dict, the optimizer's tensors are on the device ``meta``. The iterator yields those
    that this rank writes, in their order, one in memory at a time. It contains collectives: every rank uses
    it up.

    Args:
        updates: number of updates so far.
    """
    tensors = _sharded_weights(model.chunks, groups)
    slots = list(optimizer_slots(model.optimizer))
    # before the first update, the line above has created the moments, without a count
    _set_update_count(model.optimizer, updates)
    by_parameter = _by_parameter(tensors)
    writers = _spread_over_replicas(list(by_parameter.values()), groups)
    promised = [
        {name: torch.empty(slot.parameter.shape, device="meta") for name in slot.names} for slot in slots
    ]
    sharded = _sharded_optimizer(slots, by_parameter, promised)
    rounds = _in_rounds([(slot, writers[id(slot.parameter)]) for slot in slots])
    ordered = {key: sharded[key] for items in rounds for key, *_ in items}
    return {**tensors, "optimizer": ordered | sharded}, _gather(rounds)


def load_training_state(
    checkpoint: Path, model: TrainableModel, groups: ProcessGroupCollection, updates: int
) -> None:
    """Load weights and optimizer from a checkpoint of any layout (collective).

    Args:
        updates: number of updates that the checkpoint contains.
    """
    slots = list(optimizer_slots(model.optimizer))
    buffers = [{name: torch.empty(slot.parameter.shape) for name in slot.names} for slot in slots]
    tensors = _sharded_weights(model.chunks, groups)
    optimizer = _sharded_optimizer(slots, _by_parameter(tensors), buffers)
    loaded = load_tensors(checkpoint, {**tensors, "optimizer": optimizer})
    _fill(model.chunks, loaded)
    for i, slot in enumerate(slots):
        for name, tensor in slot.tensors.items():
            tensor.copy_(loaded["optimizer"][f"{name}.{i}"].view(-1)[slot.start : slot.stop].view_as(tensor))
        slot.write_back()
    if model.chunks[0].ddp_config.fp8_param_gather:  # pyright: ignore[reportAttributeAccessIssue]
        for part in _parts(model.optimizer):  # round the main weights to FP8 once, as an update does
            part._copy_main_params_to_model_params()
        for chunk in model.chunks:
            chunk.start_param_sync()  # pyright: ignore[reportCallIssue]
    _set_update_count(model.optimizer, updates)


def load_weights(checkpoint: Path, chunks: list[torch.nn.Module], groups: ProcessGroupCollection) -> None:
    """Load only the weights from a checkpoint of any layout (collective)."""
    _fill(chunks, load_tensors(checkpoint, _sharded_weights(chunks, groups)))


@dataclass(frozen=True)
class Slot:
    """The optimizer state of one model parameter on this rank.

    Attributes:
        parameter: the model parameter, whole within its model-parallel shard.
        start, stop: the range of the flattened parameter whose state this rank holds; empty on a rank that
            holds none.
        tensors: ``exp_avg``, ``exp_avg_sq`` and, for a bf16 model, the fp32 ``main`` weights, of stop - start
            elements. They are the optimizer's own tensors, or fp32 copies where it stores another dtype.
        names: keys of ``tensors`` on the ranks that hold state.
        group: ranks that share the state, or None if each rank holds all of it.
        write_back: writes ``tensors`` into the optimizer where they are copies.
    """

    parameter: torch.nn.Parameter
    start: int
    stop: int
    tensors: dict[str, Tensor]
    names: tuple[str, ...]
    group: dist.ProcessGroup | None
    write_back: Callable[[], None] = lambda: None


def optimizer_slots(optimizer: MegatronOptimizer) -> Iterator[Slot]:
    """Yield a slot for each parameter that this rank trains. Missing moments are created as zeros."""
    for part in _parts(optimizer):
        if part.is_stub_optimizer:
            continue
        _create_moments(part)
        if isinstance(part, DistributedOptimizer):
            yield from _distributed_slots(part)
        elif isinstance(part, FP32Optimizer):
            for parameter in part.get_parameters():
                yield _slot(
                    parameter, parameter, part.optimizer.state[parameter], slice(0, parameter.numel()), None
                )
        else:  # Float16OptimizerWithFloat16Params
            pairs = [
                (model, main)
                for models, mains in zip(part.float16_groups, part.fp32_from_float16_groups, strict=True)
                for model, main in zip(models, mains, strict=True)
            ]
            pairs += [(parameter, parameter) for group in part.fp32_from_fp32_groups for parameter in group]
            for model, main in pairs:
                yield _slot(model, main, part.optimizer.state[main], slice(0, model.numel()), None)


def _distributed_slots(part: DistributedOptimizer) -> Iterator[Slot]:
    for buffer in part.buffers:
        for parameter in buffer.params:
            if parameter not in part.model_param_gbuf_map:  # on another data-parallel rank
                yield Slot(parameter, 0, 0, {}, _state_names(parameter), part.data_parallel_group)
                continue
            group, place = part.model_param_group_index_map[parameter]
            main = part.optimizer.param_groups[group]["params"][place]
            owned = part._get_model_param_range_map(parameter)["param"]
            owned = slice(owned.start, owned.end)
            if isinstance(part.optimizer, HybridDeviceOptimizer):  # fp32, on the host or on the device
                main = part.optimizer.param_to_inner_param[main]
                (state,) = (inner.state[main] for inner in _inner(part) if main in inner.state)
                yield _slot(parameter, main, state, owned, part.data_parallel_group)
            elif part.config.use_precision_aware_optimizer:
                yield _slot_of_copies(part, parameter, owned)
            else:
                yield _slot(parameter, main, part.optimizer.state[main], owned, part.data_parallel_group)


def _slot_of_copies(part: DistributedOptimizer, parameter: torch.nn.Parameter, owned: slice) -> Slot:
    """Return the slot of Transformer Engine's Adam with bf16 moments, which also holds the main weights."""
    state: dict[str, Tensor] = part._get_main_param_and_optimizer_states(parameter)
    tensors = {"exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"], "main": state["param"]}

    def write_back() -> None:
        moments = {name: tensors[name] for name in ("exp_avg", "exp_avg_sq")}
        part._set_main_param_and_optimizer_states(parameter, {"param": tensors["main"], **moments})

    names, group = _state_names(parameter), part.data_parallel_group
    return Slot(parameter, owned.start, owned.stop, tensors, names, group, write_back)


def _slot(
    model: Any, main: Tensor, state: dict[str, Tensor], owned: slice, group: dist.ProcessGroup | None
) -> Slot:
    names = _state_names(model)
    tensors = {name: main.data if name == "main" else state[name] for name in names}
    return Slot(model, owned.start, owned.stop, tensors, names, group)


def _state_names(model: Tensor) -> tuple[str, ...]:
    return ("exp_avg", "exp_avg_sq") if model.dtype is torch.float32 else ("exp_avg", "exp_avg_sq", "main")


def _create_moments(part: Any) -> None:
    """Create zero moments where the optimizer has none yet."""
    if isinstance(part.optimizer, HybridDeviceOptimizer):
        for inner in _inner(part):
            for main in _parameters_without_state(inner):
                inner.state[main] = {"exp_avg": torch.zeros_like(main), "exp_avg_sq": torch.zeros_like(main)}
    elif part.config.use_precision_aware_optimizer:
        # part.init_state_fn omits the second argument, which Transformer Engine 2.9 to 2.11 require
        for main in _parameters_without_state(part.optimizer):
            part.optimizer.initialize_state(main, store_param_remainders=False)
    else:
        part.init_state_fn(part.optimizer, part.config)


def _parameters_without_state(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    parameters = [main for group in optimizer.param_groups for main in group["params"]]
    return [main for main in parameters if not optimizer.state[main]]


def _parts(optimizer: MegatronOptimizer) -> list[Any]:
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def _inner(part: Any) -> list[torch.optim.Optimizer]:
    """Return the torch optimizers of a part: several if some of the parameters are updated on the host."""
    return getattr(part.optimizer, "sub_optimizers", [part.optimizer])


def _set_update_count(optimizer: MegatronOptimizer, updates: int) -> None:
    """Set the number of updates that Adam's bias correction uses.

    torch stores it for each parameter, Transformer Engine and apex once for each parameter group.
    """
    for part in _parts(optimizer):
        if part.is_stub_optimizer:
            continue
        for inner in _inner(part):
            for group in inner.param_groups:
                if isinstance(inner, torch.optim.Optimizer) and inner.__module__.startswith("torch."):
                    for parameter in group["params"]:
                        inner.state[parameter]["step"] = torch.tensor(float(updates))
                else:
                    group["step"] = updates


@dataclass(frozen=True)
class _Writer:
    """The rank that writes a parameter.

    Attributes:
        index: its rank in the parameter's data-parallel group; None if another group writes the parameter.
        mine: whether it is this rank.
        expert: whether the parameter is one of an expert.
    """

    index: int | None
    mine: bool
    expert: bool


def _spread_over_replicas(sharded: list[Any], groups: ProcessGroupCollection) -> dict[int, _Writer]:
    """Let each parameter be written by one of its data-parallel replicas, with about the same bytes on each.

    Without it, the first replica of everything would write, so the first node would write all experts. The
    last number of Megatron's ``replica_id`` is the rank in the parameter's data-parallel group. All ranks of
    a group have parameters of the same shapes in the same order, and so come to the same choice.

    Returns:
        The writers by the id of the parameter.
    """
    writers: dict[int, _Writer] = {}
    written: dict[bool, list[int]] = {False: [0] * groups.dp_cp.size(), True: [0] * groups.expt_dp.size()}
    for each in sorted(sharded, key=lambda each: -each.data.numel()):
        expert = not getattr(each.data, "allreduce", True)  # Megatron's mark
        loads = written[expert]
        index = loads.index(min(loads))
        loads[index] += each.data.numel()
        *others, replica = each.replica_id
        each.replica_id = (*others, (replica - index) % len(loads))
        main = is_main_replica((*others, 0))
        mine = is_main_replica(each.replica_id)
        writers[id(each.data)] = _Writer(index if main else None, mine, expert)
    return writers


_Item = tuple[str, str, Slot, _Writer]
"""A tensor to write: its key in the sharded state dict and in its slot, the slot, and who writes it."""


def _in_rounds(slots: list[tuple[Slot, _Writer]]) -> list[list[_Item]]:
    """Order the optimizer's tensors so that the ranks of a data-parallel group write at the same time.

    A round has one tensor for each of them, of about the same size. Each rank takes part in the sums of a
    round, then writes its tensor; in another order it would wait while the other ranks write theirs.
    """
    queues: dict[tuple[bool, int], list[_Item]] = {}
    numbered = [(i, slot, writer) for i, (slot, writer) in enumerate(slots)]
    for i, slot, writer in sorted(numbered, key=lambda item: -item[1].parameter.numel()):
        if writer.index is not None:
            queue = queues.setdefault((writer.expert, writer.index), [])
            queue += [(f"{name}.{i}", name, slot, writer) for name in slot.names]
    rounds: list[list[_Item]] = []
    for expert in (False, True):  # their groups differ
        members = [queues[key] for key in sorted(queues) if key[0] == expert]
        rounds += [[item for item in items if item] for items in itertools.zip_longest(*members)]
    return rounds


def _gather(rounds: list[list[_Item]]) -> Iterator[Tensor]:
    """Yield the tensors that this rank writes, in the parameter's full shape."""
    for items in rounds:
        mine = None
        for _, name, slot, writer in items:
            full = _gathered(slot, name, writer)
            if writer.mine:
                mine = full.view(slot.parameter.shape)
        if mine is not None:
            yield mine


def _gathered(slot: Slot, name: str, writer: _Writer) -> Tensor:
    """Return a flat tensor, which is complete on its writer: the sum over the ranks that share the slot."""
    flat = torch.zeros(slot.parameter.numel(), device=slot.parameter.device)
    if slot.tensors:
        flat[slot.start : slot.stop] = slot.tensors[name].view(-1)
    if slot.group is not None and slot.group.size() > 1:
        dist.reduce(flat, group=slot.group, group_dst=writer.index)
    return flat


def _sharded_weights(chunks: list[torch.nn.Module], groups: ProcessGroupCollection) -> dict[str, Any]:
    return {
        f"model{i}": unwrapped(chunk).sharded_state_dict(metadata={"dp_cp_group": groups.dp_cp})
        for i, chunk in enumerate(chunks)
    }


def _sharded_optimizer(
    slots: list[Slot],
    by_parameter: dict[int, ShardedTensor | ShardedTensorFactory],
    states: list[dict[str, Tensor]],
) -> dict[str, Any]:
    return {
        f"{name}.{i}": make_sharded_optimizer_tensor(
            by_parameter[id(slot.parameter)], tensor, f"optimizer.{name}"
        )
        for i, (slot, state) in enumerate(zip(slots, states, strict=True))
        for name, tensor in state.items()
    }


def _by_parameter(weights: dict[str, Any]) -> dict[int, ShardedTensor | ShardedTensorFactory]:
    return {id(sharded.data): sharded for chunk in weights.values() for sharded in _leaves(chunk)}


def _leaves(tree: dict[str, Any]) -> Iterator[ShardedTensor | ShardedTensorFactory]:
    for value in tree.values():
        if isinstance(value, dict):
            yield from _leaves(value)
        elif isinstance(value, ShardedTensor | ShardedTensorFactory):
            yield value


def _fill(chunks: list[torch.nn.Module], loaded: dict[str, Any]) -> None:
    for i, chunk in enumerate(chunks):
        unwrapped(chunk).load_state_dict(loaded[f"model{i}"])
