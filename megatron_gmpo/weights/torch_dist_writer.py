"""Write the files of Megatron-Core's ``torch_dist`` format, one tensor in memory at a time.

Megatron's own writer (dist_checkpointing/strategies/filesystem_async.py) copies all tensors of a rank to the
host before it writes the first, and forks processes that write them. torch.distributed.checkpoint makes the
plan and ``.metadata`` here, as in Megatron, and Megatron loads the result.
"""

from __future__ import annotations

import errno
import io
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import _write_item
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from .. import files
from ..errors import disk_full

OpenFile = Callable[[Path], AbstractContextManager[io.BufferedWriter]]
"""Opens a new file to write, by its path in the checkpoint."""


@dataclass(frozen=True)
class Chunk:
    """A part of a stored tensor, which one rank writes.

    Attributes:
        key: key of the stored tensor.
        shape: shape of the stored tensor.
        offsets: place of the part in the stored tensor.
        sizes: shape of the part.
        dtype: dtype of both.
    """

    key: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    dtype: torch.dtype


def write_chunks(
    folder: Path,
    chunks: Sequence[Chunk],
    tensors: Iterator[Tensor],
    objects: Mapping[str, Any],
    open_file: OpenFile | None = None,
    finish: Callable[[], object] = lambda: None,
) -> None:
    """Write this rank's part of a checkpoint: ``__0_0.distcp`` on rank 0, and so on. Collective.

    Rank 0 also writes ``.metadata``.

    Args:
        chunks: what this rank writes, in the order of ``tensors``.
        tensors: the content of the chunks, on any device, in any shape with as many elements.
        objects: entries that are no tensors, by key. Each is stored in a list of one, as Megatron does.
        open_file: opens the file of this rank's tensors; the default is ``open_to_write``.
        finish: called after the last tensor, also if this rank fails before it. It may contain collectives.

    Raises:
        Exception: the exception of the rank that failed. Raised on every rank. It is an ``OSError`` if the
            disk is full, and a ``RuntimeError`` if a tensor is not written exactly once.
    """
    # computing the checksums of torch's file format takes four times as long as writing the files
    checksums = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        dcp.save(
            {},
            storage_writer=_Writer(folder, open_file or open_to_write, finish),
            planner=_Planner(chunks, tensors, objects),
        )
    except CheckpointException as error:
        raise _disk_error(next(cause for cause, _ in error.failures.values())) from None
    except RuntimeError as error:
        raise _disk_error(error) from None
    finally:
        torch.serialization.set_crc32_options(checksums)


@contextmanager
def open_to_write(path: Path) -> Iterator[io.BufferedWriter]:
    """Open a new file, and flush it to the disk at the end."""
    with files.named(path), path.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def write_companions(folder: Path, common: dict[str, Any]) -> None:
    """Write ``metadata.json`` and ``common.pt``, which Megatron requires (until 0.18) beside the tensors.

    Args:
        common: content of ``common.pt``. Megatron adds it to what it loads.

    Raises:
        OSError: writing failed.
    """
    save_config(CheckpointingConfig("torch_dist", 1), str(folder))
    try:
        torch.save(common, folder / "common.pt")
    except RuntimeError as error:
        raise _disk_error(error) from None


def _disk_error(error: BaseException) -> BaseException:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) if _is_disk_full(error) else error


def _is_disk_full(error: BaseException) -> bool:
    """Return whether ``error`` is the OSError of a full disk, or what torch raises for it.

    torch's zip writer (caffe2/serialize/inline_container.cc) raises RuntimeErrors.
    """
    if isinstance(error, OSError):
        return disk_full(error) is not None
    signs = ("inline_container", "iostream")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


class _Writer(dcp.FileSystemWriter):
    """Write one file a rank, in the order of the plan.

    torch's own ``write_data`` keeps the last tensor of each key in memory.
    """

    def __init__(self, folder: Path, open_file: OpenFile, finish: Callable[[], object]) -> None:
        super().__init__(folder)
        self._open_file, self._finish = open_file, finish

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        name = f"{plan.storage_data.prefix}0.distcp"
        try:
            with self._open_file(Path(self.path) / name) as file:
                results = [
                    _write_item(
                        self.transforms,
                        file,
                        planner.resolve_data(item),
                        item,
                        name,
                        self.serialization_format,
                    )
                    for item in plan.items
                ]
        finally:
            self._finish()
        written: Future[list[WriteResult]] = Future()
        written.set_result(results)
        return written


class _Planner(SavePlanner):
    """Plan from shapes, and take each tensor when the writer needs it."""

    def __init__(
        self, chunks: Sequence[Chunk], tensors: Iterator[Tensor], objects: Mapping[str, Any]
    ) -> None:
        self._chunks, self._tensors, self._objects = chunks, tensors, objects

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        pass

    def create_local_plan(self) -> SavePlan:
        objects = [WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO) for key in self._objects]
        return SavePlan([*objects, *map(_item, self._chunks)])

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        plans, metadata = create_default_global_save_plan(all_plans)
        _check_complete(metadata)
        return plans, metadata

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type is WriteItemType.BYTE_IO:
            torch.save([self._objects[write_item.index.fqn]], buffer := io.BytesIO())
            return buffer
        assert write_item.tensor_data
        tensor = next(self._tensors).detach().cpu().contiguous()
        if tensor.untyped_storage().nbytes() != tensor.nbytes:  # torch.save writes whole storages
            tensor = tensor.clone()
        return tensor.view(tuple(write_item.tensor_data.chunk.sizes))


def _check_complete(metadata: Metadata) -> None:
    """Check that the ranks together write each tensor once.

    torch's own check compares all chunks of a tensor with each other, where they share the longest axis: the
    experts of a MoE do (default_planner.py:_validate_global_plan).

    Raises:
        RuntimeError: a chunk is written twice or not at all.
    """
    for key, about in metadata.state_dict_metadata.items():
        if isinstance(about, TensorStorageMetadata):
            places = {chunk.offsets for chunk in about.chunks}
            written = sum(math.prod(chunk.sizes) for chunk in about.chunks)
            if len(places) < len(about.chunks) or written != math.prod(about.size):
                raise RuntimeError(
                    f"{key!r} has {math.prod(about.size)} elements, and the ranks write {written} at "
                    f"{len(places)} places in {len(about.chunks)} chunks"
                )


def _item(chunk: Chunk) -> WriteItem:
    stored = ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes))
    data = TensorWriteData(stored, TensorProperties(chunk.dtype), torch.Size(chunk.shape))
    return WriteItem(MetadataIndex(chunk.key, stored.offsets), WriteItemType.SHARD, tensor_data=data)
