"""Convert a Megatron checkpoint to a Hugging Face folder."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor

from ..distributed import rank, world_size
from ..errors import InputError
from ..models.description import DTYPES
from ..models.mapping import ROUTER_BIAS
from ..models.operations import Vocabulary
from .companions import companion_folder, copy_companions
from .conversion import Advance, Conversion, finite
from .read_ahead import read_ahead
from .safetensors_folder import SafetensorsFile, SafetensorsFolder
from .table import ConversionTable, Entry
from .torch_dist import Place, TorchDistReader, checkpoint_folder
from .weight_files import INDEX

log = logging.getLogger(__name__)


class MegatronToHF(Conversion):
    """A checked Megatron checkpoint that can be written as a Hugging Face folder.

    Optimizer state is not read.

    Args:
        megatron: folder with latest_checkpointed_iteration.txt, or one ``iter_*`` folder, of a conversion or
            a training run.
        template: Hugging Face folder with the config.json and tokenizer; None uses the folder ``hf`` beside
            the checkpoint.
        dtype: ``bf16`` or ``fp32``, for all tensors except router biases; None keeps each tensor's dtype.
        max_shard_size: maximum bytes of tensors per file. A larger parameter gets its own file.

    Raises:
        InputError: the folder has no torch_dist checkpoint or no config.json; a parameter is missing, unknown
            or misshapen; a file is truncated or missing.
    """

    def __init__(
        self, megatron: Path, template: Path | None, dtype: str | None, max_shard_size: int = 5 * 10**9
    ) -> None:
        self.folder = checkpoint_folder(megatron)
        self.table = ConversionTable(template or companion_folder(self.folder))
        self._new_dtype = DTYPES[dtype] if dtype else None
        self._max_shard_size = max_shard_size
        self._source = TorchDistReader(self.folder)
        self._places: dict[str, Place] = {}
        self._check()

    def _place(self, entry: Entry) -> Place:
        return self._places[entry.name]

    def _dtype(self, entry: Entry) -> torch.dtype:
        stored = self._source.tensors[self._place(entry).key].properties.dtype
        return stored if entry.name.endswith(ROUTER_BIAS) else self._new_dtype or stored

    def _read(self, entry: Entry) -> list[Tensor]:
        complete = self._source.get(self._place(entry))
        if isinstance(entry.operation, Vocabulary) and complete[entry.operation.size :].any():
            log.warning(
                f"{str(self.folder)!r}: {entry.name!r} has {len(complete)} rows, the vocabulary of "
                f"config.json {entry.operation.size}, and the further rows are not 0: they are padding of "
                "Megatron-LM, or tokens that --template lacks"
            )
        tensors = entry.operation.separate(complete)
        return [
            finite(name, tensor.to(self._dtype(entry)))
            for name, tensor in zip(entry.hf, tensors, strict=True)
        ]

    def _write(self, folder: Path, advance: Advance) -> list[Entry]:
        shards = self._shards()
        mine = list(shards.items())[rank() :: world_size()]
        for file, entries in mine:
            self._write_file(folder / file, entries, advance)
        if rank() == 0:
            dtype = self._most_common_dtype()
            copy_companions(self.table.folder, folder, None if dtype == self.table.whole.dtype else dtype)
            if len(shards) > 1:
                weight_map = {
                    name: file for file, group in shards.items() for name, *_ in self._stored(group)
                }
                index = {"metadata": {"total_size": self.nbytes}, "weight_map": weight_map}
                (folder / INDEX).write_text(json.dumps(index, indent=2))
        return [entry for _, entries in mine for entry in entries]

    def _shards(self) -> dict[str, list[Entry]]:
        """Return file name -> entries. There are at least as many files as ranks."""
        together: dict[str, list[Entry]] = {}  # entries that one file must hold
        for entry in self.table.entries:
            together.setdefault(entry.stack or entry.name, []).append(entry)
        split = split_state_dict_into_shards_factory(
            together,
            get_storage_size=lambda entries: sum(map(self._nbytes, entries)),
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=min(self._max_shard_size, -(-self.nbytes // world_size())),
        )
        return {
            # descending item size keeps all tensors aligned
            file: sorted(
                (entry for name in names for entry in together[name]),
                key=lambda entry: -self._dtype(entry).itemsize,
            )
            for file, names in split.filename_to_tensors.items()
        }

    def _stored(self, entries: list[Entry]) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        """Return name, dtype and shape of the tensors that a file with these entries holds."""
        stored: dict[str, tuple[str, torch.dtype, tuple[int, ...]]] = {}
        for entry in entries:
            if entry.stack:
                shape = (self.table.num_experts, *reversed(entry.shape))
                stored[entry.stack] = (entry.stack, self._dtype(entry), shape)
            for name, shape in zip(entry.hf, entry.hf_shapes, strict=True) if not entry.stack else ():
                stored[name] = (name, self._dtype(entry), shape)
        return list(stored.values())

    def _write_file(self, path: Path, entries: list[Entry], advance: Advance) -> None:
        with (
            SafetensorsFile(path, self._stored(entries)) as file,
            closing(read_ahead(entries, self._read, self._nbytes)) as read,
        ):
            for entry, tensors in read:
                if entry.stack:
                    file.write(entry.stack, torch.cat(tensors).T)
                else:
                    for name, tensor in zip(entry.hf, tensors, strict=True):
                        file.write(name, tensor)
                advance(self._nbytes(entry))

    def _most_common_dtype(self) -> torch.dtype:
        """Return the dtype to write into config.json."""
        counts = Counter[torch.dtype]()
        for entry in self.table.entries:
            counts[self._dtype(entry)] += entry.numel
        return counts.most_common(1)[0][0]

    def _read_back(self, folder: Path) -> Callable[[Entry], Iterator[list[Tensor]]]:
        written = SafetensorsFolder(folder)
        return lambda entry: iter([[written.get(name) for name in entry.hf]])

    def _check(self) -> None:
        where, stored, stacked = str(self.folder), self._source.tensors, self._source.layers_are_stacked
        known: set[str] = set()
        for entry in self.table.entries:
            places = self.table.places(entry, stacked=stacked)
            present = [place for place in places if place.key in stored]
            if not present:
                raise InputError(
                    f"{where!r} lacks {places[0].key!r}, which forms {entry.hf[0]!r}: "
                    "give --template, the Hugging Face folder of this model"
                )
            place = self._places[entry.name] = present[0]
            known.update(place.key for place in present)
            size, depth = tuple(stored[place.key].size), len(place.index)
            fits = size[depth:] == entry.shape
            # the padding depends on the layout of the run that saved the checkpoint
            if isinstance(entry.operation, Vocabulary):
                fits = size[0] >= entry.operation.size and size[1:] == entry.shape[1:]
            if not fits or size[:depth] != place.axes:
                raise InputError(
                    f"{where!r}: {place.key!r} is {size}, "
                    f"config.json requires {(*place.axes, *entry.shape)}: "
                    "give --template, the Hugging Face folder of this model"
                )
        extra = sorted(self._source.weights.keys() - known)
        if extra:
            raise InputError(
                f"{where!r} has {len(extra)} tensors that config.json does not require, "
                f"the first {extra[0]!r}: give --template, the Hugging Face folder of this model"
            )
