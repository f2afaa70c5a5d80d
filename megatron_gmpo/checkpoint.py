"""Checkpoints of a training run: tensors in Megatron's dist_checkpointing format, all other state in JSON.

A run's checkpoint folder has Megatron-LM's names::

    latest_checkpointed_iteration.txt                  step of the newest complete checkpoint
    hf/                                                config.json, tokenizer and chat template of the model
    iter_0000010/
      common.pt, metadata.json, .metadata, *.distcp    tensors: weights under GPTModel's keys, optimizer state
                                                       under "optimizer.*" (no common.pt from Megatron 0.19)
      state.json                                       step, prompt cursor, updates, config, model identity,
                                                       sizes and checksums of the other files and of itself
      random/rank_00000.safetensors                    random-number states of one rank

A checkpoint is written to ``.partial_iter_0000010``, flushed, and renamed. The text file is updated last. A
kill at any time leaves the older checkpoints intact. ``policy.optimizer_state`` makes the sharded tensors. No
code from a checkpoint runs (``weights.pickles``).
"""

from __future__ import annotations

import functools
import multiprocessing
import queue
import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import torch.distributed._shard.sharded_tensor.api as sharded_tensor
import torch.distributed._shard.sharding_spec.api as sharding_spec
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.utils import force_all_tensors_to_non_fp8
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from . import files
from .distributed import agreed, all_gather_objects, broadcast_object, folder_written_by_all, rank, world_size
from .errors import DiskFullError, InputError
from .supervision.records import LATEST, newest_step
from .supervision.signals import end_with_parent
from .weights.checksums import checksums_of
from .weights.companions import copy_companions
from .weights.pickles import plain_records_only
from .weights.run_checkpoint import (
    checkpoint_path,
    read_state,
    step_of,
    stored_checkpoints,
    update_state,
    write_state,
)
from .weights.torch_dist import is_disk_full

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


def model_identity(hf: Any, dtype: str) -> dict[str, Any]:
    """Return the fields of a Hugging Face config that determine the weights' shapes, and the dtype."""
    return {**{field: getattr(hf, field, None) for field in _IDENTITY}, "dtype": dtype}


def check_model(checkpoint: Path, identity: dict[str, Any]) -> None:
    """Check that a checkpoint belongs to the model with this ``model_identity``.

    Raises:
        InputError: a field differs; the message names the first such field.
    """
    saved = read_state(checkpoint).model
    for field, value in identity.items():
        if saved.get(field) != value:
            raise InputError(
                f"{checkpoint} is of another model ({field} = {saved.get(field)!r}, this run has {value!r}): "
                "choose another run_dir"
            )


def checkpoint_size(num_parameters: int, dtype: torch.dtype) -> int:
    """Return the bytes of weights, Adam moments in fp32 and, if ``dtype`` is not fp32, fp32 main weights."""
    return num_parameters * (3 * 4 if dtype is torch.float32 else dtype.itemsize + 3 * 4)


def save_checkpoint(
    folder: Path,
    step: int,
    tensors: dict[str, Any],
    state: dict[str, Any],
    keep_last: int,
    hf: Path,
    continues: int | None = None,
) -> Path:
    """Write the checkpoint of ``step``, then remove all except the newest ``keep_last``. Collective.

    Args:
        folder: folder of the ``iter_*`` folders, the same on every rank.
        tensors: a sharded state dict; see ``policy.optimizer_state.tensors_to_save``.
        state: the JSON-serializable fields of ``RunState`` that are not known here.
        hf: the model's Hugging Face folder, whose config and tokenizer are copied with the first checkpoint.
        continues: step of the checkpoint that the training continues; None means the one that
            ``latest_checkpointed_iteration.txt`` names. Other checkpoints after it are removed too.

    Returns:
        The new checkpoint.

    Raises:
        DiskFullError: the file system is full. The incomplete checkpoint is removed.
    """
    with agreed():
        if rank() == 0:
            clear_unfinished(folder)
            _save_companions(hf, folder)
    force_all_tensors_to_non_fp8(tensors)
    final = checkpoint_path(folder, step)
    with folder_written_by_all(final) as partial:
        with _overlap_check_off(), _disk_full_errors(partial):
            dist_checkpointing.save(tensors, str(partial))
        with agreed():
            (partial / "random").mkdir(exist_ok=True)
            files.write(_random_file(partial), safetensors.torch.save(_random_states()))
            mine = checksums_of(partial, _files_of_this_rank(partial))
        recorded = {name: about for part in all_gather_objects(mine) for name, about in part.items()}
        with agreed():
            if rank() == 0:
                write_state(partial, {"step": step, "world_size": world_size(), **state, "files": recorded})
                if final.exists():  # a kill before the update of the text file leaves it
                    files.remove(final)
    with agreed():
        if rank() == 0:
            # such a kill, a fall back and a killed rollback leave later checkpoints that must not count
            before = newest_step(folder) or 0 if continues is None else continues
            _remove_after(folder, before, keep=final)
            files.write(folder / LATEST, str(step))
            for old in reversed(stored_checkpoints(folder)[keep_last:]):
                files.remove(old)
    return final


def clear_unfinished(folder: Path) -> None:
    """Remove what a killed save has left."""
    for stale in folder.glob(".partial_*"):
        files.clear(stale)


def room_to_save(folder: Path, keep_last: int, saves: int) -> tuple[int, str]:
    """Return how many more checkpoints the folder will hold at once, and a phrase that states why.

    A new checkpoint is complete before the oldest is removed.

    Args:
        saves: number of saves that are left in the run.
    """
    existing = len(stored_checkpoints(folder))
    most = max(existing + 1, min(existing + saves, keep_last + 1))  # a run that is stopped also saves
    return most - existing, f"checkpoint.keep_last = {keep_last} needs room for {most}, {existing} exist"


def go_back(checkpoint: Path, state: dict[str, Any]) -> None:
    """Update a checkpoint's JSON state, make it the newest, and remove later checkpoints. Collective."""
    with agreed():
        if rank() == 0:
            folder, step = checkpoint.parent, step_of(checkpoint)
            update_state(checkpoint, state)
            files.write(folder / LATEST, str(step))
            _remove_after(folder, step, keep=checkpoint)


def load_tensors(checkpoint: Path, tensors: dict[str, Any]) -> dict[str, Any]:
    """Return the tensors that the sharded state dict ``tensors`` describes, from any layout. Collective.

    Raises:
        InputError: a file is damaged or asks for code, see ``plain_records_only``.
    """
    with _overlap_check_off(), plain_records_only(checkpoint):
        loaded: Any = dist_checkpointing.load(tensors, str(checkpoint), validate_access_integrity=False)
    return loaded


def restore_random_states(checkpoint: Path) -> None:
    """Restore this rank's random-number states if the checkpoint has the current number of ranks.

    Raises:
        InputError: its file is missing or damaged.
    """
    if read_state(checkpoint).world_size != world_size():
        return
    try:
        states = safetensors.torch.load_file(_random_file(checkpoint))
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{_random_file(checkpoint)} cannot be read ({error}): use another checkpoint"
        ) from None
    random.setstate((3, tuple(int(x) for x in states["python"].numpy().view(np.uint64)), None))
    *keys, position = states["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, 0, 0.0))
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    prefix = "megatron."
    tracked = {name: value for name, value in states.items() if name.startswith(prefix)}
    tracker: Any = get_cuda_rng_tracker()
    tracker.set_states({name.removeprefix(prefix): value for name, value in tracked.items()})


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


def _random_file(checkpoint: Path) -> Path:
    return checkpoint / "random" / f"rank_{rank():05d}.safetensors"


def _files_of_this_rank(checkpoint: Path) -> list[Path]:
    """Return the files that this rank has written, which its node still has in memory."""
    others = re.compile(r"__\d+_\d+\.distcp")
    mine = [_random_file(checkpoint), *checkpoint.glob(f"__{rank()}_*.distcp")]
    if rank() == 0:
        mine += [path for path in checkpoint.iterdir() if path.is_file() and not others.fullmatch(path.name)]
    return mine


def _write_as_child_of_the_rank() -> None:
    """Let Megatron's writers end with the rank that forks them, and start no server for their results.

    A save is synchronous, so a queue in this process can hold the results. Without one, Megatron starts a
    process of about 200 MB that outlives a killed rank (filesystem_async.py).
    """
    writers: Any = filesystem_async.FileSystemWriterAsync
    write = writers.write_preloaded_data

    @functools.wraps(write)
    def write_until_the_rank_ends(*args: Any, **kwargs: Any) -> Any:
        if multiprocessing.parent_process():  # Megatron 0.19 writes in threads of the rank
            end_with_parent()
        return write(*args, **kwargs)

    writers.write_preloaded_data = staticmethod(write_until_the_rank_ends)
    filesystem_async._results_queue = queue.Queue()


_write_as_child_of_the_rank()


@contextmanager
def _disk_full_errors(folder: Path) -> Iterator[None]:
    """Raise ``DiskFullError`` for Megatron's errors of a full file system, on every rank that has one."""
    try:
        yield
    except CheckpointException as error:  # on every rank, after a collective; rank 0 has the failures of all
        if broadcast_object(any(is_disk_full(cause) for cause, _ in error.failures.values())):
            raise DiskFullError(folder) from None
        raise
    except (RuntimeError, OSError) as error:  # of common.pt, metadata.json or .metadata, which rank 0 writes
        if is_disk_full(error):
            raise DiskFullError(folder) from None
        raise


def _remove_after(folder: Path, step: int, *, keep: Path) -> None:
    for found in stored_checkpoints(folder):
        if step_of(found) > step and found != keep:
            files.remove(found)


def _save_companions(hf: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / LATEST).exists():
        files.write(folder / LATEST, "0")  # tells a kill during the first save from a lost file
    if not (folder / "hf").exists():
        with files.written_aside(folder / "hf") as partial:
            copy_companions(hf, partial)


@contextmanager
def _overlap_check_off() -> Iterator[None]:
    """Disable torch's check for overlapping shards, which compares all pieces of a tensor with each other.

    Qwen3-30B-A3B has layers x experts x 2 = 12,288 pieces. The check took 0.8 s for 3,072 pieces and 2.8 s
    for 6,144 pieces, and a save runs it eight times. Megatron checks for overlaps when it saves
    (dist_checkpointing/validation.py).
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
