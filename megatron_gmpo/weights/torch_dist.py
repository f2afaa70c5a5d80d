"""Read and write Megatron-Core's ``torch_dist`` checkpoints with one tensor in memory at a time.

The keys of ``GPTModel.sharded_state_dict`` do not depend on the parallel layout: layers of one kind are
stacked along a first axis, routed experts along a second axis, and every tensor is complete, as with tensor
parallel size 1 (transformer_block.py, mlp.py, experts.py of megatron-core). torch.distributed.checkpoint
writes the files; ``.metadata`` records where each chunk is stored.
"""

from __future__ import annotations

import errno
import io
import math
import os
import pickle
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
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
from torch.distributed.checkpoint.utils import _create_file_view

from ..errors import InputError, disk_full, one_line
from ..supervision.records import LATEST, newest_step
from .pickles import read_metadata
from .read_ahead import read_ahead

_OPTIMIZER = re.compile(r"(chained_\d+\.)?optimizer\.")


@dataclass(frozen=True)
class Place:
    """The place of a parameter in a checkpoint.

    Attributes:
        key: key of the stored tensor, which may hold many parameters.
        index: position of the parameter along the leading axes: (layer,), (layer, expert), (expert,) or ().
        axes: sizes of those axes.
    """

    key: str
    index: tuple[int, ...] = ()
    axes: tuple[int, ...] = ()


def place_of(key: str, *, num_layers: int, num_experts: int, stacked: bool) -> Place:
    """Return the place of a parameter.

    Args:
        key: one of the parameter's keys (``models.mapping.Row``), with global layer and expert numbers.
        stacked: whether all layers are of one kind. Megatron stores the layers of a model with MoE and dense
            layers separately.
    """
    index: tuple[int, ...] = ()
    axes: tuple[int, ...] = ()
    if stacked and (found := re.match(r"decoder\.layers\.(\d+)\.", key)):
        index, axes = (int(found[1]),), (num_layers,)
        key = "decoder.layers." + key[found.end() :]
    if found := re.search(r"\.local_experts\.(\d+)\.", key):
        index, axes = (*index, int(found[1])), (*axes, num_experts)
        key = key.replace(found[0], ".experts.")
    return Place(key, index, axes)


def checkpoint_path(folder: Path, step: int) -> Path:
    """Return the folder of the checkpoint of ``step``."""
    return folder / f"iter_{step:07d}"


def checkpoint_folder(path: Path) -> Path:
    """Return ``path`` if it is an ``iter_*`` folder, else the folder that its tracker file names.

    The tracker file is latest_checkpointed_iteration.txt. It holds the number of a step, or ``release`` for a
    folder of that name.

    Raises:
        InputError: the folder does not exist, its format is not torch_dist, or the tracker file holds
            something else.
    """
    folder, tracker = path, path / LATEST
    if tracker.is_file() and tracker.read_bytes().strip() == b"release":
        folder = path / "release"
    elif tracker.is_file():
        try:
            folder = checkpoint_path(path, newest_step(path) or 0)
        except InputError as error:
            raise InputError(f"{error}: correct it, or give one iter_* folder") from None
    if not (folder / ".metadata").is_file():
        raise InputError(
            f"{str(folder)!r} holds no .metadata: "
            "give a complete Megatron checkpoint in the torch_dist format"
        )
    return folder


class TorchDistReader:
    """The tensors of an ``iter_*`` folder.

    Raises:
        InputError: the metadata cannot be read, or a file is missing or truncated.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        metadata = read_metadata(folder / ".metadata")
        stored = metadata.state_dict_metadata
        self.tensors = {
            key: about for key, about in stored.items() if isinstance(about, TensorStorageMetadata)
        }
        self._storage: dict[tuple[str, tuple[int, ...]], Any] = {}
        ends: dict[str, int] = {}
        for index, info in (metadata.storage_data or {}).items():
            self._storage[index.fqn, tuple(index.offset or ())] = info
            ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
        self.files = set(ends)
        for file, end in ends.items():
            if not (folder / file).is_file():
                raise InputError(
                    f"{folder / '.metadata'} names {file!r}, which is not there: "
                    "the checkpoint is incomplete, use another step"
                )
            if (size := (folder / file).stat().st_size) < end:
                raise InputError(
                    f"{folder / file} has {size} bytes, .metadata requires {end}: "
                    "the checkpoint is incomplete, use another step"
                )
        self._chunks: dict[tuple[str, tuple[int, ...]], list[ChunkStorageMetadata]] = {}
        for key, about in self.tensors.items():
            # index by the first two offsets, which are the layer and the expert in large tensors
            for chunk in about.chunks:
                self._chunks.setdefault((key, tuple(chunk.offsets[:2])), []).append(chunk)

    @property
    def weights(self) -> dict[str, TensorStorageMetadata]:
        """Return the tensors without the optimizer's tensors."""
        return {key: about for key, about in self.tensors.items() if not _OPTIMIZER.match(key)}

    @property
    def layers_are_stacked(self) -> bool:
        """Return whether the layers are stacked along an axis instead of stored separately."""
        return not any(key.startswith("decoder.layers.0.") for key in self.tensors)

    def get(self, place: Place) -> Tensor:
        """Read the complete parameter into CPU memory.

        Raises:
            InputError: the chunks do not cover it, or cannot be read.
        """
        about = self.tensors[place.key]
        depth = len(place.index)
        full = torch.empty(about.size[depth:], dtype=about.properties.dtype)
        filled = 0
        for chunk in self._candidates(place):
            inside = tuple(at - first for at, first in zip(place.index, chunk.offsets, strict=False))
            if any(not 0 <= at < size for at, size in zip(inside, chunk.sizes, strict=False)):
                continue
            piece = self._read(place.key, chunk)[inside] if inside else self._read(place.key, chunk)
            if piece.shape == full.shape:
                return piece
            target = full
            for dim, (first, size) in enumerate(zip(chunk.offsets[depth:], chunk.sizes[depth:], strict=True)):
                target = target.narrow(dim, first, size)
            target.copy_(piece)
            filled += piece.numel()
        if filled != full.numel():
            raise InputError(
                f"{self.folder}: {place.key!r} has only {filled} of {full.numel()} elements at "
                f"{place.index}: the checkpoint is incomplete, use another step"
            )
        return full

    def _candidates(self, place: Place) -> list[ChunkStorageMetadata]:
        return self._chunks.get((place.key, place.index)) or self.tensors[place.key].chunks

    def _read(self, key: str, chunk: ChunkStorageMetadata) -> Tensor:
        info = self._storage[key, tuple(chunk.offsets)]
        with (self.folder / info.relative_path).open("rb", buffering=0) as file:
            # a view avoids a copy between file and tensor
            view: Any = _create_file_view(file, info.offset, info.length)
            try:
                tensor: Tensor = torch.load(view, map_location="cpu", weights_only=True)
            except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
                raise InputError(
                    f"{self.folder / info.relative_path}: {key!r} cannot be read ({one_line(error)[:100]}): "
                    "use another step"
                ) from None
        assert tensor.shape == chunk.sizes, f"{key}: {tensor.shape} stored for {chunk.sizes}"
        return tensor


@dataclass(frozen=True)
class Piece:
    """A parameter to write. The writer calls ``read`` when it needs the tensor."""

    place: Place
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_torch_dist(folder: Path, pieces: Iterable[Piece], extra_states: Iterable[Place]) -> None:
    """Write this rank's pieces into an empty ``iter_*`` folder. Collective.

    Args:
        extra_states: places of the empty ``_extra_state`` entries that Megatron expects. FP8 models store
            scales in them.

    Raises:
        InputError: a piece's ``read`` raised it on some rank. Raised on every rank.
        OSError: writing failed on some rank. Raised on every rank.
    """
    # computing the checksums of torch's file format takes four times as long as writing the files
    checksums = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    pieces = list(pieces)
    try:
        with closing(read_ahead(pieces, lambda piece: piece.read(), lambda piece: piece.nbytes)) as tensors:
            writer = dcp.FileSystemWriter(folder, per_thread_copy_ahead=0)
            planner = _StreamingPlanner(pieces, tensors, list(extra_states))
            dcp.save(
                {}, storage_writer=writer, planner=planner, no_dist=torch.distributed.get_world_size() == 1
            )
        if not torch.distributed.get_rank():
            save_config(CheckpointingConfig("torch_dist", 1), str(folder))
            torch.save({"iteration": 0, "checkpoint_version": 3.0}, folder / "common.pt")
    except CheckpointException as error:
        raise _disk_error(next(cause for cause, _ in error.failures.values())) from None
    except RuntimeError as error:
        raise _disk_error(error) from None
    finally:
        torch.serialization.set_crc32_options(checksums)


def is_disk_full(error: BaseException) -> bool:
    """Return whether ``error`` is the OSError of a full disk, or what torch or Megatron raise for it.

    torch's zip writer (caffe2/serialize/inline_container.cc) raises RuntimeErrors, which Megatron's writer
    quotes.
    """
    if isinstance(error, OSError):
        return disk_full(error) is not None
    signs = ("inline_container", "iostream", *map(os.strerror, (errno.ENOSPC, errno.EDQUOT)))
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def _disk_error(error: BaseException) -> BaseException:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) if is_disk_full(error) else error


class _StreamingPlanner(SavePlanner):
    """Plan from shapes, and read each tensor when the writer needs it, in the order of the plan."""

    def __init__(
        self, pieces: list[Piece], tensors: Iterator[tuple[Piece, Tensor]], extra_states: list[Place]
    ) -> None:
        self._pieces, self._tensors = pieces, tensors
        torch.save([None], buffer := io.BytesIO())
        self._empty_state = buffer.getvalue()
        self._extra_states = [
            f"{place.key}/shard_{_dotted(place.index or (0,))}_{_dotted(place.axes or (1,))}"
            for place in extra_states
        ]

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        pass

    def create_local_plan(self) -> SavePlan:
        extra = [WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO) for name in self._extra_states]
        return SavePlan([*extra, *map(self._item, self._pieces)])

    def _item(self, piece: Piece) -> WriteItem:
        place, chunk = piece.place, _chunk(piece)
        data = TensorWriteData(chunk, TensorProperties(piece.dtype), torch.Size((*place.axes, *piece.shape)))
        return WriteItem(MetadataIndex(place.key, chunk.offsets), WriteItemType.SHARD, tensor_data=data)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        return create_default_global_save_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type is WriteItemType.BYTE_IO:
            return io.BytesIO(self._empty_state)
        piece, tensor = next(self._tensors)
        assert write_item.tensor_data
        assert (write_item.index.fqn, write_item.tensor_data.chunk) == (piece.place.key, _chunk(piece))
        return tensor.view(tuple(write_item.tensor_data.chunk.sizes))


def _dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))


def _chunk(piece: Piece) -> ChunkStorageMetadata:
    """Return the metadata of the part of the stored tensor that a piece fills."""
    index = piece.place.index
    return ChunkStorageMetadata(
        torch.Size((*index, *[0] * len(piece.shape))), torch.Size((*[1] * len(index), *piece.shape))
    )
