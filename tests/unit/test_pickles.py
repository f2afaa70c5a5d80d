"""Code in a checkpoint's pickles is refused before it runs; plain records and tensors are read."""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_gmpo.errors import InputError
from megatron_gmpo.weights.pickles import check_plain, read_metadata

from ..support.conversion_cases import Evil


def saved(item: object) -> bytes:
    torch.save(item, buffer := io.BytesIO())
    return buffer.getvalue()


def as_bytes(item: object) -> torch.Tensor:
    """Return the form in which Transformer Engine stores an ``_extra_state``: a pickle in a byte tensor."""
    return torch.from_numpy(np.frombuffer(pickle.dumps(item), dtype=np.uint8).copy())


class LoadsBytes:
    """Pickles to ``torch.storage._load_from_bytes``, which unpickles without limits."""

    def __init__(self, item: object) -> None:
        self.data = saved(item)

    def __reduce__(self) -> tuple[Any, ...]:
        return torch.storage._load_from_bytes, (self.data,)


@pytest.mark.parametrize(
    "item",
    [
        None,
        [None],
        torch.empty(0, dtype=torch.uint8),
        [torch.arange(3)],
        {"iteration": 3, "checkpoint_version": 3.0},
        as_bytes({"scale": torch.ones(2), "extra_fp8_variables": {"a": OrderedDict(b=torch.bfloat16)}}),
        [as_bytes({"amax": torch.ones(4, 2), "shape": torch.Size([2])})],
    ],
)
def test_plain_records_are_read(item: object) -> None:
    check_plain(saved(item))


@pytest.mark.parametrize("where", ["object", "list", "bytes", "bytes in a list", "storage in bytes"])
def test_code_is_refused_before_it_runs(where: str, tmp_path: Path) -> None:
    evil = Evil(tmp_path / "evil")
    item = {
        "object": evil,
        "list": [None, {"a": evil}],
        "bytes": as_bytes(evil),
        "bytes in a list": [as_bytes({"recipe": evil})],
        "storage in bytes": [as_bytes(LoadsBytes(evil))],
    }[where]
    with pytest.raises(pickle.UnpicklingError):
        check_plain(saved(item))
    assert not (tmp_path / "evil").exists()


def metadata() -> Metadata:
    tensor = TensorStorageMetadata(
        TensorProperties(torch.bfloat16),
        torch.Size([2, 3]),
        [ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([2, 3]))],
    )
    return Metadata({"weight": tensor, "state": BytesStorageMetadata()})


def test_metadata_is_read(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata()))
    assert read_metadata(tmp_path / ".metadata") == metadata()


def test_damaged_metadata_is_one_line(tmp_path: Path) -> None:
    """Cut or flipped at any place, it is refused or read, and never a traceback."""
    content = pickle.dumps(metadata())
    rng = np.random.default_rng(0)
    changed = [content[:length] for length in range(0, len(content), 7)] + [b"", b"[1]", pickle.dumps([1])]
    for at in rng.integers(len(content), size=200):
        changed.append(bytes([*content[:at], content[at] ^ (1 << rng.integers(8)), *content[at + 1 :]]))
    lines = []
    for damaged in changed:
        (tmp_path / ".metadata").write_bytes(damaged)
        try:
            read_metadata(tmp_path / ".metadata")
        except InputError as error:
            lines.append(str(error))
    assert len(lines) > len(changed) / 2
    assert all(line.startswith(str(tmp_path / ".metadata")) and "\n" not in line for line in lines)
    with pytest.raises(InputError, match=r"\.metadata cannot be trusted or read \(.*No such file"):
        read_metadata(tmp_path / "none" / ".metadata")


def test_code_in_metadata_is_refused(tmp_path: Path) -> None:
    for item in (
        Evil(tmp_path / "evil"),
        [metadata(), Evil(tmp_path / "evil")],
        LoadsBytes(Evil(tmp_path / "evil")),
    ):
        (tmp_path / ".metadata").write_bytes(pickle.dumps(item))
        with pytest.raises(InputError, match="save the checkpoint again"):
            read_metadata(tmp_path / ".metadata")
    assert not (tmp_path / "evil").exists()
