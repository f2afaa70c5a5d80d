"""Hugging Face folders <-> Megatron checkpoints, tensor by tensor, by the families' name tables; no model is built.

A converted Megatron checkpoint is a folder with Megatron-LM's names::

    latest_checkpointed_iteration.txt        0
    iter_0000000/                            torch_dist: .metadata, __*.distcp, metadata.json, common.pt
    hf/                                      config.json, generation config, tokenizer, chat template

Which tensors a model has, and their shapes, is what transformers would build from its config.json, on the meta device; the family's table
says what Megatron calls them. Everything is checked against that before anything is written, then written beside its place and renamed.
"""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from .. import files
from ..distributed import all_gather_objects, rank, world_size
from ..errors import InputError
from ..models import FAMILIES
from ..models.blocks import prediction_layers
from ..models.config import DTYPES, read_hf_config
from ..models.mapping import ROUTER_BIAS, Operation, Vocabulary, expand
from .companions import companion_folder, copy_companions
from .read_ahead import read_ahead
from .safetensors_folder import INDEX, SafetensorsFile, SafetensorsFolder
from .torch_dist import (
    LATEST,
    Piece,
    Place,
    TorchDistReader,
    checkpoint_folder,
    fused_norm_key,
    place_of,
    write_torch_dist,
)

log = logging.getLogger(__name__)

_OPTIMIZER = re.compile(r"(chained_\d+\.)?optimizer\.")

Advance = Callable[[int], None]
"""Told the bytes of each tensor this rank has done."""


@dataclass(frozen=True)
class Entry:
    """One Megatron parameter and the Hugging Face tensors it is made of.

    Attributes:
        name: canonical Megatron name, with global layer and expert numbers.
        hf: names on the hub.
        hf_shapes: their shapes.
        shape: of the whole Megatron parameter.
        operation: the way between them.
    """

    name: str
    hf: tuple[str, ...]
    hf_shapes: tuple[tuple[int, ...], ...]
    shape: tuple[int, ...]
    operation: Operation

    @property
    def numel(self) -> int:
        return sum(map(math.prod, self.hf_shapes))

    @property
    def is_routed(self) -> bool:
        return ".local_experts." in self.name


class ConversionTable:
    """Every parameter of one model.

    Args:
        folder: holds config.json.

    Raises:
        InputError: no config.json there, or a model without a table.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.hf = read_hf_config(str(folder))
        family = FAMILIES[self.hf.model_type]
        self._architecture = family.architecture(self.hf)
        self.num_experts: int = self._architecture.get("num_moe_experts") or 0
        self._latent_attention: bool = self._architecture.get("multi_latent_attention", False)
        frequency = self._architecture.get("moe_layer_freq", 1)
        self._stacked = isinstance(frequency, int)
        shapes = _hub_shapes(self.hf)
        rows = family.rows(self.hf, -(-self.hf.vocab_size // 128) * 128)
        self.entries = [
            Entry(row.megatron, row.hf, found, _joined_shape(row.operation, found), row.operation)
            for row in expand(rows, self.hf.num_hidden_layers, self.num_experts)
            if all(name in shapes for name in row.hf)
            for found in [tuple(shapes[name] for name in row.hf)]
        ]
        self.entries.sort(key=lambda entry: _natural(entry.hf[0]))
        covered = {name for entry in self.entries for name in entry.hf}
        assert covered == shapes.keys(), (
            f"the table of {self.hf.model_type} lacks {sorted(shapes.keys() - covered)[:3]}"
        )
        self._moe_layers = {entry.name.split(".mlp.")[0] for entry in self.entries if entry.is_routed}

    @property
    def hf_names(self) -> Iterator[str]:
        return (name for entry in self.entries for name in entry.hf)

    @property
    def numel(self) -> int:
        return sum(entry.numel for entry in self.entries)

    @property
    def active_numel(self) -> int:
        """Parameters one token meets: of the routed experts only the chosen ones."""
        routed = sum(entry.numel for entry in self.entries if entry.is_routed)
        if not routed:
            return self.numel
        return self.numel - routed + routed * self._architecture["moe_router_topk"] // self.num_experts

    def places(self, entry: Entry, *, stacked: bool | None = None) -> tuple[Place, ...]:
        """Where a parameter is written: for a norm under both names Megatron's layer specs know, Transformer Engine's first, else once."""
        place = place_of(
            entry.name,
            num_layers=self.hf.num_hidden_layers,
            num_experts=self.num_experts,
            stacked=self._stacked if stacked is None else stacked,
            latent_attention=self._latent_attention,
        )
        fused = Place(
            fused_norm_key(place.key, latent_attention=self._latent_attention), place.index, place.axes
        )
        if fused == place:
            return (place,)
        before_moe = entry.name.split(".pre_mlp_")[0] in self._moe_layers
        if self._latent_attention:
            return (place,) if before_moe else (fused, place)
        return (place, fused) if before_moe else (fused,)

    def extra_states(self) -> list[Place]:
        """Modules to which one of Megatron's layer specs gives an ``_extra_state``."""
        states: dict[Place, None] = {}
        for entry in self.entries:
            place = self.places(entry)[0]
            module, _, what = place.key.rpartition(".")
            if (
                what in ("weight", "layer_norm_weight")
                and module.startswith("decoder.")
                and not module.endswith(".router")
            ):
                states[Place(f"{module}._extra_state", place.index, place.axes)] = None
            if module.endswith(".linear_proj"):
                states[
                    Place(
                        module.replace("linear_proj", "core_attention._extra_state"), place.index, place.axes
                    )
                ] = None
        return list(states)


@dataclass(frozen=True)
class Converted:
    """What a conversion did, over all ranks."""

    tensors: int
    nbytes: int
    seconds: float

    def __str__(self) -> str:
        speed = self.nbytes / 1e6 / self.seconds
        return f"{self.tensors:,} tensors, {self.nbytes:,} bytes in {self.seconds:.1f} s, {speed:,.0f} MB/s"


class HFToMegatron:
    """A Hugging Face folder, checked and ready to be written as a Megatron checkpoint.

    Args:
        hf: the folder.

    Raises:
        InputError: no model, a pickle, an unknown family; a tensor that is missing, unknown, misshapen or of another dtype than its
            like in other layers; files that are truncated or absent.
    """

    def __init__(self, hf: Path) -> None:
        self.table = ConversionTable(hf)
        self._source = SafetensorsFolder(hf, left_out=prediction_layers(self.table.hf))
        self._check()
        self.nbytes = sum(self._nbytes(entry) for entry in self.table.entries)

    def lines(self) -> Iterator[str]:
        """The table: Hugging Face names, Megatron place, shape and dtype."""
        for entry in self.table.entries:
            yield _line(entry, self.table.places(entry)[0], entry.shape, self._source.dtype(entry.hf[0]))

    def convert(self, megatron: Path, *, verify: bool, advance: Advance) -> Converted:
        """Writes the checkpoint (collective; each rank writes its share of the bytes).

        Args:
            verify: read everything back and compare it, bit by bit, before the checkpoint gets its name.

        Raises:
            InputError: the place is taken, the disk too small, a tensor not finite, or what is read back differs.
        """
        started = time.perf_counter()
        with _written_aside(megatron, self.nbytes) as partial:
            folder = partial / "iter_0000000"
            mine = _share(self.table.entries, [self._nbytes(entry) for entry in self.table.entries])
            with _agreed():
                pieces = [piece for entry in mine for piece in self._pieces(entry, advance)]
                write_torch_dist(folder, pieces, self.table.extra_states()[rank() :: world_size()])
                if rank() == 0:
                    copy_companions(self.table.folder, partial / "hf")
                    (partial / LATEST).write_text("0")
            with _agreed():
                if verify:
                    self._verify(TorchDistReader(folder), mine)
        return Converted(sum(1 for _ in self.table.hf_names), self.nbytes, time.perf_counter() - started)

    def _nbytes(self, entry: Entry) -> int:
        return entry.numel * self._source.dtype(entry.hf[0]).itemsize

    def _pieces(self, entry: Entry, advance: Advance) -> Iterator[Piece]:
        def read() -> Tensor:
            tensors = [_finite(name, self._source.get(name)) for name in entry.hf]
            advance(self._nbytes(entry))
            return entry.operation.join(tensors)

        for place in self.table.places(entry):
            yield Piece(place, self._source.dtype(entry.hf[0]), entry.shape, read)

    def _verify(self, written: TorchDistReader, entries: list[Entry]) -> None:
        for entry in entries:
            wanted = [self._source.get(name) for name in entry.hf]
            for place in self.table.places(entry):
                _compare(entry, entry.operation.separate(written.get(place)), wanted)

    def _check(self) -> None:
        where, source = str(self._source.path), self._source
        dtypes: dict[str, torch.dtype] = {}
        for entry in self.table.entries:
            key = self.table.places(entry)[0].key
            for name, shape in zip(entry.hf, entry.hf_shapes, strict=True):
                if name not in source.names:
                    raise InputError(
                        f"{where!r} lacks the tensor {name!r} that config.json asks for: fetch the model again"
                    )
                if source.shape(name) != shape:
                    raise InputError(
                        f"{where!r}: {name!r} is {source.shape(name)}, config.json asks for {shape}: the weights do not belong to it"
                    )
                if source.dtype(name) != dtypes.setdefault(key, source.dtype(name)):
                    raise InputError(
                        f"{where!r}: {name!r} is {source.dtype(name)} where its like are {dtypes[key]}, which Megatron stores together: "
                        f"save the model in one dtype"
                    )
        tied = set[str]()
        if self.table.hf.tie_word_embeddings:
            source.check_tied()
            tied = {"lm_head.weight"}
        extra = sorted(source.names - set(self.table.hf_names) - tied)
        if extra:
            raise InputError(
                f"{where!r} has {len(extra)} tensors that config.json does not ask for, the first {extra[0]!r}"
            )


class MegatronToHF:
    """A Megatron checkpoint, checked and ready to be written as a Hugging Face folder. No optimizer state is read.

    Args:
        megatron: folder with latest_checkpointed_iteration.txt, or one ``iter_*`` folder; converted, or of a training run.
        template: Hugging Face folder whose config.json and tokenizer to use; without it the folder ``hf`` beside the checkpoint.
        dtype: of the tensors written but for router biases, ``bf16`` or ``fp32``; None keeps each one's own.

    Raises:
        InputError: no torch_dist checkpoint or no config.json there; a parameter that is missing, unknown or misshapen; files that are
            truncated or absent.
    """

    def __init__(self, megatron: Path, template: Path | None, dtype: str | None) -> None:
        self.folder = checkpoint_folder(megatron)
        self.table = ConversionTable(template or companion_folder(self.folder))
        self._dtype = DTYPES[dtype] if dtype else None
        self._source = TorchDistReader(self.folder)
        self._places: dict[str, Place] = {}
        self._check()
        self.nbytes = sum(self._nbytes(entry) for entry in self.table.entries)

    def lines(self) -> Iterator[str]:
        """The table: Hugging Face names, Megatron place, shape and dtype."""
        for entry in self.table.entries:
            yield _line(entry, self._places[entry.name], entry.shape, self._entry_dtype(entry))

    def convert(self, hf: Path, *, max_shard_size: int, verify: bool, advance: Advance) -> Converted:
        """Writes the folder (collective; each rank writes whole files).

        Args:
            max_shard_size: bytes of tensors in one file, but for a file with a single parameter.
            verify: read everything back and compare it, bit by bit, before the folder gets its name.

        Raises:
            InputError: the place is taken, the disk too small, a tensor not finite, or what is read back differs.
        """
        started = time.perf_counter()
        with _written_aside(hf, self.nbytes) as partial:
            shards = self._shards(min(max_shard_size, -(-self.nbytes // world_size())))
            mine = list(shards.items())[rank() :: world_size()]
            with _agreed():
                for file, entries in mine:
                    self._write_file(partial / file, entries, advance)
                if rank() == 0:
                    dtype = self._most_common_dtype()
                    copy_companions(
                        self.table.folder, partial, None if dtype == self.table.hf.dtype else dtype
                    )
                    if len(shards) > 1:
                        weight_map = {
                            name: file
                            for file, entries in shards.items()
                            for entry in entries
                            for name in entry.hf
                        }
                        (partial / INDEX).write_text(
                            json.dumps(
                                {"metadata": {"total_size": self.nbytes}, "weight_map": weight_map}, indent=2
                            )
                        )
            with _agreed():
                if verify:
                    self._verify(
                        SafetensorsFolder(partial), [entry for _, entries in mine for entry in entries]
                    )
        return Converted(sum(1 for _ in self.table.hf_names), self.nbytes, time.perf_counter() - started)

    def _entry_dtype(self, entry: Entry) -> torch.dtype:
        stored = self._source.tensors[self._places[entry.name].key].properties.dtype
        return stored if entry.name.endswith(ROUTER_BIAS) else self._dtype or stored

    def _nbytes(self, entry: Entry) -> int:
        return entry.numel * self._entry_dtype(entry).itemsize

    def _most_common_dtype(self) -> torch.dtype:
        """What config.json is to say of the weights."""
        counts = Counter[torch.dtype]()
        for entry in self.table.entries:
            counts[self._entry_dtype(entry)] += entry.numel
        return counts.most_common(1)[0][0]

    def _read(self, entry: Entry) -> list[Tensor]:
        whole = self._source.get(self._places[entry.name])
        if isinstance(entry.operation, Vocabulary) and whole[entry.operation.size :].any():
            log.warning(
                f"{str(self.folder)!r}: {entry.name!r} has {len(whole)} rows, config.json's vocabulary {entry.operation.size}, and rows "
                f"beyond are not 0: padding of Megatron-LM's, or tokens that --template does not know"
            )
        tensors = entry.operation.separate(whole)
        return [
            _finite(name, tensor.to(self._entry_dtype(entry)))
            for name, tensor in zip(entry.hf, tensors, strict=True)
        ]

    def _verify(self, written: SafetensorsFolder, entries: list[Entry]) -> None:
        for entry in entries:
            _compare(entry, [written.get(name) for name in entry.hf], self._read(entry))

    def _shards(self, limit: int) -> dict[str, list[Entry]]:
        """File name -> what it holds."""
        shards: list[list[Entry]] = []
        room = 0
        for entry in self.table.entries:
            if self._nbytes(entry) > room:
                shards.append([])
                room = limit
            shards[-1].append(entry)
            room -= self._nbytes(entry)
        files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        if len(shards) == 1:
            files = ["model.safetensors"]
        for shard in shards:  # tensors of wide numbers first keeps all of them aligned
            shard.sort(key=lambda entry: -self._entry_dtype(entry).itemsize)
        return dict(zip(files, shards, strict=True))

    def _write_file(self, path: Path, entries: list[Entry], advance: Advance) -> None:
        announced = [
            (name, self._entry_dtype(entry), shape)
            for entry in entries
            for name, shape in zip(entry.hf, entry.hf_shapes, strict=True)
        ]
        with (
            SafetensorsFile(path, announced) as file,
            closing(read_ahead(entries, self._read, self._nbytes)) as read,
        ):
            for entry, tensors in read:
                for name, tensor in zip(entry.hf, tensors, strict=True):
                    file.write(name, tensor)
                advance(self._nbytes(entry))

    def _check(self) -> None:
        stored = self._source.tensors
        stacked = not any(key.startswith("decoder.layers.0.") for key in stored)
        known: set[str] = set()
        for entry in self.table.entries:
            places = self.table.places(entry, stacked=stacked)
            present = [place for place in places if place.key in stored]
            if not present:
                raise InputError(
                    f"{str(self.folder)!r} lacks {places[0].key!r}, of which {entry.hf[0]!r} is made: is --template right?"
                )
            place = self._places[entry.name] = present[0]
            known.update(place.key for place in present)
            size, depth = tuple(stored[place.key].size), len(place.index)
            fits = size[depth:] == entry.shape
            if isinstance(entry.operation, Vocabulary):  # padded by the layout it was saved in
                fits = size[0] >= entry.operation.size and size[1:] == entry.shape[1:]
            if not fits or size[:depth] != place.axes:
                raise InputError(
                    f"{str(self.folder)!r}: {place.key!r} is {size}, config.json asks for {(*place.axes, *entry.shape)}: "
                    f"is --template right?"
                )
        extra = sorted(key for key in stored if key not in known and not _OPTIMIZER.match(key))
        if extra:
            raise InputError(
                f"{str(self.folder)!r} has {len(extra)} tensors that config.json does not ask for, the first {extra[0]!r}"
            )


def inspect_checkpoint(path: Path) -> dict[str, str]:
    """What a folder of either kind holds, by label; ``whole`` is ``yes``, or says what is wrong.

    Raises:
        InputError: neither a Hugging Face folder with safetensors nor a torch_dist checkpoint.
    """
    if (path / LATEST).is_file() or (path / ".metadata").is_file():
        return _inspect_megatron(checkpoint_folder(path))
    table, source = ConversionTable(path), SafetensorsFolder(path)
    about = {
        "kind": "Hugging Face",
        "family": table.hf.model_type,
        "parameters": _parameters(table),
        "dtypes": _dtypes(Counter(source.dtype(name) for name in source.names)),
        "layout": f"{len(source.files)} safetensors files",
    }
    return about | {"whole": _whole(lambda: HFToMegatron(path))}


def _inspect_megatron(folder: Path) -> dict[str, str]:
    about = {"kind": "Megatron torch_dist"}
    try:
        table = ConversionTable(companion_folder(folder))
        about |= {"family": table.hf.model_type, "parameters": _parameters(table)}
    except InputError:
        about["family"] = "unknown: no config.json comes with it"
    numbered = re.fullmatch(r"iter_(\d+)", folder.name)
    about["step"] = str(int(numbered[1])) if numbered else folder.name
    try:
        source = TorchDistReader(folder)
    except InputError as error:
        return about | {"whole": f"no: {error}"}
    weights = {key: tensor for key, tensor in source.tensors.items() if not _OPTIMIZER.match(key)}
    stacked = not any(key.startswith("decoder.layers.0.") for key in weights)
    about |= {
        "dtypes": _dtypes(Counter(tensor.properties.dtype for tensor in weights.values())),
        "layout": f"{len(source.files)} files, {len(weights)} tensors, {'layers stacked' if stacked else 'layers apart'}",
        "optimizer": "yes" if len(weights) < len(source.tensors) else "no",
    }
    unknown = about["family"].startswith("unknown")
    return about | {"whole": about["family"] if unknown else _whole(lambda: MegatronToHF(folder, None, None))}


def _whole(opened: Callable[[], Any]) -> str:
    try:
        opened()
    except InputError as error:
        return f"no: {error}"
    return "yes"


def _parameters(table: ConversionTable) -> str:
    return f"{table.numel:,} in all" + (f", {table.active_numel:,} active" if table.num_experts else "")


def _dtypes(counts: Counter[torch.dtype]) -> str:
    return ", ".join(
        f"{str(dtype).removeprefix('torch.')} ({count} tensors)" for dtype, count in counts.most_common()
    )


def _line(entry: Entry, place: Place, shape: tuple[int, ...], dtype: torch.dtype) -> str:
    index = str(list(place.index)) if place.index else ""
    return f"{' + '.join(entry.hf)} <-> {place.key}{index} <-> {shape} {str(dtype).removeprefix('torch.')}"


def _hub_shapes(hf: Any) -> dict[str, tuple[int, ...]]:
    """Name on the hub -> shape, of every tensor that transformers would save for this config."""
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(hf)
    except (ValueError, TypeError, AssertionError) as error:
        raise InputError(
            f"transformers makes no model of this config.json ({' '.join(str(error).split())}): correct it"
        ) from None
    tensors: dict[str, Tensor] = revert_weight_conversion(model, model.state_dict())
    return {
        name: tuple(tensor.shape)
        for name, tensor in tensors.items()
        if not (hf.tie_word_embeddings and name == "lm_head.weight")
    }


@cache  # models repeat a few shapes for thousands of parameters
def _joined_shape(operation: Operation, shapes: tuple[tuple[int, ...], ...]) -> tuple[int, ...]:
    return tuple(operation.join([torch.empty(shape, device="meta") for shape in shapes]).shape)


def _natural(name: str) -> list[str]:
    """Sorts layer 2 before layer 10."""
    return [part.zfill(6) if part.isdigit() else part for part in name.split(".")]


def _share(entries: list[Entry], sizes: list[int]) -> list[Entry]:
    """This rank's part: neighbours, about as many bytes as every other rank's."""
    total = max(1, sum(sizes))
    middles = (end - size / 2 for end, size in zip(accumulate(sizes), sizes, strict=True))
    return [
        entry
        for entry, middle in zip(entries, middles, strict=True)
        if int(middle * world_size() / total) == rank()
    ]


def _finite(name: str, tensor: Tensor) -> Tensor:
    """The tensor itself. Its sum is NaN or infinite if an element is, and costs little; only then is it worth looking closer."""
    if tensor.is_floating_point() and not math.isfinite(tensor.sum()) and not tensor.isfinite().all():
        raise InputError(
            f"tensor {name!r} holds NaN or infinite numbers: the weights are broken, use another copy or step"
        )
    return tensor


def _compare(entry: Entry, written: list[Tensor], wanted: list[Tensor]) -> None:
    for name, ours, theirs in zip(entry.hf, written, wanted, strict=True):
        same = ours.dtype == theirs.dtype and torch.equal(_bits(ours), _bits(theirs))
        if not same:
            raise InputError(
                f"{name!r} read back differs from what was written: check the disk and convert again"
            )


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


@contextmanager
def _agreed() -> Iterator[None]:
    """One rank's problem is raised on every rank, so that nobody is left waiting in a collective."""
    problem = mistake = None
    try:
        yield
    except InputError as error:
        problem = str(error)
    except OSError as error:
        problem = (
            f"writing failed ({error.strerror or error}): free space or choose another disk, and run again"
        )
    except Exception as error:  # ours: the others must not wait for this rank, which tells where it happened
        problem, mistake = f"{type(error).__name__} on rank {rank()}: {error}", error
    problems = [problem for problem in all_gather_objects(problem) if problem]
    if mistake:
        raise mistake
    if problems:
        raise InputError(problems[0])


@contextmanager
def _written_aside(final: Path, nbytes: int) -> Iterator[Path]:
    """A folder beside ``final`` that takes its name once it is whole and on the disk, and vanishes on an error (collective)."""
    partial = final.with_name(f".partial_{final.name}")
    try:
        with _agreed():
            if rank() == 0:
                _make_room(final, partial, nbytes)
        yield partial
        with _agreed():
            if rank() == 0:
                files.publish(partial, final)
    except BaseException:
        if rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise


def _make_room(final: Path, partial: Path, nbytes: int) -> None:
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        raise InputError(f"{str(final)!r} exists: choose another folder or remove it")
    shutil.rmtree(partial, ignore_errors=True)  # of a conversion that was killed
    partial.mkdir(parents=True)
    free = shutil.disk_usage(partial).free
    if free < nbytes:
        raise InputError(
            f"{str(final)!r} needs {nbytes / 1e9:.2f} GB and its disk has {free / 1e9:.2f} GB free: choose another disk"
        )
