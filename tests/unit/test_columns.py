"""Every column, including a user's, is checked, split, packed, sharded, moved and saved as documented."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from megatron_gmpo.batch.columns import (
    COLUMNS,
    PER_LAYER_COLUMNS,
    Column,
    Microbatch,
    OptionalColumns,
    TrainBatch,
)
from megatron_gmpo.batch.packing import pack
from megatron_gmpo.errors import InputError
from megatron_gmpo.policy.routing import Routing

quick = settings(deadline=None, max_examples=40)

EXTRA = {
    "teacher_logprobs": Column(torch.float32, "predicted", padding=-7.5),
    "input_kind": Column(torch.int64, "input", padding=-3),
    "difficulty": Column(torch.float32, "sequence", padding=2),
    "teacher_topk": Column(torch.float32, "predicted", dims=("k",)),
}
ALL = COLUMNS | EXTRA
SIZES = {"layers": 3, "topk": 2, "k": 5}


def content(column: Column, rows: int, generator: torch.Generator) -> Tensor:
    """Return integers from 1 to 99, which differ from padding, or random bools."""
    shape = (rows, *(SIZES[name] for name in column.dims))
    if column.dtype == torch.bool:
        return torch.rand(shape, generator=generator) < 0.5
    return torch.randint(1, 100, shape, generator=generator).to(column.dtype)


def batch_of(lengths: list[int]) -> TrainBatch:
    """Return a batch with every column."""
    generator = torch.Generator().manual_seed(0)
    rows = {"sequence": len(lengths), "input": sum(lengths), "predicted": sum(lengths)}
    values = {name: content(column, rows[column.aligned_to], generator) for name, column in ALL.items()}
    values["lengths"] = torch.tensor(lengths)
    extra = {name: values.pop(name) for name in EXTRA}
    return TrainBatch(**values, extra=extra, extra_columns=EXTRA)


def value(of: TrainBatch | Microbatch, name: str) -> Tensor:
    return of.extra[name] if name in EXTRA else getattr(of, name)


@quick
@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(1, 10))
def test_split_cuts_every_column(lengths: list[int], parts: int) -> None:
    batch = batch_of(lengths)
    split = batch.split(parts)
    for name, column in ALL.items():
        whole = value(batch, name)
        assert torch.equal(torch.cat([value(part, name) for part in split]), whole), name
        for part in split:
            rows = len(part) if column.aligned_to == "sequence" else int(part.lengths.sum())
            assert value(part, name).shape == (rows, *whole.shape[1:])
    assert all(part.extra_columns == EXTRA for part in split)


@quick
@given(st.data())
def test_pack_takes_and_pads_every_column(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=6))
    sequences = data.draw(st.lists(st.sampled_from(range(len(lengths))), unique=True))
    cp_size = data.draw(st.sampled_from([1, 2]))
    batch = batch_of(lengths)
    for cp_rank in range(cp_size):
        multiple = 2 * cp_size if cp_size > 1 else 1
        packed = pack(
            batch, sequences, cp_size=cp_size, cp_rank=cp_rank, sequence_multiple=multiple, total_multiple=8
        )
        index = {
            "input": packed.input_index.tolist(),
            "predicted": packed.flat_index.tolist(),
            "sequence": sequences or [-1],
        }
        for name, column in ALL.items():
            if name == "lengths":
                continue
            found, whole = value(packed, "mask" if name == "response_mask" else name), value(batch, name)
            padding = torch.full(whole.shape[1:], column.padding, dtype=column.dtype)
            expected = [whole[i] if i >= 0 else padding for i in index[column.aligned_to]]
            assert torch.equal(found, torch.stack(expected)), name
            assert found.dtype == column.dtype
        expected = [int(batch.tokens[i]) if i >= 0 else 0 for i in index["predicted"]]
        assert packed.labels.tolist() == expected


def test_every_tensor_of_a_microbatch_moves() -> None:
    moved = pack(batch_of([3, 5]), [1, 0]).to(torch.device("meta"))
    tensors = [getattr(moved, f.name) for f in fields(moved) if f.name not in ("extra", "bounds")]
    assert len(tensors) == len(fields(Microbatch)) - 2
    assert all(tensor.is_meta for tensor in [*tensors, *moved.extra.values()])
    assert moved.extra.keys() == EXTRA.keys()


def test_columns_of_layers_are_cut_to_a_ranks_slots_and_layers() -> None:
    packed = pack(batch_of([3, 5]), [1, 0])
    chunk: Any = object()
    routing: Any = object.__new__(Routing)
    routing.hooks = {chunk: {0: None, 2: None}}
    routing._tp_group = SimpleNamespace(size=lambda: 2, rank=lambda: 1)
    cut = routing.cut(packed, chunk)
    assert set(PER_LAYER_COLUMNS) == {"routed_experts", "router_scores"}
    for name in ALL.keys() - {"lengths", "response_mask"}:
        whole = value(packed, name)
        assert torch.equal(value(cut, name), whole[4:, [0, 2]] if name in PER_LAYER_COLUMNS else whole), name


def test_without_layers() -> None:
    batch = batch_of([3, 5])
    rest = batch.without_layers()
    for name in ALL:
        assert value(rest, name) is (None if name in PER_LAYER_COLUMNS else value(batch, name)), name


def test_save_writes_every_column(tmp_path: Path) -> None:
    batch = batch_of([3, 5, 2]).split(2)[1]
    batch.ref_logprobs = None
    batch.save(tmp_path / "batch.safetensors")
    found = load_file(tmp_path / "batch.safetensors")
    names = {name: f"extra.{name}" if name in EXTRA else name for name in ALL if name != "ref_logprobs"}
    assert found.keys() == set(names.values())
    for name, saved in names.items():
        assert torch.equal(found[saved], value(batch, name))


@pytest.mark.parametrize("name", [name for name in ALL if name not in ("tokens", "lengths")])
def test_a_column_of_a_wrong_type_is_refused_where_it_enters(name: str) -> None:
    batch = batch_of([3, 5])
    good = value(batch, name)
    other = torch.float64 if good.dtype != torch.float64 else torch.float32
    for bad in (good.to(other), good[:-1], good[..., None], good[0]):
        with pytest.raises(InputError, match=f"column '{name}' has dtype .* and shape .*, not") as error:
            enter(batch, name, bad)
        assert "\n" not in str(error.value)
        with pytest.raises(InputError, match=name):
            TrainBatch(
                **{field.name: getattr(batch, field.name) for field in fields(TrainBatch)}
                | ({"extra": batch.extra | {name: bad}} if name in EXTRA else {name: bad})
            )
    assert torch.equal(value(batch, name), good)


def enter(batch: TrainBatch, name: str, values: Tensor) -> None:
    if name in EXTRA:
        batch.add_extra(name, EXTRA[name], values)
    else:
        setattr(batch, name, values)


@pytest.mark.parametrize("name", ["tokens", "lengths"])
def test_tokens_and_lengths_of_a_wrong_type_are_refused(name: str) -> None:
    values = {name: getattr(batch_of([3, 5]), name) for name in COLUMNS}
    for bad in (values[name].int(), values[name][:, None]):
        with pytest.raises(InputError, match=f"column '{name}' has dtype .* and shape .*, not torch.int64"):
            TrainBatch(**values | {name: bad})


def test_an_extra_column_is_added() -> None:
    batch = TrainBatch(**{name: getattr(batch_of([3, 5]), name) for name in COLUMNS})
    before = batch.extra
    batch.add_extra("difficulty", EXTRA["difficulty"], torch.tensor([0.5, 0.25]))
    assert before == {}
    assert batch.extra_columns == {"difficulty": EXTRA["difficulty"]}
    assert pack(batch, [1]).extra["difficulty"].tolist() == [0.25]
    with pytest.raises(InputError, match="column 'old_logprobs' exists in every batch"):
        batch.add_extra("old_logprobs", EXTRA["teacher_logprobs"], torch.zeros(8))


def test_every_optional_field_is_a_column() -> None:
    shared = {field.name for field in fields(OptionalColumns)}
    assert shared - COLUMNS.keys() == {"extra"}
    assert COLUMNS.keys() - shared == {"tokens", "lengths", "response_mask", "advantages", "rollout_logprobs"}
