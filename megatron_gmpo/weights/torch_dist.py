"""The parameters of Megatron-Core's ``torch_dist`` checkpoints, with one tensor in memory at a time.

The keys of ``GPTModel.sharded_state_dict`` do not depend on the parallel layout: layers of one kind are
stacked along a first axis, routed experts along a second axis, and every tensor is complete, as with tensor
parallel size 1 (transformer_block.py, mlp.py, experts.py of megatron-core). ``.metadata``
records where each chunk is stored. ``torch_dist_writer`` writes the files.
"""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.utils import _create_file_view

from ..errors import InputError, one_line
from ..supervision.records import LATEST, newest_step
from .pickles import read_metadata
from .read_ahead import read_ahead
from .torch_dist_writer import Chunk, write_chunks, write_companions

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

    @property
    def chunk(self) -> Chunk:
        """Return the part of the stored tensor that the parameter fills."""
        index, axes = self.place.index, self.place.axes
        offsets, sizes = (*index, *[0] * len(self.shape)), (*[1] * len(index), *self.shape)
        return Chunk(self.place.key, (*axes, *self.shape), offsets, sizes, self.dtype)


def write_torch_dist(folder: Path, pieces: Iterable[Piece], extra_states: Iterable[Place]) -> None:
    """Write this rank's pieces into an empty ``iter_*`` folder. Collective.

    Args:
        extra_states: places of the empty ``_extra_state`` entries that Megatron expects. FP8 models store
            scales in them.

    Raises:
        InputError: a piece's ``read`` raised it on some rank. Raised on every rank.
        OSError: writing failed on some rank. Raised on every rank.
    """
    pieces = list(pieces)
    objects = {
        f"{place.key}/shard_{_dotted(place.index or (0,))}_{_dotted(place.axes or (1,))}": None
        for place in extra_states
    }
    with closing(read_ahead(pieces, lambda piece: piece.read(), lambda piece: piece.nbytes)) as tensors:
        write_chunks(folder, [piece.chunk for piece in pieces], (tensor for _, tensor in tensors), objects)
    if not torch.distributed.get_rank():
        write_companions(folder, {"iteration": 0, "checkpoint_version": 3.0})


def _dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))
