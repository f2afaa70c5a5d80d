"""Hugging Face safetensors folders, one tensor in memory at a time.

The file format is 8 bytes of header length, a JSON header ``{name: {dtype, shape, data_offsets}}``, and the tensors' bytes end to end
(github.com/huggingface/safetensors). The library maps files into memory, which counts every byte read as resident, and writes only whole
dictionaries; reading and writing by offset does neither.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterable, KeysView
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from ..distributed import rank
from ..errors import InputError
from ..models.fp8_blocks import BLOCK, SCALE, dequantize, scale_shape
from ..models.hub import hub_names

logger = logging.getLogger(__name__)

INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_DERIVED = (
    ".rotary_emb.inv_freq"  # a buffer that folders of Llama 2's time store; it follows from config.json
)
_PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}
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
    """Where a tensor lies: ``start`` is its first byte in ``file``."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsFolder:
    """Tensors of a Hugging Face folder by the names its family has on the hub, sharded over files or not.

    Tensors stored under transformers' own names appear under those of the hub: experts fused in one tensor, one by one (see
    ``models.hub``). FP8 weights with block scales (``models.fp8_blocks``) appear as bfloat16.

    Args:
        path: the folder, with a config.json.
        left_out: tensors whose names begin so are passed over, with a warning.

    Raises:
        InputError: no safetensors there, weights in pickle files, an index that names an absent file, a file that is truncated or is
            no safetensors file, FP8 weights without scales of 128 x 128 blocks.
    """

    def __init__(self, path: str | Path, left_out: tuple[str, ...] = ()) -> None:
        self.path = Path(path)
        if pickles := sorted(file.name for file in self.path.glob("*") if file.suffix in _PICKLES):
            raise InputError(
                f"{str(path)!r} holds {pickles[0]!r}, a pickle, which can run code when read: keep safetensors only"
            )
        self.files: set[str]
        if (self.path / INDEX).is_file():
            listed = _read_index(self.path / INDEX)
            self.files = set(listed.values())
        elif (self.path / _SINGLE).is_file():
            listed, self.files = None, {_SINGLE}
        else:
            raise InputError(
                f"{str(path)!r} holds no model.safetensors: give a Hugging Face model folder with safetensors weights"
            )
        stored = {file: self._read_header(file) for file in sorted(self.files)}
        listed = listed or {}
        flat = {
            name: tensor
            for file, tensors in stored.items()
            for name, tensor in tensors.items()
            if listed.get(name, file) == file
        }
        for name, file in listed.items():
            if name not in stored[file]:
                raise InputError(
                    f"{self.path / INDEX} says that {file} holds {name!r}, which it does not: fetch the model again"
                )
        if passed_over := [name for name in flat if name.startswith(left_out)]:
            flat = {name: tensor for name, tensor in flat.items() if not name.startswith(left_out)}
            if rank() == 0:
                logger.warning(
                    f"{str(path)!r}: {len(passed_over)} tensors of layers for multi-token prediction are not carried over, "
                    f"the first {min(passed_over)!r}"
                )
        flat = {name: tensor for name, tensor in flat.items() if not name.endswith(_DERIVED)}
        self._scales = {name: tensor for name, tensor in flat.items() if name.endswith(SCALE)}
        self._tensors: dict[str, StoredTensor] = {}
        config: dict[str, Any] = json.loads((self.path / "config.json").read_text())
        for name, tensor in flat.items():
            if name not in self._scales:
                self._tensors.update(_unfused(hub_names(name, config["model_type"]), tensor))
        self._check_scales(config.get("quantization_config") or {})

    def _check_scales(self, quantization: dict[str, Any]) -> None:
        where = f"{str(self.path)!r}"
        for name, tensor in self._tensors.items():
            if (
                tensor.dtype.itemsize == 1
                and tensor.dtype.is_floating_point
                and name + SCALE not in self._scales
            ):
                raise InputError(
                    f"{where}: {name!r} is FP8 without a scale for each block: give the model in bf16"
                )
        for name, scale in self._scales.items():
            weight = self._tensors.get(name.removesuffix(SCALE))
            blocks = weight and scale_shape(weight.shape)
            if scale.shape != blocks or quantization.get("weight_block_size", [BLOCK, BLOCK]) != [
                BLOCK,
                BLOCK,
            ]:
                raise InputError(
                    f"{where}: {name!r} {scale.shape} is no scale of blocks of {BLOCK} x {BLOCK}: give the model in bf16"
                )

    def check_tied(self) -> None:
        """For a model whose output layer is its embedding.

        Raises:
            InputError: it has an output layer of its own all the same, which transformers would use.
        """
        if "lm_head.weight" in self.names and not torch.equal(
            self.get("lm_head.weight"), self.get("model.embed_tokens.weight")
        ):
            raise InputError(
                f"{str(self.path)!r}: 'lm_head.weight' is not the embedding: set tie_word_embeddings = false in config.json"
            )

    @property
    def names(self) -> KeysView[str]:
        return self._tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """The dtype ``get`` gives."""
        return torch.bfloat16 if name + SCALE in self._scales else self._tensors[name].dtype

    def get(self, name: str) -> Tensor:
        """The tensor on the CPU."""
        tensor = self._read(self._tensors[name])
        scale = self._scales.get(name + SCALE)
        return tensor if scale is None else dequantize(tensor, self._read(scale))

    def _read(self, stored: StoredTensor) -> Tensor:
        data = torch.empty(stored.nbytes, dtype=torch.uint8)
        with (self.path / stored.file).open("rb", buffering=0) as file:
            file.seek(stored.start)
            view, done = data.numpy().data, 0
            while done < stored.nbytes:
                got = file.readinto(view[done:])
                if not got:
                    raise InputError(f"{self.path / stored.file} ends too early: fetch the model again")
                done += got
        return data.view(stored.dtype).view(stored.shape)

    def _read_header(self, name: str) -> dict[str, StoredTensor]:
        path = self.path / name
        if not path.is_file():
            raise InputError(f"{self.path / INDEX} names {name!r}, which is not there: fetch the model again")
        size = path.stat().st_size
        try:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header: dict[str, Any] = json.loads(file.read(length if length <= size else 0))
            header.pop("__metadata__", None)
            tensors = {
                tensor: StoredTensor(
                    name,
                    _DTYPES[about["dtype"]],
                    tuple(about["shape"]),
                    8 + length + about["data_offsets"][0],
                )
                for tensor, about in header.items()
            }
            ends = [8 + length + about["data_offsets"][1] for about in header.values()]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{path} cannot be read as safetensors ({type(error).__name__}: {error}): fetch the model again"
            ) from None
        if max(ends, default=0) != size or any(
            tensor.start + tensor.nbytes > size for tensor in tensors.values()
        ):
            raise InputError(
                f"{path} has {size} bytes where its header tells of {max(ends, default=0)}: fetch the model again"
            )
        return tensors


class SafetensorsFile:
    """One file, written tensor by tensor in the order announced; ``with SafetensorsFile(path, [(name, dtype, shape)]) as file``."""

    def __init__(self, path: Path, tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, dtype, shape in tensors:
            start, end = end, end + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._todo = [
            (name, about["data_offsets"]) for name, about in header.items() if name != "__metadata__"
        ]
        self._file: IO[bytes] = path.open("wb", buffering=0)
        self._write(memoryview(len(text).to_bytes(8, "little") + text))

    def write(self, name: str, tensor: Tensor) -> None:
        expected, (start, end) = self._todo.pop(0)
        assert (name, tensor.nbytes) == (expected, end - start)
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


def _read_index(index: Path) -> dict[str, str]:
    try:
        return dict(json.loads(index.read_text())["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{index} cannot be read ({type(error).__name__}): fetch the model again") from None


def _unfused(names: tuple[str, ...], tensor: StoredTensor) -> dict[str, StoredTensor]:
    """A fused expert tensor as the per-expert ones it consists of; any other as itself."""
    if "{e}" not in names[0] or len(tensor.shape) != 3 or tensor.shape[1] % len(names):
        return {names[0]: tensor}
    experts, rows, columns = tensor.shape
    shape = (rows // len(names), columns)
    nbytes = math.prod(shape) * tensor.dtype.itemsize
    return {
        part.format(e=expert): StoredTensor(
            tensor.file, tensor.dtype, shape, tensor.start + (expert * len(names) + place) * nbytes
        )
        for expert in range(experts)
        for place, part in enumerate(names)
    }
