"""Convert a Hugging Face folder to a Megatron checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from ..distributed import rank, world_size
from ..errors import InputError
from ..models.decoder import prediction_layers
from .companions import copy_companions
from .conversion import Advance, Conversion, finite
from .safetensors_folder import SafetensorsFolder
from .table import ConversionTable, Entry
from .torch_dist import LATEST, Piece, Place, TorchDistReader, checkpoint_path, write_torch_dist


class HFToMegatron(Conversion):
    """A checked Hugging Face folder that can be written as a Megatron checkpoint.

    Args:
        hf: the folder.

    Raises:
        InputError: the folder has no model, an unknown family or no safetensors, such as pickles only; a
            tensor is missing, unknown or misshapen, or its dtype differs between layers; a file is truncated
            or missing.
    """

    def __init__(self, hf: Path) -> None:
        self.table = ConversionTable(hf)
        self._source = SafetensorsFolder(hf, left_out=prediction_layers(self.table.hf))
        self._check()

    def _place(self, entry: Entry) -> Place:
        return self.table.places(entry)[0]

    def _dtype(self, entry: Entry) -> torch.dtype:
        return self._source.dtype(entry.hf[0])

    def _read(self, entry: Entry) -> list[Tensor]:
        return [finite(name, self._source.get(name)) for name in entry.hf]

    def _write(self, folder: Path, advance: Advance) -> list[Entry]:
        mine = self._share()
        pieces = [piece for entry in mine for piece in self._pieces(entry, advance)]
        extra_states = self.table.extra_states()[rank() :: world_size()]
        write_torch_dist(checkpoint_path(folder, 0), pieces, extra_states)
        if rank() == 0:
            copy_companions(self.table.folder, folder / "hf")
            (folder / LATEST).write_text("0")
        return mine

    def _share(self) -> list[Entry]:
        """Return this rank's entries, a consecutive range with about the same bytes on every rank."""
        sizes = [self._nbytes(entry) for entry in self.table.entries]
        total = max(1, sum(sizes))
        middles = (end - size / 2 for end, size in zip(accumulate(sizes), sizes, strict=True))
        return [
            entry
            for entry, middle in zip(self.table.entries, middles, strict=True)
            if int(middle * world_size() / total) == rank()
        ]

    def _pieces(self, entry: Entry, advance: Advance) -> Iterator[Piece]:
        def read() -> Tensor:
            tensors = self._read(entry)
            advance(self._nbytes(entry))
            return entry.operation.join(tensors)

        for place in self.table.places(entry):
            yield Piece(place, self._dtype(entry), entry.shape, read)

    def _read_back(self, folder: Path) -> Callable[[Entry], Iterator[list[Tensor]]]:
        written = TorchDistReader(checkpoint_path(folder, 0))
        return lambda entry: (
            entry.operation.separate(written.get(place)) for place in self.table.places(entry)
        )

    def _check(self) -> None:
        where, source = str(self._source.path), self._source
        dtypes: dict[str, torch.dtype] = {}
        for entry in self.table.entries:
            key = self._place(entry).key
            for name, shape in zip(entry.hf, entry.hf_shapes, strict=True):
                if name not in source.names:
                    raise InputError(
                        f"{where!r} lacks the tensor {name!r} that config.json requires: "
                        "download the model again"
                    )
                if source.shape(name) != shape:
                    raise InputError(
                        f"{where!r}: {name!r} is {source.shape(name)}, config.json requires {shape}: "
                        "use the config.json of these weights"
                    )
                if source.dtype(name) != dtypes.setdefault(key, source.dtype(name)):
                    raise InputError(
                        f"{where!r}: {name!r} is {source.dtype(name)}, "
                        f"other tensors that Megatron stores with it are {dtypes[key]}: "
                        "save the model in one dtype"
                    )
        tied = set[str]()
        if self.table.hf.tie_word_embeddings:
            source.check_tied()
            tied = {"lm_head.weight"}
        extra = sorted(source.names - set(self.table.hf_names) - tied)
        if extra:
            raise InputError(
                f"{where!r} has {len(extra)} tensors that config.json does not require, "
                f"the first {extra[0]!r}: use the config.json of these weights"
            )
