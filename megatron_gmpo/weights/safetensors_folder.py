"""Read and write Hugging Face safetensors folders with one tensor in memory at a time.

The safetensors library reads the files with its ``pread`` backend. Its default backend maps them into memory,
and every byte that was read counts as resident memory. The library writes only complete dictionaries, so
``SafetensorsFile`` writes tensor by tensor.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterable, KeysView
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..distributed import rank
from ..errors import InputError, one_line
from ..models.folder import MAX_EXPERTS, read_json
from ..models.fp8_blocks import BLOCK, SCALE, dequantize, scale_shape
from ..models.hub import embedding_name, hub_names, stacks_experts
from .weight_files import INDEX, weight_files

logger = logging.getLogger(__name__)

_HEAD = "lm_head.weight"
_DERIVED = ".rotary_emb.inv_freq"  # a buffer in old Llama folders; config.json determines it
_MAX_TENSORS, _MAX_NAME = 400_000, 1_000  # Kimi-K2 has 140,000 tensors
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in ``file`` under ``key``, or the part of it that ``part`` selects, maybe transposed."""

    file: str
    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    part: tuple[int | slice, ...] | None = None
    transposed: bool = False


class SafetensorsFolder:
    """The tensors of a Hugging Face folder, in one file or sharded, by the hub's names of its family.

    Tensors stored under transformers' own names appear under the hub's names, and experts fused in one tensor
    appear one by one (see ``models.hub``). FP8 weights with block scales (``models.fp8_blocks``) appear as
    bfloat16.

    Args:
        path: the folder, including a config.json.
        left_out: prefixes of names to skip, with a warning.

    Raises:
        InputError: the folder has no safetensors, or two sets of them; the index names a missing file or
            tensor; a file is truncated or is not a safetensors file; two files hold the same tensor; FP8
            weights have no scales of 128 x 128 blocks.
    """

    def __init__(self, path: str | Path, left_out: tuple[str, ...] = ()) -> None:
        self.path = Path(path)
        self.files, listed = weight_files(self.path)
        self._opened = {file: self._open(file) for file in sorted(self.files)}
        # the pread backend reads the complete tensor to return a part of it, so map one file at a time here
        self._mapped = lru_cache(maxsize=1)(lambda file: safe_open(self.path / file, "pt"))
        stored = self._stored(listed)
        if skipped := [name for name in stored if name.startswith(left_out)]:
            stored = {name: tensor for name, tensor in stored.items() if not name.startswith(left_out)}
            if rank() == 0:
                logger.warning(
                    f"{str(path)!r}: {len(skipped)} tensors of layers for multi-token prediction are "
                    f"skipped, the first {min(skipped)!r}"
                )
        self._scales = {name: tensor for name, tensor in stored.items() if name.endswith(SCALE)}
        self._tensors: dict[str, StoredTensor] = {}
        config = read_json(self.path / "config.json")
        model_type: str = config["model_type"]
        text = config.get("text_config") or {}
        width = text.get("hidden_size") if stacks_experts(model_type) else None
        for name, tensor in stored.items():
            if name not in self._scales:
                self._tensors.update(_unfused(hub_names(name, model_type), tensor, width))
        self._embedding = embedding_name(config)
        is_tied = config.get("tie_word_embeddings")
        if is_tied and self._embedding not in self._tensors and _HEAD in self._tensors:
            self._tensors[self._embedding] = self._tensors.pop(_HEAD)  # as transformers does (tie_weights)
        self._check_scales(config.get("quantization_config") or {})

    def _stored(self, listed: dict[str, str]) -> dict[str, StoredTensor]:
        """Return the tensors by stored name."""
        tensors: dict[str, StoredTensor] = {}
        for file, opened in self._opened.items():
            names = opened.keys()
            if (total := len(tensors) + len(names)) > _MAX_TENSORS:
                raise InputError(
                    f"{str(self.path)!r} holds {total} tensors or more, and {_MAX_TENSORS} is the limit: use "
                    "another model"
                )
            if (longest := max(map(len, names), default=0)) > _MAX_NAME:
                raise InputError(
                    f"{self.path / file} has a tensor whose name has {longest} characters, and {_MAX_NAME} "
                    "is the limit: use another model"
                )
            for name in names:
                if name in tensors:
                    raise InputError(
                        f"{str(self.path)!r}: {tensors[name].file} and {file} both hold {name!r}: "
                        "remove the older file, or save the model again"
                    )
                tensors[name] = self._stored_tensor(file, name)
        for name, file in listed.items():
            if name not in tensors or tensors[name].file != file:
                raise InputError(
                    f"{self.path / INDEX} says that {file} holds {name!r}, but it does not: "
                    "download the model again"
                )
        return {name: tensor for name, tensor in tensors.items() if not name.endswith(_DERIVED)}

    def _stored_tensor(self, file: str, name: str) -> StoredTensor:
        view = self._opened[file].get_slice(name)
        code = view.get_dtype()
        if code not in _DTYPES:
            raise InputError(
                f"{self.path / file}: {name!r} has dtype {code}, which is not supported: "
                "give the model in bf16"
            )
        return StoredTensor(file, name, _DTYPES[code], tuple(view.get_shape()))

    def _check_scales(self, quantization: dict[str, Any]) -> None:
        where = f"{str(self.path)!r}"
        for name, tensor in self._tensors.items():
            is_fp8 = tensor.dtype.itemsize == 1 and tensor.dtype.is_floating_point
            if is_fp8 and name + SCALE not in self._scales:
                raise InputError(
                    f"{where}: {name!r} is FP8 without a scale for each block: give the model in bf16"
                )
        block_size = quantization.get("weight_block_size", [BLOCK, BLOCK])
        for name, scale in self._scales.items():
            weight = self._tensors.get(name.removesuffix(SCALE))
            if not weight or scale.shape != scale_shape(weight.shape) or block_size != [BLOCK, BLOCK]:
                raise InputError(
                    f"{where}: {name!r} {scale.shape} is no scale of blocks of {BLOCK} x {BLOCK}: "
                    "give the model in bf16"
                )

    def check_tied(self) -> None:
        """Check a folder whose config ties the output layer to the embedding.

        Raises:
            InputError: the folder has a different output layer, which transformers would use.
        """
        if _HEAD in self.names and not torch.equal(self.get(_HEAD), self.get(self._embedding)):
            raise InputError(
                f"{str(self.path)!r}: 'lm_head.weight' differs from the embedding: "
                "set tie_word_embeddings = false in config.json"
            )

    @property
    def names(self) -> KeysView[str]:
        return self._tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of ``get(name)``."""
        return torch.bfloat16 if name + SCALE in self._scales else self._tensors[name].dtype

    def get(self, name: str) -> Tensor:
        """Read the tensor into CPU memory."""
        tensor = self._read(self._tensors[name])
        scale = self._scales.get(name + SCALE)
        return tensor if scale is None else dequantize(tensor, self._read(scale))

    def _read(self, stored: StoredTensor) -> Tensor:
        path = self.path / stored.file
        try:
            if stored.part is None:
                return self._opened[stored.file].get_tensor(stored.key)
            part = self._mapped(stored.file).get_slice(stored.key)[stored.part]
            return part.T.contiguous() if stored.transposed else part
        except (SafetensorError, OSError) as error:  # the file changed after it was opened
            raise InputError(
                f"{path}: {stored.key!r} cannot be read ({error}): download the model again"
            ) from None

    def _open(self, name: str) -> Any:
        path = self.path / name
        try:
            return safe_open(path, "pt", backend="pread")
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"{path}, {path.stat().st_size} bytes, cannot be read as safetensors ({one_line(error)}): "
                "download the model again"
            ) from None


class SafetensorsFile:
    """A safetensors file, written tensor by tensor inside a ``with`` block.

    The format is 8 bytes of header length, a JSON header ``{name: {dtype, shape, data_offsets}}``, and the
    tensors' bytes end to end (github.com/huggingface/safetensors).

    Args:
        path: the file to write.
        tensors: names, dtypes and shapes of the tensors, in the order of the calls of ``write``.
    """

    def __init__(self, path: Path, tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, dtype, shape in tensors:
            start, end = end, end + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        del header["__metadata__"]
        self._todo = [(name, about["data_offsets"][1]) for name, about in header.items()]
        self._done = 0
        self._file: IO[bytes] = path.open("wb", buffering=0)
        self._write(memoryview(len(text).to_bytes(8, "little") + text))

    def write(self, name: str, tensor: Tensor) -> None:
        """Write the next tensor, or the next part of it along its first axis."""
        expected, end = self._todo[0]
        self._done += tensor.nbytes
        assert name == expected
        assert self._done <= end
        if self._done == end:
            self._todo.pop(0)
        self._write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)

    def _write(self, data: memoryview) -> None:
        done = 0
        while done < len(data):
            done += self._file.write(data[done:])

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if not kind:
            os.fsync(self._file.fileno())
        self._file.close()
        assert kind or not self._todo


def _unfused(names: tuple[str, ...], tensor: StoredTensor, width: int | None) -> dict[str, StoredTensor]:
    """Return the parts of a fused expert tensor by name, one per expert, or any other tensor by its name.

    Args:
        width: size of the hidden states if the tensor may be transposed; its axis tells whether it is.
    """
    if "{e}" not in names[0] or len(tensor.shape) != 3 or tensor.shape[0] > MAX_EXPERTS:
        return {names[0]: tensor}
    parts, (experts, rows, columns) = len(names), tensor.shape
    # gate and up projections have ``width`` columns, a down projection has ``width`` rows
    transposed = width is not None and width != (columns if parts > 1 else rows)
    if transposed:
        rows, columns = columns, rows
    if rows % parts:
        return {names[0]: tensor}  # an unknown name
    height = rows // parts

    def part(expert: int, place: int) -> StoredTensor:
        of_rows = slice(place * height, (place + 1) * height)
        part = (expert, slice(None), of_rows) if transposed else (expert, of_rows)
        return StoredTensor(tensor.file, tensor.key, tensor.dtype, (height, columns), part, transposed)

    return {
        name.replace("{e}", str(expert)): part(expert, place)
        for expert in range(experts)
        for place, name in enumerate(names)
    }
