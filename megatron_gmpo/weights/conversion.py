"""Convert between Hugging Face folders and Megatron checkpoints, tensor by tensor.

A converted Megatron checkpoint is a folder with Megatron-LM's names::

    latest_checkpointed_iteration.txt        0
    iter_0000000/                            torch_dist: .metadata, __*.distcp, metadata.json, common.pt
    hf/                                      config.json, generation config, tokenizer, chat template

``HFToMegatron`` and ``MegatronToHF`` are the two directions. Each checks its source when it is constructed.
No model is built.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..distributed import agreed, folder_written_by_all, rank
from ..errors import InputError
from ..files import check_room, writable
from .table import ConversionTable, Entry
from .torch_dist import Place

Advance = Callable[[int], None]
"""Function called with the number of bytes of each tensor that this rank has converted."""


@dataclass(frozen=True)
class Converted:
    """The result of a conversion, over all ranks."""

    tensors: int
    nbytes: int
    seconds: float

    def __str__(self) -> str:
        speed = self.nbytes / 1e6 / self.seconds
        return f"{self.tensors:,} tensors, {self.nbytes:,} bytes in {self.seconds:.1f} s, {speed:,.0f} MB/s"


class Conversion(ABC):
    """A checked source that can be written in the other format.

    Attributes:
        table: the table of every parameter of the model.
    """

    table: ConversionTable

    @property
    def nbytes(self) -> int:
        """Return the bytes of all tensors to write."""
        return sum(self._nbytes(entry) for entry in self.table.entries)

    def lines(self) -> Iterator[str]:
        """Yield the lines of the table: for each parameter its Hugging Face names, place, shape and dtype."""
        for entry in self.table.entries:
            place, dtype = self._place(entry), str(self._dtype(entry)).removeprefix("torch.")
            index = str(list(place.index)) if place.index else ""
            yield f"{' + '.join(entry.hf)} <-> {place.key}{index} <-> {entry.shape} {dtype}"

    def convert(self, target: Path, *, verify: bool, advance: Advance) -> Converted:
        """Write the target folder (collective; each rank writes its share).

        Args:
            verify: whether to read everything back and compare it, bit by bit, before the folder is renamed
                to its final name.

        Raises:
            InputError: the target exists; the disk is too small; a tensor is not finite; a tensor read back
                differs.
        """
        started = time.perf_counter()
        disk = partial(writable, repr(str(target)), "free space or choose another disk, and run again")
        with disk(), folder_written_by_all(target) as folder:
            with agreed(), disk():
                if rank() == 0:
                    _check_target(target, self.nbytes)
            with agreed(), disk():
                written = self._write(folder, advance)
            with agreed(), disk():
                if verify:
                    self._verify(folder, written)
        return Converted(sum(1 for _ in self.table.hf_names), self.nbytes, time.perf_counter() - started)

    @abstractmethod
    def _place(self, entry: Entry) -> Place:
        """Return where the Megatron checkpoint stores a parameter."""

    @abstractmethod
    def _dtype(self, entry: Entry) -> torch.dtype:
        """Return the dtype in which a parameter is written."""

    @abstractmethod
    def _read(self, entry: Entry) -> list[Tensor]:
        """Read a parameter's Hugging Face tensors from the source, in the dtype to write."""

    @abstractmethod
    def _write(self, folder: Path, advance: Advance) -> list[Entry]:
        """Write this rank's share and return its entries. Collective; an error is raised on every rank."""

    @abstractmethod
    def _read_back(self, folder: Path) -> Callable[[Entry], Iterable[list[Tensor]]]:
        """Return a function that reads the Hugging Face tensors of a parameter, once per written place."""

    def _nbytes(self, entry: Entry) -> int:
        return entry.numel * self._dtype(entry).itemsize

    def _verify(self, folder: Path, entries: list[Entry]) -> None:
        read_back = self._read_back(folder)
        for entry in entries:
            wanted = self._read(entry)
            for written in read_back(entry):
                for name, ours, theirs in zip(entry.hf, written, wanted, strict=True):
                    if ours.dtype != theirs.dtype or not torch.equal(_bits(ours), _bits(theirs)):
                        raise InputError(
                            f"{name!r} read back differs from the written tensor: "
                            "check the disk and convert again"
                        )


def _check_target(target: Path, nbytes: int) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{str(target)!r} exists: choose another folder or remove it")
    check_room(target, nbytes)


def finite(name: str, tensor: Tensor) -> Tensor:
    """Return ``tensor``.

    Raises:
        InputError: it holds NaN or infinite numbers.
    """
    # the sum is not finite if an element is not finite, and is cheaper than a check of every element
    if tensor.is_floating_point() and not math.isfinite(tensor.sum()) and not tensor.isfinite().all():
        raise InputError(
            f"tensor {name!r} holds NaN or infinite numbers: the weights are broken, use another copy or step"
        )
    return tensor


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)
