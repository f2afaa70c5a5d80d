"""Every column, including a user's, is checked, split, packed, sharded, moved and saved as documented."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from megatron_gmpo.batch.columns import (
    COLUMNS,
    Column,
    Microbatch,
    OptionalColumns,
    TrainBatch,
    turn_numbers,
)
from megatron_gmpo.batch.images import MicrobatchImages
from megatron_gmpo.batch.packing import pack
from megatron_gmpo.batch.plan import plan_step, planned
from megatron_gmpo.batch.samples import Sample
from megatron_gmpo.errors import InputError
from megatron_gmpo.policy.routing import Routing

quick = settings(deadline=None, max_examples=40)

EXTRA = {
    "teacher_logprobs": Column(torch.float32, "predicted", padding=-7.5),
    "input_kind": Column(torch.int64, "input", padding=-3),
    "difficulty": Column(torch.float32, "sequence", padding=2),
    "turn_cost": Column(torch.float32, "unit", padding=4),
    "teacher_topk": Column(torch.float32, "predicted", dims=("k",)),
}
ALL = COLUMNS | EXTRA
SIZES = {"layers": 3, "topk": 2, "k": 5, "axes": 3, "bytes": 16}
IMAGES = {"image_counts", "image_starts", "image_grids", "image_digests"}  # see test_images.py


def content(column: Column, rows: int, generator: torch.Generator) -> Tensor:
    """Return integers from 1 to 99, which differ from padding, or random bools."""
    shape = (rows, *(SIZES[name] for name in column.dims))
    if column.dtype == torch.bool:
        return torch.rand(shape, generator=generator) < 0.5
    return torch.randint(1, 100, shape, generator=generator).to(column.dtype)


def turns_of(lengths: list[int]) -> list[list[int]]:
    """Return the number of each token's turn, with 1, 2 or 3 turns in a sequence."""
    return [[t * (1 + i % 3) // length for t in range(length)] for i, length in enumerate(lengths)]


def images_of(lengths: list[int]) -> list[int]:
    """Return the number of images of each sequence: 0, 1 or 2."""
    return [i % 3 for i in range(len(lengths))]


def batch_of(lengths: list[int]) -> TrainBatch:
    """Return a batch with every column."""
    generator = torch.Generator().manual_seed(0)
    turns = turns_of(lengths)
    rows = {"sequence": len(lengths), "unit": sum(1 + of_sequence[-1] for of_sequence in turns)}
    rows["image"] = sum(images_of(lengths))
    values = {
        name: content(column, rows.get(column.aligned_to, sum(lengths)), generator)
        for name, column in ALL.items()
    }
    values["lengths"] = torch.tensor(lengths)
    values["image_counts"] = torch.tensor(images_of(lengths))
    values["turns"] = torch.tensor([t for of_sequence in turns for t in of_sequence], dtype=torch.int32)
    extra = {name: values.pop(name) for name in EXTRA}
    return TrainBatch(**values, extra=extra, extra_columns=EXTRA)


def value(of: TrainBatch | Microbatch, name: str) -> Tensor:
    return of.extra[name] if name in EXTRA else getattr(of, name)


@quick
@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(1, 10), st.integers(1, 3), st.data())
def test_shares_and_minibatches_cut_every_column(
    lengths: list[int], parts: int, replicas: int, data: st.DataObject
) -> None:
    """Each replica's minibatches together are the sequences that it computes, in ascending order."""
    batch = batch_of(lengths)
    owners = data.draw(st.lists(st.integers(-1, replicas - 1), min_size=len(lengths), max_size=len(lengths)))
    computed = np.array(owners) >= 0

    def assign(numbers: np.ndarray) -> list[list[list[int]]]:
        return [[[int(n) for n in numbers if owners[n] == replica]] for replica in range(replicas)]

    sizes = np.array(lengths), np.array(lengths) - 1, np.array(lengths) > 1
    plan = plan_step(*sizes, computed, parts, assign)
    assert plan.replica_of.tolist() == owners
    for replica in range(replicas):
        share = planned(batch, plan, replica)
        minibatches = [share.minibatch(number) for number in range(len(share.plan))]
        chosen = [number for number, owner in enumerate(owners) if owner == replica]
        assert share.numbers.tolist() == chosen
        of_row = {
            "sequence": range(len(lengths)),
            "unit": [n for n, turns in enumerate(turns_of(lengths)) for _ in range(1 + turns[-1])],
            "image": [n for n, count in enumerate(images_of(lengths)) for _ in range(count)],
        }
        of_token = [n for n, length in enumerate(lengths) for _ in range(length)]
        for name, column in ALL.items():
            if name == "numbers":
                continue
            whole = value(batch, name)
            rows = torch.tensor(of_row.get(column.aligned_to, of_token))
            expected = whole[torch.isin(rows, torch.tensor(chosen))]
            assert torch.equal(value(share, name), expected), name
            assert torch.equal(torch.cat([value(part, name) for part in minibatches]), expected), name
        for part in minibatches:
            ((members,),) = (step.microbatches for step in part.plan)
            assert members == list(range(len(part)))
    assert share.extra_columns == minibatches[0].extra_columns == EXTRA
    total = sum(step.response_tokens for step in share.plan)
    assert total == sum(lengths) - len(lengths)  # on all replicas, computed or not
    assert sum(step.sequences for step in share.plan) == sum(length > 1 for length in lengths)
    assert sum(step.computed_tokens for step in share.plan) == sum(np.array(lengths)[computed])


@quick
@given(st.data())
def test_pack_takes_and_pads_every_column(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=6))
    sequences = data.draw(st.lists(st.sampled_from(range(len(lengths))), unique=True))
    cp_size = data.draw(st.sampled_from([1, 2]))
    batch = batch_of(lengths)
    all_units = [(n, turn) for n, turns in enumerate(turns_of(lengths)) for turn in range(1 + turns[-1])]
    units = [unit for n in sequences for unit in all_units if unit[0] == n]
    for cp_rank in range(cp_size):
        multiple = 2 * cp_size if cp_size > 1 else 1
        packed = pack(
            batch, sequences, cp_size=cp_size, cp_rank=cp_rank, sequence_multiple=multiple, total_multiple=8
        )
        index = {
            "input": packed.input_index.tolist(),
            "predicted": packed.flat_index.tolist(),
            "sequence": [n for n, _ in units] or [-1],
            "unit": [all_units.index(unit) for unit in units] or [-1],
        }
        place = {unit: i for i, unit in enumerate(units)}
        owners = torch.bucketize(packed.input_index, batch.starts, right=True) - 1
        turns = [turn for of_sequence in turns_of(lengths) for turn in of_sequence]
        for owner, predicted, unit in zip(owners, packed.flat_index, packed.sequence_ids, strict=True):
            if predicted >= 0:
                assert unit == place[int(owner), turns[predicted]]
        assert packed.sequence_ids.min() >= 0
        assert packed.sequence_ids.max() < len(units or [-1])
        for name, column in ALL.items():
            if name in {"lengths", "turns", "numbers", "routed_experts"} | IMAGES:
                continue
            found, whole = value(packed, "mask" if name == "response_mask" else name), value(batch, name)
            padding = torch.full(whole.shape[1:], column.padding, dtype=column.dtype)
            expected = [whole[i] if i >= 0 else padding for i in index[column.aligned_to]]
            assert torch.equal(found, torch.stack(expected)), name
            assert found.dtype == column.dtype
        expected = [int(batch.tokens[i]) if i >= 0 else 0 for i in index["predicted"]]
        assert packed.labels.tolist() == expected


def test_every_tensor_of_a_microbatch_moves() -> None:
    packed = pack(batch_of([3, 5]), [1, 0])
    packed.images = MicrobatchImages(torch.ones(4, 2), torch.ones(1, 3), (1,), torch.ones(8))
    moved = packed.to(torch.device("meta"))
    others = ("extra", "bounds", "routed_experts", "router_scores", "images")
    tensors = [getattr(moved, f.name) for f in fields(moved) if f.name not in others]
    assert len(tensors) == len(fields(Microbatch)) - len(others)
    of_images = [getattr(moved.images, name) for name in ("pixels", "grids", "feature_index")]
    assert all(tensor.is_meta for tensor in [*tensors, *moved.extra.values(), *of_images])
    assert moved.extra.keys() == EXTRA.keys()


def routing_of(layers: list[int], tp_rank: int) -> tuple[Any, Any]:
    """Return a ``Routing`` of one chunk with these MoE layers on one of two tensor-parallel ranks."""
    chunk: Any = object()
    routing: Any = object.__new__(Routing)
    routing.hooks = {chunk: dict.fromkeys(layers)}
    routing._tp_group = SimpleNamespace(size=lambda: 2, rank=lambda: tp_rank)
    return routing, chunk


@pytest.mark.parametrize("layers", [[0], [1, 2], [0, 2]])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16])
def test_a_rank_reads_its_slots_and_layers_of_the_engines_record(
    layers: list[int], dtype: torch.dtype
) -> None:
    """The last token of a sequence has no known experts, and padding has none."""
    batch = batch_of([3, 5])
    batch.routed_experts = batch.routed_experts.to(dtype)
    packed = pack(batch, [1, 0], total_multiple=10)
    for tp_rank in range(2):
        routing, chunk = routing_of(layers, tp_rank)
        found = routing.cut(batch, packed, chunk, 0).routed_experts
        # tokens of sequence 1, then of sequence 0, then padding; -1 for last tokens
        tokens = [3, 4, 5, 6, -1, 0, 1, -1, -1, -1][5 * tp_rank : 5 * tp_rank + 5]
        unknown = torch.full((len(layers), 2), -1, dtype=torch.int16)
        wanted = [batch.routed_experts[token, layers].short() if token >= 0 else unknown for token in tokens]
        assert found.dtype == torch.int16
        assert torch.equal(found, torch.stack(wanted))


def test_a_replica_without_sequences_reads_no_record() -> None:
    batch = batch_of([3, 5]).take(torch.arange(0))
    routing, chunk = routing_of([0, 2], 0)
    cut = routing.cut(batch, pack(batch, [], total_multiple=8), chunk, 0)
    assert cut.routed_experts.tolist() == [[[-1, -1]] * 2] * 4


def test_a_rank_keeps_what_its_routers_recorded() -> None:
    """Its own record has the last tokens too, and goes before the engine's."""
    batch = batch_of([3, 5])
    packed = pack(batch, [1, 0], total_multiple=10)
    routing, chunk = routing_of([0, 2], 1)
    batch.own_experts = {(layer, 7): torch.arange(10).reshape(5, 2).byte() + layer for layer in (0, 2)}
    batch.own_scores = {(layer, 7): torch.ones(5, 2) * layer for layer in (0, 2)}
    cut = routing.cut(batch, packed, chunk, 7)
    experts = [[[2 * t, 2 * t + 1], [2 * t + 2, 2 * t + 3]] for t in range(3)] + [[[-1, -1]] * 2] * 2
    assert cut.routed_experts.tolist() == experts
    assert cut.router_scores.tolist() == [[[0.0, 0.0], [2.0, 2.0]]] * 5


def test_save_writes_every_column(tmp_path: Path) -> None:
    batch = batch_of([3, 5, 2]).take(torch.tensor([1, 2]))
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
    for bad in (values[name].short(), values[name][:, None]):
        with pytest.raises(InputError, match=f"column '{name}' has dtype .* and shape .*, not torch.int64"):
            TrainBatch(**values | {name: bad})


def test_an_extra_column_is_added() -> None:
    batch = TrainBatch(**{name: getattr(batch_of([3, 5]), name) for name in COLUMNS})
    before = batch.extra
    batch.add_extra("difficulty", EXTRA["difficulty"], torch.tensor([0.5, 0.25]))
    assert before == {}
    assert batch.extra_columns == {"difficulty": EXTRA["difficulty"]}
    assert pack(batch, [1]).extra["difficulty"].tolist() == [0.25] * 2  # for each of its two turns
    with pytest.raises(InputError, match="column 'old_logprobs' exists in every batch"):
        batch.add_extra("old_logprobs", EXTRA["teacher_logprobs"], torch.zeros(8))


def test_every_optional_field_is_a_column() -> None:
    shared = {field.name for field in fields(OptionalColumns)}
    assert shared - COLUMNS.keys() == {"extra"}
    own = {"tokens", "lengths", "response_mask", "advantages", "rollout_logprobs"}
    assert COLUMNS.keys() - shared == own | {"routed_experts", "turns", "numbers", "rope_positions"} | IMAGES


@quick
@given(st.lists(st.lists(st.booleans(), max_size=12), max_size=6))
def test_turns_are_the_runs_of_the_mask(masks: list[list[bool]]) -> None:
    """The tokens before the first turn have number 0, and an observation that of the turn before it."""
    masks = [[False, *mask] for mask in masks]  # a sequence begins with its prompt
    expected, runs = [], []
    for mask in masks:
        found = -1
        for t, sampled in enumerate(mask):
            found += sampled and not mask[t - 1]
            expected.append(max(found, 0))
        runs.append(found + 1)
    lengths = torch.tensor([len(mask) for mask in masks], dtype=torch.int64)
    flat = torch.tensor([sampled for mask in masks for sampled in mask], dtype=torch.bool)
    turns = turn_numbers(flat, lengths)
    assert turns.dtype == torch.int32
    assert turns.tolist() == expected
    assert [Sample([0] * len(m), m, [0.0] * len(m), "", "stop", 0).num_turns for m in masks] == runs
    zeros = torch.zeros(len(flat))
    batch = TrainBatch(zeros.long(), lengths, flat, torch.zeros(len(masks)), zeros, turns=turns)
    assert batch.units.tolist() == [max(count, 1) for count in runs]
    first = torch.repeat_interleave(batch.first_units, lengths).tolist()
    assert batch.unit_ids.tolist() == [a + b for a, b in zip(first, expected, strict=True)]
