"""The whole RL state on disk: model and optimizer with Megatron's dist_checkpointing, the rest as JSON and safetensors.

A run folder holds, with Megatron-LM's names::

    latest_checkpointed_iteration.txt
    hf/                                                  config.json, generation config, tokenizer, chat template of the model
    iter_0000010/
      common.pt, metadata.json, .metadata, __*.distcp    model weights under GPTModel's keys; optimizer under "optimizer.*" keys
      state.json                                         step, prompt cursor, schedule, config, model identity
      random/rank_00000.safetensors                      random-number states of a rank

A checkpoint is written beside its place, synced, and renamed into it; the text file changes last. A kill at any moment leaves the
older ones as they were.

The optimizer is stored by parameter, not by optimizer shard: fp32 main weights and both Adam moments, each with the parameter's own key
and global shape. That loads in any layout, also with another expert-parallel size, and with or without the distributed optimizer, where
Megatron's own optimizer state dicts do not (optimizer.py:ChainedOptimizer, distrib_optimizer.py).
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist
import torch.distributed._shard.sharded_tensor.api as sharded_tensor
import torch.distributed._shard.sharding_spec.api as sharding_spec
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, is_main_replica
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.dist_checkpointing.utils import force_all_tensors_to_non_fp8
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import FP32Optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch import Tensor

from ..distributed import barrier, rank
from ..errors import InputError
from ..weights.companions import copy_companions
from ..weights.parameters import unwrapped
from ..weights.torch_dist import LATEST

_IDENTITY = [
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "n_routed_experts",
    "n_shared_experts",
    "first_k_dense_replace",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "tie_word_embeddings",
]


class Trainable(Protocol):
    """What a checkpoint saves: see ``policy.build.TrainableModel``."""

    @property
    def chunks(self) -> list[torch.nn.Module]: ...
    @property
    def optimizer(self) -> MegatronOptimizer: ...
    @property
    def scheduler(self) -> OptimizerParamScheduler: ...


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The newest whole checkpoint of a run folder, or None.

    Raises:
        InputError: the folder names a checkpoint that is not there.
    """
    pointer = run_dir / LATEST
    if not pointer.is_file():
        return None
    checkpoint = run_dir / f"iter_{int(pointer.read_text()):07d}"
    if not (checkpoint / "state.json").is_file():
        raise InputError(
            f"{pointer} names {checkpoint.name}, which is not there or not whole: write an older iteration into it"
        )
    return checkpoint


def checkpoint_before(run_dir: Path, step: int) -> Path | None:
    """The newest whole checkpoint of a run folder that was written before ``step``, or None."""
    whole = [folder for folder in run_dir.glob("iter_*") if (folder / "state.json").is_file()]
    return max((folder for folder in whole if read_state(folder)["step"] < step), default=None)


def go_back(checkpoint: Path, state: dict[str, Any]) -> None:
    """Makes a checkpoint the newest one of its run folder, with another JSON state, and removes the later ones (collective)."""
    if rank() == 0:
        run_dir, whole = checkpoint.parent, read_state(checkpoint) | state
        _write_aside(checkpoint / "state.json", json.dumps(whole, indent=1))
        _write_aside(run_dir / LATEST, str(whole["step"]))
        for folder in run_dir.glob("iter_*"):
            if folder.name > checkpoint.name:
                _remove(folder)
    barrier()


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The JSON state given to ``save``, with ``step``."""
    return json.loads((checkpoint / "state.json").read_text())


def model_identity(hf: Any, dtype: str) -> dict[str, Any]:
    """The fields of a Hugging Face config that say which weights fit, and the precision they are held in."""
    return {**{field: getattr(hf, field, None) for field in _IDENTITY}, "dtype": dtype}


def size_of(num_parameters: int, dtype: torch.dtype) -> int:
    """Bytes of a checkpoint: weights, both Adam moments in fp32 and, below fp32, fp32 main weights."""
    return num_parameters * (3 * 4 if dtype is torch.float32 else dtype.itemsize + 3 * 4)


def check_model(checkpoint: Path, identity: dict[str, Any]) -> None:
    """Refuses a checkpoint of another model.

    Raises:
        InputError: naming the first field that differs.
    """
    saved = read_state(checkpoint)["model"]
    for field, value in identity.items():
        if saved.get(field) != value:
            raise InputError(
                f"{checkpoint} is of another model ({field} = {saved.get(field)!r}, this run's is {value!r}): choose another run_dir"
            )


def save(
    run_dir: Path,
    step: int,
    trainable: Trainable,
    state: dict[str, Any],
    groups: ProcessGroupCollection,
    keep_last: int,
    hf: Path,
) -> Path:
    """Writes the checkpoint of ``step`` (collective), then removes the older ones but for ``keep_last`` in all.

    Args:
        run_dir: holds ``iter_*`` folders; the same on every rank.
        state: JSON-able; comes back from ``load``.
        hf: the model's Hugging Face folder, whose config and tokenizer go beside the checkpoints with the first of them.

    Returns:
        The new checkpoint folder.
    """
    final = run_dir / f"iter_{step:07d}"
    partial = run_dir / f".partial_{final.name}"
    if dist.get_rank() == 0:
        for stale in run_dir.glob(".partial_iter_*"):  # of a save that was killed
            shutil.rmtree(stale, ignore_errors=True)
        partial.mkdir(parents=True)
        _save_companions(hf, run_dir)
    dist.barrier()

    tensors = _sharded_tensors(trainable, groups)
    _set_update_count(
        trainable.optimizer, trainable.scheduler.num_steps
    )  # a save before the first update has just made the moments
    force_all_tensors_to_non_fp8(tensors)
    with _shards_unchecked():
        dist_checkpointing.save(tensors, str(partial))
    (partial / "random").mkdir(exist_ok=True)
    safetensors.torch.save_file(
        _random_states(), partial / "random" / f"rank_{dist.get_rank():05d}.safetensors"
    )
    dist.barrier()

    if dist.get_rank() == 0:
        whole = {
            "step": step,
            "world_size": dist.get_world_size(),
            "scheduler": trainable.scheduler.state_dict(),
            **state,
        }
        (partial / "state.json").write_text(json.dumps(whole, indent=1))
        sync(partial)
        if final.exists():  # left by a kill before the text file changed
            _remove(final)
        partial.rename(final)
        _write_aside(run_dir / LATEST, str(step))
        # a later one, left by such a kill in a run that then went on from an older one, must not push this one out
        up_to_this = sorted(folder for folder in run_dir.glob("iter_*") if folder.name <= final.name)
        for old in up_to_this[:-keep_last]:
            _remove(old)
    dist.barrier()
    return final


@contextmanager
def _shards_unchecked() -> Iterator[None]:
    """Without torch's search for overlaps, which compares all pieces of a tensor with each other: layers x experts x 2 of them, 12,288
    in Qwen3-30B-A3B. It took 0.8 s for 3,072 and 2.8 s for 6,144, and comes eight times a save. Megatron looks for overlaps itself when
    it saves (dist_checkpointing/validation.py).
    """
    modules: tuple[Any, ...] = (sharding_spec, sharded_tensor)
    check = sharding_spec.validate_non_overlapping_shards_metadata
    for module in modules:
        module.validate_non_overlapping_shards_metadata = lambda shards: None
    try:
        yield
    finally:
        for module in modules:
            module.validate_non_overlapping_shards_metadata = check


def _remove(checkpoint: Path) -> None:
    (checkpoint / "state.json").unlink(missing_ok=True)  # first: a kill must not leave what looks whole
    shutil.rmtree(checkpoint)


def _save_companions(hf: Path, run_dir: Path) -> None:
    if not (run_dir / "hf").exists():
        partial = run_dir / ".partial_hf"
        shutil.rmtree(partial, ignore_errors=True)  # of a save that was killed
        copy_companions(hf, partial)
        sync(partial)
        partial.rename(run_dir / "hf")


def load(checkpoint: Path, trainable: Trainable, groups: ProcessGroupCollection) -> dict[str, Any]:
    """Fills model, optimizer and schedule from a checkpoint of any layout (collective); random states too at equal world size.

    Returns:
        The ``state`` given to ``save``.
    """
    state = read_state(checkpoint)
    trainable.scheduler.num_steps = 0  # in a run that goes back, what it loads would be added to
    trainable.scheduler.load_state_dict(state["scheduler"])
    updates = trainable.scheduler.num_steps
    slots = list(_slots(trainable.optimizer))
    buffers = [{name: torch.empty(slot.parameter.shape) for name in slot.names} for slot in slots]
    tensors = _sharded_tensors(trainable, groups, buffers)
    with _shards_unchecked():
        loaded: Any = dist_checkpointing.load(tensors, str(checkpoint), validate_access_integrity=False)
    _fill(trainable.chunks, loaded)
    for i, slot in enumerate(slots):
        for name, tensor in slot.tensors.items():
            tensor.copy_(loaded["optimizer"][f"{name}.{i}"].view(-1)[slot.start : slot.stop].view_as(tensor))
        slot.put_back()
    if trainable.chunks[0].ddp_config.fp8_param_gather:  # pyright: ignore[reportAttributeAccessIssue]
        for part in _parts(trainable.optimizer):  # as an update makes them, not rounded twice
            part._copy_main_params_to_model_params()
        for chunk in trainable.chunks:
            chunk.start_param_sync()  # pyright: ignore[reportCallIssue]
    _set_update_count(trainable.optimizer, updates)
    if state["world_size"] == dist.get_world_size():
        _restore_random_states(checkpoint / "random" / f"rank_{dist.get_rank():05d}.safetensors")
    return state


def load_weights(checkpoint: Path, chunks: list[torch.nn.Module], groups: ProcessGroupCollection) -> None:
    """Fills the model from a checkpoint of any layout (collective); the optimizer's part is not read."""
    with _shards_unchecked():
        _fill(
            chunks,
            dist_checkpointing.load(
                _sharded_model(chunks, groups), str(checkpoint), validate_access_integrity=False
            ),
        )


def _fill(chunks: list[torch.nn.Module], loaded: Any) -> None:
    for i, chunk in enumerate(chunks):
        unwrapped(chunk).load_state_dict(loaded[f"model{i}"])


@dataclass(frozen=True)
class _Slot:
    """The optimizer's view of one model parameter on this rank.

    Attributes:
        parameter: the model's parameter, whole as far as model parallelism goes.
        start, stop: the part of the flattened parameter whose state this rank holds; empty for a rank that holds none.
        tensors: exp_avg, exp_avg_sq and, for a bf16 model, the fp32 main weights, of stop - start elements; live ones, or copies of what
            the optimizer holds in another precision.
        names: keys of ``tensors`` on the ranks that hold some.
        group: ranks among which the state is spread, or None when each holds all of it.
        put_back: gives the optimizer the values of ``tensors``, where those are copies.
    """

    parameter: torch.nn.Parameter
    start: int
    stop: int
    tensors: dict[str, Tensor]
    names: tuple[str, ...]
    group: dist.ProcessGroup | None
    put_back: Callable[[], None] = lambda: None


def _slots(optimizer: MegatronOptimizer) -> Iterator[_Slot]:
    for part in _parts(optimizer):
        if part.is_stub_optimizer:
            continue
        _make_state(part)
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


def _distributed_slots(part: DistributedOptimizer) -> Iterator[_Slot]:
    for buffer in part.buffers:
        for parameter in buffer.params:
            if parameter not in part.model_param_gbuf_map:  # another data-parallel rank's
                yield _Slot(parameter, 0, 0, {}, _state_names(parameter), part.data_parallel_group)
                continue
            group, place = part.model_param_group_index_map[parameter]
            main = part.optimizer.param_groups[group]["params"][place]
            owned = part._get_model_param_range_map(parameter)["param"]
            owned = slice(owned.start, owned.end)
            if isinstance(part.optimizer, HybridDeviceOptimizer):  # on the host or the device, in fp32
                main = part.optimizer.param_to_inner_param[main]
                (state,) = (inner.state[main] for inner in _inner(part) if main in inner.state)
                yield _slot(parameter, main, state, owned, part.data_parallel_group)
            elif part.config.use_precision_aware_optimizer:
                yield _slot_of_copies(part, parameter, owned)
            else:
                yield _slot(parameter, main, part.optimizer.state[main], owned, part.data_parallel_group)


def _slot_of_copies(part: DistributedOptimizer, parameter: torch.nn.Parameter, owned: slice) -> _Slot:
    """Of Transformer Engine's Adam with moments below fp32, which also holds the main weights."""
    state: dict[str, Tensor] = part._get_main_param_and_optimizer_states(parameter)
    tensors = {"exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"], "main": state["param"]}

    def put_back() -> None:
        moments = {name: tensors[name] for name in ("exp_avg", "exp_avg_sq")}
        part._set_main_param_and_optimizer_states(parameter, {"param": tensors["main"], **moments})

    return _Slot(
        parameter,
        owned.start,
        owned.stop,
        tensors,
        _state_names(parameter),
        part.data_parallel_group,
        put_back,
    )


def _make_state(part: Any) -> None:
    """Moments of 0 where an optimizer has made none yet."""
    if isinstance(part.optimizer, HybridDeviceOptimizer):
        for inner in _inner(part):
            for main in (
                main for group in inner.param_groups for main in group["params"] if not inner.state[main]
            ):
                inner.state[main] = {"exp_avg": torch.zeros_like(main), "exp_avg_sq": torch.zeros_like(main)}
    elif part.config.use_precision_aware_optimizer:
        # not its init_state_fn, which calls this without the second argument that Transformer Engine 2.9 to 2.11 want
        for main in (
            main
            for group in part.optimizer.param_groups
            for main in group["params"]
            if not part.optimizer.state[main]
        ):
            part.optimizer.initialize_state(main, store_param_remainders=False)
    else:
        part.init_state_fn(part.optimizer, part.config)


def _inner(part: Any) -> list[torch.optim.Optimizer]:
    """The optimizers that do the work: several where a share of it is on the host."""
    return getattr(part.optimizer, "sub_optimizers", [part.optimizer])


def _slot(
    model: Any, main: Tensor, state: dict[str, Tensor], owned: slice, group: dist.ProcessGroup | None
) -> _Slot:
    names = _state_names(model)
    tensors = {name: main.data if name == "main" else state[name] for name in names}
    return _Slot(model, owned.start, owned.stop, tensors, names, group)


def _state_names(model: Tensor) -> tuple[str, ...]:
    return ("exp_avg", "exp_avg_sq") if model.dtype is torch.float32 else ("exp_avg", "exp_avg_sq", "main")


def _parts(optimizer: MegatronOptimizer) -> list[Any]:
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def _full_state(slots: list[_Slot], written: list[bool]) -> list[dict[str, Tensor]]:
    """For each slot its tensors in the parameter's full shape (fp32), put together from the ranks that share them; where this rank does
    not write them, the shape alone."""
    full: list[dict[str, Tensor]] = []
    for slot, kept in zip(slots, written, strict=True):
        whole: dict[str, Tensor] = {}
        for name in slot.names:
            flat = torch.zeros(slot.parameter.numel(), device=slot.parameter.device)
            if slot.tensors:
                flat[slot.start : slot.stop] = slot.tensors[name].view(-1)
            if slot.group is not None and slot.group.size() > 1:
                dist.all_reduce(flat, group=slot.group)
            whole[name] = (
                flat.view(slot.parameter.shape).cpu()
                if kept
                else torch.zeros(()).expand(slot.parameter.shape)
            )
        full.append(whole)
    return full


def _sharded_tensors(
    trainable: Trainable,
    groups: ProcessGroupCollection,
    optimizer_state: list[dict[str, Tensor]] | None = None,
) -> dict[str, Any]:
    """The sharded state dict of model and optimizer; its tensors are saved, or say what to load."""
    model = _sharded_model(trainable.chunks, groups)
    by_parameter = {id(sharded.data): sharded for chunk in model.values() for sharded in _sharded(chunk)}
    slots = list(_slots(trainable.optimizer))
    optimizer: dict[str, Any] = {}
    written = [is_main_replica(by_parameter[id(slot.parameter)].replica_id) for slot in slots]
    for i, (slot, state) in enumerate(
        zip(slots, optimizer_state or _full_state(slots, written), strict=True)
    ):
        for name, tensor in state.items():
            optimizer[f"{name}.{i}"] = make_sharded_optimizer_tensor(
                by_parameter[id(slot.parameter)], tensor, f"optimizer.{name}"
            )
    return {**model, "optimizer": optimizer}


def _sharded_model(chunks: list[torch.nn.Module], groups: ProcessGroupCollection) -> dict[str, Any]:
    return {
        f"model{i}": unwrapped(chunk).sharded_state_dict(metadata={"dp_cp_group": groups.dp_cp})
        for i, chunk in enumerate(chunks)
    }


def _sharded(tree: Any) -> Iterator[ShardedTensor | ShardedTensorFactory]:
    for value in tree.values():
        if isinstance(value, dict):
            yield from _sharded(value)
        elif isinstance(value, ShardedTensor | ShardedTensorFactory):
            yield value


def _set_update_count(optimizer: MegatronOptimizer, updates: int) -> None:
    """Adam's bias correction counts updates: torch keeps the count beside each moment, Transformer Engine and apex in the group."""
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


def _random_states() -> dict[str, Tensor]:
    python = np.array(random.getstate()[1], dtype=np.uint64)
    _, keys, position, *_ = np.random.get_state()
    states = {
        "python": torch.from_numpy(python.view(np.uint8).copy()),
        "numpy": torch.from_numpy(np.append(keys, position).astype(np.int64)),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    tracker: Any = get_cuda_rng_tracker()
    return states | {f"megatron.{name}": state.clone() for name, state in tracker.get_states().items()}


def _restore_random_states(file: Path) -> None:
    states = safetensors.torch.load_file(file)
    random.setstate((3, tuple(int(x) for x in states["python"].numpy().view(np.uint64)), None))
    *keys, position = states["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, 0, 0.0))
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    tracker: Any = get_cuda_rng_tracker()
    tracker.set_states(
        {
            name.removeprefix("megatron."): state
            for name, state in states.items()
            if name.startswith("megatron.")
        }
    )


def _write_aside(path: Path, text: str) -> None:
    aside = path.with_name(f".partial_{path.name}")
    aside.write_text(text)
    sync(aside)
    aside.rename(path)


def sync(path: Path) -> None:
    """Flushes a file, or a folder with everything in it, to the disk."""
    for item in [path, *path.rglob("*")]:
        descriptor = os.open(item, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
