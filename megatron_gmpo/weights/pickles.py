"""Read the pickled parts of a Megatron checkpoint, and refuse code before it runs.

Unpickling can call any function. torch and Megatron unpickle ``.metadata`` and the objects in ``*.distcp``
files (``_extra_state`` of a module) without limits, and Transformer Engine unpickles the bytes inside an
``_extra_state``. ``torch.load`` reads ``common.pt`` with weights only.
"""

from __future__ import annotations

import io
import json
import pickle
import re
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from ..errors import InputError, one_line

_RECORDS = {
    "torch": {"Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))},
    "collections": {"OrderedDict"},
}
_METADATA = _RECORDS | {
    "torch.distributed.checkpoint.metadata": {
        "Metadata",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "MetadataIndex",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.planner": {"SavePlan", "WriteItem", "WriteItemType", "TensorWriteData"},
    "megatron.core.dist_checkpointing.strategies.torch": {"MCoreMetadata", "MCoreSavePlan"},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"PosixPath", "PurePosixPath", "Path"},
}
_FP8_STATE = _RECORDS | {
    "torch._utils": {"_rebuild_tensor_v2"},
    "megatron.core.extensions.transformer_engine": {"TEDelayedScaling"},
    "transformer_engine.common.recipe": {
        "Format",
        "_FormatHelper",
        "QParams",
        "MMParams",
        "DelayedScaling",
        "Float8CurrentScaling",
        "MXFP8BlockScaling",
        "Float8BlockScaling",
        "NVFP4BlockScaling",
    },
}
"""Tensors of scales and a recipe, which Transformer Engine pickles (module/base.py:get_extra_state)."""


class _PlainUnpickler(pickle.Unpickler):
    """Unpickle records of the ``allowed`` classes, by module, and refuse everything else."""

    def __init__(self, file: Any, allowed: Mapping[str, Set[str]]) -> None:
        super().__init__(file)
        self._allowed = allowed

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch.storage", "_load_from_bytes"):  # which unpickles without limits
            return lambda data: torch.load(io.BytesIO(data), weights_only=True)
        if name not in self._allowed.get(module, ()):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)


def read_metadata(path: Path) -> Metadata:
    """Return the content of a ``.metadata`` file.

    Raises:
        InputError: it is missing or damaged, or contains more than plain records.
    """
    try:
        with path.open("rb") as file:
            metadata = _PlainUnpickler(file, _METADATA).load()
    except (OSError, pickle.UnpicklingError, EOFError, AttributeError, ImportError, ValueError) as error:
        raise InputError(f"{path} cannot be trusted or read ({error}): save the checkpoint again") from None
    except Exception as error:  # damaged bytes may end in any exception
        raise InputError(
            f"{path} cannot be read ({type(error).__name__}): save the checkpoint again"
        ) from None
    if not isinstance(metadata, Metadata):
        raise InputError(f"{path} holds no metadata: save the checkpoint again")
    return metadata


@contextmanager
def plain_records_only(checkpoint: Path) -> Iterator[None]:
    """In the block, let Megatron read ``checkpoint`` without running code from it.

    Raises:
        InputError: a file asks for code, or cannot be read.
    """
    readers: Any = FileSystemReader
    planners: Any = DefaultLoadPlanner
    reads_metadata, loads_bytes = readers.read_metadata, planners.load_bytes
    found = read_metadata(checkpoint / ".metadata")

    def metadata(reader: Any, *_: Any, **__: Any) -> Metadata:
        found.storage_meta = found.storage_meta or StorageMeta()
        found.storage_meta.load_id = reader.load_id
        return found

    def load_bytes(planner: Any, item: Any, value: io.BytesIO) -> None:
        check_plain(value.getvalue())
        loads_bytes(planner, item, value)

    readers.read_metadata, planners.load_bytes = metadata, load_bytes
    try:
        yield
    except (CheckpointException, Exception) as error:  # the former is no Exception
        failures = error.failures.values() if isinstance(error, CheckpointException) else ()
        if refusal := _refusal(checkpoint, next((cause for cause, _ in failures), error)):
            raise refusal from None
        raise
    finally:
        readers.read_metadata, planners.load_bytes = reads_metadata, loads_bytes


def check_plain(data: bytes) -> None:
    """Check that the bytes of a saved object hold plain records and tensors only.

    Raises:
        pickle.UnpicklingError: they ask for code.
    """
    stored = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    for item in stored if isinstance(stored, list) else [stored]:
        if isinstance(item, Tensor) and item.dtype is torch.uint8 and item.numel():
            _PlainUnpickler(io.BytesIO(item.numpy().tobytes()), _FP8_STATE).load()


_DAMAGE = (CheckpointingException, pickle.UnpicklingError, json.JSONDecodeError, OSError, EOFError)


def _refusal(checkpoint: Path, error: BaseException) -> InputError | None:
    """Return the error to report if a file of the checkpoint is damaged or asks for code, else None."""
    if isinstance(error, InputError):
        return error
    if isinstance(error, AttributeError) and isinstance(error.__context__, FileNotFoundError):
        error = error.__context__  # Megatron 0.16.1 fails while it reports that common.pt is missing
    damaged = isinstance(error, _DAMAGE) or (
        isinstance(error, RuntimeError) and "PytorchStreamReader" in str(error)
    )
    line = one_line(error)
    if asked := re.search(r"Weights only load failed.*GLOBAL (\S+)", line):  # five lines of advice
        line = f"it asks for {asked[1]}"
    refusal = f"{checkpoint} cannot be trusted or read ({line[:200]}): use another checkpoint"
    return InputError(refusal) if damaged else None
