"""Checkpoints of a training run: tensors in Megatron's dist_checkpointing format, all other state in JSON.

A run's checkpoint folder has Megatron-LM's names::

    latest_checkpointed_iteration.txt                  step of the newest complete checkpoint
    hf/                                                config.json, tokenizer and chat template of the model
    iter_0000010/
      common.pt, metadata.json, .metadata, *.distcp    tensors: weights under GPTModel's keys, optimizer state
                                                       under "optimizer.*"
      state.json                                       step, prompt cursor, updates, config, model identity,
                                                       sizes and checksums of the other files and of itself
      random/rank_00000.safetensors                    random-number states of one rank

A checkpoint is written to ``.partial_iter_0000010``, flushed, and renamed. The text file is updated last. A
kill at any time leaves the older checkpoints intact. ``policy.optimizer_state`` makes the sharded tensors. No
code from a checkpoint runs (``weights.pickles``).
"""

from __future__ import annotations

import itertools
import json
import re
import time
from collections import deque
from collections.abc import Container, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._shard.sharded_tensor.api as sharded_tensor
import torch.distributed._shard.sharding_spec.api as sharding_spec
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.utils import force_all_tensors_to_non_fp8
from torch import Tensor

from . import files
from .distributed import agreed, all_gather_objects, rank, world_size
from .errors import DiskFullError, InputError, disk_full
from .supervision.records import LATEST, newest_step
from .weights.background_files import BackgroundFiles
from .weights.checksums import checksums_of
from .weights.companions import copy_companions
from .weights.pickles import plain_records_only
from .weights.random_states import random_file, random_states
from .weights.run_checkpoint import (
    checkpoint_path,
    read_state,
    step_of,
    stored_checkpoints,
    update_state,
    write_state,
)
from .weights.torch_dist_writer import Chunk, OpenFile, open_to_write, write_chunks, write_companions


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


def checkpoint_size(num_parameters: int, dtype: torch.dtype, frozen: int = 0) -> int:
    """Return the bytes of weights, Adam moments in fp32 and, if ``dtype`` is not fp32, fp32 main weights.

    Args:
        frozen: number of the parameters that are not trained; of these only the weights are saved.
    """
    trained = num_parameters - frozen
    return num_parameters * dtype.itemsize + trained * 4 * (2 if dtype is torch.float32 else 3)


class Save:
    """A save that ``start_save`` has started. ``ended``, ``seal`` and ``finish`` are collective.

    Attributes:
        step: step of the checkpoint.
        began: ``time.monotonic()`` at the start.
    """

    def __init__(
        self,
        final: Path,
        state: str,
        keep_last: int,
        continues: int | None,
        files: BackgroundFiles | None,
    ) -> None:
        self.step, self.began = step_of(final), time.monotonic()
        self._final, self._state, self._keep_last = final, state, keep_last
        self._continues, self._files = continues, files
        self._sealed = False

    def ended(self, *, wait: bool) -> bool:
        """Return whether all ranks have written their files: one small all-reduce.

        Args:
            wait: whether to wait for it.
        """
        if self._files is None:
            return True
        running = torch.tensor(int(not self._files.ended(wait=wait)))
        if world_size() > 1:
            dist.all_reduce(running, op=dist.ReduceOp.MAX)
        return not running

    def seal(self) -> None:
        """Write the state and the checksums of all files, and flush them. Call it when the save has ended.

        Raises:
            DiskFullError: the file system is full. The incomplete checkpoint is removed.
            OSError, RunError: another error of the process that writes, on this or another rank. Likewise.
        """
        partial = files.partial_path(self._final)
        with self.abandoned_after_an_error():
            with agreed(), _disk_full_errors(partial):
                mine = self._files.result() if self._files else {}
                mine |= checksums_of(partial, _files_of_this_rank(partial, but=mine))
            recorded = {name: about for part in all_gather_objects(mine) for name, about in part.items()}
            with agreed():
                if rank() == 0:
                    write_state(partial, json.loads(self._state) | {"files": recorded})
                    files.flush(partial)
        self._sealed = True

    def finish(self) -> Path:
        """Make the checkpoint the newest and remove those that are not kept. Call it when the save has ended.

        Returns:
            The new checkpoint.

        Raises:
            DiskFullError, OSError, RunError: see ``seal``, which it calls unless it was called.
        """
        if not self._sealed:
            self.seal()
        final, partial = self._final, files.partial_path(self._final)
        with self.abandoned_after_an_error(), agreed():
            if rank() == 0:
                if final.exists():  # a kill before the update of the text file leaves it
                    files.remove(final)
                files.rename(partial, final)
        with agreed():
            if rank() == 0:
                # such a kill, a fall back and a killed rollback leave later checkpoints that must not count
                before = newest_step(final.parent) or 0 if self._continues is None else self._continues
                _remove_after(final.parent, before, keep=final)
                files.write(final.parent / LATEST, str(self.step))
                for old in reversed(stored_checkpoints(final.parent)[self._keep_last :]):
                    files.remove(old, background=True)  # hundreds of GB may take minutes
        return final

    def abandon(self) -> None:
        """End this rank's writing; rank 0 removes the incomplete checkpoint. Not collective."""
        if self._files:
            self._files.cancel()
        if rank() == 0:
            files.clear(files.partial_path(self._final))

    @contextmanager
    def abandoned_after_an_error(self) -> Iterator[None]:
        """Call ``abandon`` if the block raises."""
        try:
            yield
        except BaseException:
            self.abandon()
            raise


def start_save(
    folder: Path,
    step: int,
    tensors: dict[str, Any],
    gathered: Iterator[Tensor],
    state: dict[str, Any],
    keep_last: int,
    hf: Path,
    continues: int | None = None,
    *,
    background: bool = False,
) -> Save:
    """Write the files of the checkpoint of ``step``; ``Save.finish`` completes it. Collective.

    Args:
        folder: folder of the ``iter_*`` folders, the same on every rank.
        tensors: a sharded state dict; see ``policy.optimizer_state.tensors_to_save``, also for ``gathered``.
        state: the JSON-serializable fields of ``RunState`` that are not known here.
        keep_last: number of checkpoints that stay, with the new one.
        hf: the model's Hugging Face folder, whose config and tokenizer are copied with the first checkpoint.
        continues: step of the checkpoint that the training continues; None means the one that
            ``latest_checkpointed_iteration.txt`` names. Other checkpoints after it are removed too.
        background: copy the files to memory only, and let a process of each rank write them.

    Raises:
        DiskFullError: the file system is full. The incomplete checkpoint is removed.
    """
    final = checkpoint_path(folder, step)
    partial = files.partial_path(final)
    written = BackgroundFiles(partial) if background else None
    # as text, because training goes on with the objects in it
    content = json.dumps({"step": step, "world_size": world_size(), **state})
    save = Save(final, content, keep_last, continues, written)
    with save.abandoned_after_an_error():
        with agreed():
            if rank() == 0:
                clear_unfinished(folder)
                _save_companions(hf, folder)
                (partial / "random").mkdir(parents=True)
        open_file = written.open if written else open_to_write
        with _disk_full_errors(partial):
            _write_tensors(partial, tensors, gathered, open_file)
        with agreed(), _disk_full_errors(partial):
            with open_file(random_file(partial)) as file:
                file.write(random_states())
            if written:
                written.start()
    return save


def _write_tensors(
    partial: Path,
    tensors: dict[str, Any],
    gathered: Iterator[Tensor],
    open_file: OpenFile,
) -> None:
    """Write what this rank's main replicas hold, and then what ``gathered`` yields."""
    force_all_tensors_to_non_fp8(tensors)
    # Megatron's check would gather the metadata of all ranks; write_chunks checks what is written
    sharded, _ = save_preprocess(tensors, validate_access_integrity=False)
    written = [leaf for leaf in nested_values(sharded) if is_main_replica(leaf.replica_id)]
    objects = {leaf.unique_key: leaf.data for leaf in written if isinstance(leaf, ShardedObject)}
    shards: list[Any] = [leaf for leaf in written if isinstance(leaf, ShardedTensor)]
    present = [shard for shard in shards if not shard.data.is_meta]
    promised = [shard for shard in shards if shard.data.is_meta]
    write_chunks(
        partial,
        [_chunk(shard) for shard in (*present, *promised)],
        _contents(present, promised, gathered),
        objects,
        open_file,
        finish=lambda: deque(gathered, maxlen=0),  # other ranks may wait for this one
    )
    with agreed():
        if rank() == 0:
            write_companions(partial, {})


def _contents(present: list[Any], promised: list[Any], gathered: Iterator[Tensor]) -> Iterator[Tensor]:
    """Yield the content of each shard. A promised one is a view of the next tensor that is gathered."""
    yield from (shard.data for shard in present)
    for _, parts in itertools.groupby(promised, key=lambda shard: shard.data.untyped_storage()._cdata):
        whole = next(gathered)
        for part in parts:
            view = part.data
            yield whole.as_strided(view.size(), view.stride(), view.storage_offset())


def _chunk(shard: Any) -> Chunk:
    sizes = (*[1] * shard.prepend_axis_num, *shard.local_shape)
    return Chunk(shard.key, shard.global_shape, shard.global_offset, sizes, shard.dtype)


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


def _files_of_this_rank(checkpoint: Path, but: Container[str]) -> list[Path]:
    """Return the files that this rank has written, which its node still has in memory, except ``but``."""
    others = re.compile(r"__\d+_\d+\.distcp")
    mine = [random_file(checkpoint), *checkpoint.glob(f"__{rank()}_*.distcp")]
    if rank() == 0:
        mine += [path for path in checkpoint.iterdir() if path.is_file() and not others.fullmatch(path.name)]
    return [path for path in mine if str(path.relative_to(checkpoint)) not in but]


@contextmanager
def _disk_full_errors(folder: Path) -> Iterator[None]:
    """Raise ``DiskFullError``, which names ``folder``, for an ``OSError`` of a full file system."""
    try:
        yield
    except OSError as error:
        if disk_full(error):
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
    for 6,144 pieces. ``write_chunks`` checks the pieces when they are written.
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
