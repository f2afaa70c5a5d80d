"""A plan uses every sequence once within its limits; packing equals a token-by-token reference."""

from __future__ import annotations

import math
import threading
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import packing as benchmark
from megatron_gmpo.batch.columns import Microbatch, RoutingShape, TrainBatch
from megatron_gmpo.batch.packing import cost, pack, plan_microbatches
from megatron_gmpo.batch.samples import Prompt, Sample, SampleGroup
from megatron_gmpo.errors import InputError
from megatron_gmpo.policy.prefetch import prefetched

from ..support.groups import step_batch

quick = settings(deadline=None, max_examples=80)


@st.composite
def plans(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "lengths": draw(st.lists(st.integers(1, 300), max_size=60)),
        "max_tokens": draw(st.integers(16, 400)),
        "data_parallel_size": draw(st.integers(1, 5)),
        "sequence_multiple": draw(st.sampled_from([1, 4, 8])),
        "count_multiple": draw(st.integers(1, 4)),
    }


@quick
@given(plans())
def test_plan(arguments: dict[str, Any]) -> None:
    lengths, multiple, limit = arguments["lengths"], arguments["sequence_multiple"], arguments["max_tokens"]
    plan = plan_microbatches(**arguments)
    assert plan == plan_microbatches(**arguments)
    assert len(plan) == arguments["data_parallel_size"]
    (count,) = {len(microbatches) for microbatches in plan}
    assert count % arguments["count_multiple"] == 0
    assert count >= arguments["count_multiple"]
    everything = [members for microbatches in plan for members in microbatches]
    assert sorted(i for members in everything for i in members) == list(range(len(lengths)))
    for members in everything:
        assert sum(math.ceil(lengths[i] / multiple) * multiple for i in members) <= limit or len(members) == 1
    # Only rounding adds microbatches: before it, no two microbatches of a packing fit into one.
    tokens = sum(math.ceil(length / multiple) * multiple for length in lengths)
    most_needed = max(1, 2 * tokens // limit + 1)
    unit = arguments["data_parallel_size"] * arguments["count_multiple"]
    assert count * arguments["data_parallel_size"] <= math.ceil(most_needed / unit) * unit


@quick
@given(plans())
def test_ranks_meet_with_microbatches_of_like_cost(arguments: dict[str, Any]) -> None:
    multiple = arguments["sequence_multiple"]
    padded = [math.ceil(length / multiple) * multiple for length in arguments["lengths"]]
    costs = np.array(
        [[sum(cost(padded[i]) for i in members) for members in row] for row in plan_microbatches(**arguments)]
    )
    # Costs decrease from place to place: no microbatch is cheaper than one in the next place.
    assert (costs.min(axis=0)[:-1] >= costs.max(axis=0)[1:] - 1e-9).all()
    # The least loaded rank takes the most expensive microbatch of a place, so loads differ by at most
    # the largest spread within a place.
    assert np.ptp(costs.sum(axis=1)) <= np.ptp(costs, axis=0).max() + 1e-9


def test_a_sequence_above_the_limit_is_alone() -> None:
    plan = plan_microbatches([5, 100, 5, 5], max_tokens=16, data_parallel_size=1)
    assert sorted(plan[0]) == [[0, 2, 3], [1]]


def test_missing_microbatches_are_empty() -> None:
    plan = plan_microbatches([7, 7, 7], max_tokens=8, data_parallel_size=2, count_multiple=2)
    assert sorted(len(members) for microbatches in plan for members in microbatches) == [0, 1, 1, 1]
    assert plan_microbatches([], max_tokens=8, data_parallel_size=2) == [[[]], [[]]]


@pytest.mark.parametrize("seed", range(5))
def test_fill_and_balance_on_lognormal_lengths(seed: int) -> None:
    lengths = benchmark.lognormal_lengths(benchmark.SEQUENCES, seed)
    plan = plan_microbatches(
        lengths, max_tokens=benchmark.MAX_TOKENS, data_parallel_size=benchmark.DATA_PARALLEL_SIZE
    )
    assert benchmark.fill(lengths, plan) >= 0.92
    ranks, steps = benchmark.imbalance(lengths, plan)
    assert ranks < 1.03
    assert steps < 1.03


def test_best_fit_takes_over_where_even_fill_overflows() -> None:
    # Two microbatches of exactly 10 exist. Filling the emptiest first gives 6 3 | 5 4 and leaves no room
    # for 2.
    lengths = [6, 5, 3, 2, 4]
    plan = plan_microbatches(lengths, max_tokens=10, data_parallel_size=2)
    assert sorted(sum(lengths[i] for i in members) for microbatches in plan for members in microbatches) == [
        10,
        10,
    ]


def test_cost_is_superadditive() -> None:
    assert cost(4096) > 2 * cost(2048)
    assert cost(32768) == 2 * 32768


def batch_of(lengths: list[int], seed: int = 0, **absent: None) -> TrainBatch:
    """Make a batch of random content, with token ids from 1, which differ from padding."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    mask = torch.rand(total, generator=generator) < 0.6
    mask[torch.tensor(lengths).cumsum(0) - torch.tensor(lengths)] = False
    fields: dict[str, Any] = {
        "tokens": torch.randint(1, 1000, (total,), generator=generator),
        "lengths": torch.tensor(lengths),
        "response_mask": mask,
        "advantages": torch.randn(len(lengths), generator=generator),
        "rollout_logprobs": torch.randn(total, generator=generator) * mask,
        "old_logprobs": torch.randn(total, generator=generator) * mask,
        "ref_logprobs": torch.randn(total, generator=generator) * mask,
        "sequence_weights": torch.rand(len(lengths), generator=generator),
        "kept_tokens": torch.rand(total, generator=generator) < 0.5,
        "routed_experts": torch.randint(0, 8, (total, 3, 2), generator=generator).short(),
        "router_shift": torch.rand(total, generator=generator),
    }
    return TrainBatch(**fields | absent)


def reference_slots(
    batch: TrainBatch,
    sequences: list[int],
    cp_size: int,
    cp_rank: int,
    sequence_multiple: int,
    total_multiple: int,
) -> tuple[list[dict[str, Any]], list[int]]:
    """Build slot by slot what the docstring of ``pack`` promises."""
    lengths = [int(batch.lengths[i]) for i in sequences]
    padded = [math.ceil(length / sequence_multiple) * sequence_multiple for length in lengths]
    while sum(padded) % total_multiple or padded[-1] % sequence_multiple:
        padded[-1] += 1
    local: list[dict[str, Any]] = []
    for s, i in enumerate(sequences):
        first = sum(int(n) for n in batch.lengths[:i])
        slots: list[dict[str, Any]] = []
        for t in range(padded[s]):
            slot: dict[str, Any] = {"position_ids": t, "sequence_ids": s, "flat_index": -1}
            slot["tokens"] = int(batch.tokens[first + t]) if t < lengths[s] else 0
            slot["input_index"] = first + t if t < lengths[s] else -1
            slot["router_shift"] = float(batch.router_shift[first + t]) if t < lengths[s] else 0.0
            for field in (
                "labels",
                "mask",
                "old_logprobs",
                "ref_logprobs",
                "rollout_logprobs",
                "kept_tokens",
            ):
                slot[field] = 0
            if t + 1 < lengths[s]:
                predicted = first + t + 1
                slot["flat_index"] = predicted
                slot["labels"] = int(batch.tokens[predicted])
                slot["mask"] = bool(batch.response_mask[predicted])
                for field in ("old_logprobs", "ref_logprobs", "rollout_logprobs", "kept_tokens"):
                    slot[field] = float(getattr(batch, field)[predicted])
            slots.append(slot)
        size = padded[s] // (2 * cp_size)
        chunks = [cp_rank, 2 * cp_size - 1 - cp_rank] if cp_size > 1 else [0, 1]
        if cp_size == 1:
            local += slots
        else:
            for chunk in chunks:
                local += slots[chunk * size : (chunk + 1) * size]
    return local, np.cumsum([0, *padded]).tolist()


@st.composite
def layouts(draw: st.DrawFn) -> tuple[list[int], list[int], dict[str, int]]:
    lengths = draw(st.lists(st.integers(1, 40), min_size=1, max_size=8))
    sequences = draw(st.lists(st.sampled_from(range(len(lengths))), min_size=1, unique=True))
    cp_size = draw(st.sampled_from([1, 2, 4]))
    sequence_multiple = (2 * cp_size if cp_size > 1 else 1) * draw(st.sampled_from([1, 1, 3]))
    return lengths, sequences, {
        "cp_size": cp_size,
        "sequence_multiple": sequence_multiple,
        "total_multiple": draw(st.sampled_from([1, 2, 8, 12])),
    }  # fmt: skip


@quick
@given(layouts())
def test_pack_equals_the_reference(layout: tuple[list[int], list[int], dict[str, int]]) -> None:
    lengths, sequences, options = layout
    batch = batch_of(lengths)
    for cp_rank in range(options["cp_size"]):
        packed = pack(batch, sequences, cp_rank=cp_rank, **options)
        slots, boundaries = reference_slots(batch, sequences, cp_rank=cp_rank, **options)
        for field in slots[0]:
            assert getattr(packed, field).tolist() == [slot[field] for slot in slots], field
        assert packed.cu_seqlens.tolist() == boundaries
        assert packed.cu_seqlens.dtype == torch.int32
        assert packed.mask.dtype == torch.bool
        for field in ("tokens", "labels", "position_ids", "sequence_ids", "flat_index", "input_index"):
            assert getattr(packed, field).dtype == torch.int64
        for field in ("advantages", "sequence_weights"):
            assert torch.equal(getattr(packed, field), getattr(batch, field)[torch.tensor(sequences)])


@quick
@given(layouts())
def test_context_parallel_ranks_hold_every_token_once_and_undo_to_the_whole(
    layout: tuple[list[int], list[int], dict[str, int]],
) -> None:
    lengths, sequences, options = layout
    batch = batch_of(lengths)
    parts = [pack(batch, sequences, cp_rank=rank, **options) for rank in range(options["cp_size"])]
    assert len({len(part.tokens) for part in parts}) == 1
    boundaries = parts[0].cu_seqlens.long()
    assert int(boundaries[-1]) == sum(len(part.tokens) for part in parts)
    assert int(boundaries[-1]) % options["total_multiple"] == 0
    assert not (boundaries % options["sequence_multiple"]).any()
    assert all(torch.equal(part.cu_seqlens, parts[0].cu_seqlens) for part in parts)

    sequence_ids = torch.cat([part.sequence_ids for part in parts])
    order = (boundaries[sequence_ids] + torch.cat([part.position_ids for part in parts])).argsort()
    tokens, labels, flat_index = (
        torch.cat([getattr(part, name) for part in parts])[order]
        for name in ("tokens", "labels", "flat_index")
    )
    for s, i in enumerate(sequences):
        start, length = int(boundaries[s]), lengths[i]
        first = int(batch.starts[i])
        assert torch.equal(tokens[start : start + length], batch.tokens[first : first + length])
        assert torch.equal(labels[start : start + length - 1], batch.tokens[first + 1 : first + length])
    predicted = flat_index[flat_index >= 0]
    assert len(predicted) == sum(lengths[i] - 1 for i in sequences)
    assert len(predicted.unique()) == len(predicted)


def test_every_masked_token_of_a_plan_is_computed_once() -> None:
    lengths = benchmark.lognormal_lengths(40, 1)
    batch = batch_of(lengths)
    plan = plan_microbatches(
        lengths, max_tokens=4096, data_parallel_size=2, sequence_multiple=4, count_multiple=2
    )
    gathered = torch.zeros(len(batch.tokens))
    for microbatches in plan:
        for members in microbatches:
            for cp_rank in range(2):
                part = pack(batch, members, cp_size=2, cp_rank=cp_rank, sequence_multiple=4, total_multiple=4)
                gathered[part.flat_index[part.mask]] += 1
    assert torch.equal(gathered, batch.response_mask.float())


def slots(packed: Microbatch) -> int:
    return len(packed.tokens)


@pytest.mark.parametrize("sequences", [2, 0])
@pytest.mark.parametrize("cp_size", [1, 2])
def test_dummy_microbatch(cp_size: int, sequences: int) -> None:
    batch = batch_of([5, 3]).take(torch.arange(sequences))  # a replica may have no sequence of a step
    multiple = 2 * cp_size if cp_size > 1 else 1
    packed = pack(
        batch, [], cp_size=cp_size, cp_rank=cp_size - 1, sequence_multiple=multiple, total_multiple=6
    )
    total = math.lcm(multiple, 6)
    assert packed.cu_seqlens.tolist() == [0, total]
    assert slots(packed) == total // cp_size
    assert not packed.mask.any()
    assert packed.flat_index.eq(-1).all()
    assert packed.advantages.tolist() == [0.0]
    assert packed.old_logprobs is not None
    assert not packed.old_logprobs.any()


def test_absent_tensors_stay_absent() -> None:
    batch = batch_of([5, 3], old_logprobs=None, ref_logprobs=None, sequence_weights=None)
    for sequences in ([1, 0], []):
        packed = pack(batch, sequences)
        assert (packed.old_logprobs, packed.ref_logprobs, packed.sequence_weights) == (None,) * 3
        assert packed.routed_experts is None  # Routing.cut reads it
        assert packed.rollout_logprobs is not None


def test_make_train_batch() -> None:
    def sample(tokens: list[int], prompt_length: int) -> Sample:
        response = len(tokens) - prompt_length
        return Sample(
            tokens=tokens,
            response_mask=[False] * prompt_length + [True] * response,
            rollout_logprobs=[0.0] * prompt_length + [-0.5] * response,
            text="",
            finish_reason="stop",
            policy_version=0,
        )

    groups = [
        SampleGroup(Prompt("a/0", answer=""), [sample([3, 9, 4, 11], 2), sample([3, 9], 2)]),
        SampleGroup(Prompt("a/1", answer=""), [sample([7, 8, 2], 1)]),
    ]
    batch = step_batch(groups, torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64))
    assert batch.tokens.tolist() == [3, 9, 4, 11, 3, 9, 7, 8, 2]
    assert batch.lengths.tolist() == [4, 2, 3]
    assert batch.response_mask.tolist() == [False, False, True, True, False, False, False, True, True]
    assert batch.rollout_logprobs.tolist() == [0, 0, -0.5, -0.5, 0, 0, 0, -0.5, -0.5]
    assert batch.advantages.dtype == torch.float32
    assert batch.response_lengths.tolist() == [2, 0, 2]
    assert batch.old_logprobs is None
    assert batch.numbers.tolist() == [0, 1, 2]
    (part,) = batch.plan
    assert (part.rows, part.sequences, part.response_tokens, part.tokens) == ((0, 3), 2, 4, 9)


ROUTING = RoutingShape(num_layers=3, moe_layers=(0, 2), num_experts=8, topk=2)


def routed(length: int, seed: int = 0) -> Sample:
    """Make a sample whose record has meaningless values in the layer without experts."""
    experts = np.random.default_rng(seed).random((length - 1, 3, 8)).argsort()[..., :2].astype(np.int16)
    experts[:, 1] = 30_000
    return Sample(
        list(range(length)),
        [False] + [True] * (length - 1),
        [0.0] * length,
        "",
        "stop",
        0,
        routed_experts=experts,
    )


@pytest.mark.parametrize("dtype", [np.uint8, np.int16])
def test_routed_experts_lie_beside_their_input_tokens(dtype: type) -> None:
    samples = [routed(4), routed(1), routed(3, seed=1)]  # without experts in layer 1, which holds 30,000
    for sample in samples:
        assert sample.routed_experts is not None
        sample.routed_experts = sample.routed_experts.astype(dtype)
    group = SampleGroup(Prompt("p", ""), samples)
    record = step_batch([group], torch.zeros(3), ROUTING).routed_experts
    assert record.dtype == torch.uint8  # the model has 8 experts
    assert record.shape == (8, 3, 2)
    for start, sample in ((0, samples[0]), (5, samples[2])):
        assert sample.routed_experts is not None
        known = slice(start, start + len(sample.tokens) - 1)
        assert np.array_equal(record[known][:, [0, 2]].numpy(), sample.routed_experts[:, [0, 2]])
    assert step_batch([group], torch.zeros(3)).routed_experts is None  # training needs no record


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda experts: None, "no record"),
        (lambda experts: experts[:-1], r"shape \(2, 3, 2\), not \(3, 3, 2\)"),
        (lambda experts: experts[:, [0, 2]], r"shape \(3, 2, 2\), not \(3, 3, 2\)"),
        (lambda experts: experts[..., :1], r"shape \(3, 3, 1\), not \(3, 3, 2\)"),
        (lambda experts: np.where([[[True], [False], [True]]], [0, 8], experts), "expert 8 of 8"),
        (lambda experts: np.where([[[True], [False], [True]]], [-1, 0], experts), "expert -1 of 8"),
        (
            lambda experts: np.where([[[False], [False], [True]]], [5, 5], experts),
            "the same routed expert twice",
        ),
    ],
)
def test_a_wrong_record_of_routed_experts_is_refused(change: Any, words: str) -> None:
    sample = routed(4)
    sample.routed_experts = change(sample.routed_experts)
    with pytest.raises(InputError, match=f"sample 1.*{words}") as error:
        step_batch([SampleGroup(Prompt("p", ""), [routed(2), sample])], torch.zeros(2), ROUTING)
    assert "\n" not in str(error.value)


def test_the_next_microbatch_is_packed_while_one_is_in_use() -> None:
    batch = TrainBatch(
        tokens=torch.arange(10),
        lengths=torch.tensor([3, 5, 2]),
        response_mask=torch.zeros(10, dtype=torch.bool),
        advantages=torch.zeros(3),
        rollout_logprobs=torch.zeros(10),
    )
    made = [threading.Event() for _ in range(3)]

    def make(place: int) -> Microbatch:
        if place == 2:
            raise ValueError("the third cannot be made")
        made[place].set()
        return pack(batch, [place])

    microbatches = prefetched(make, 3, torch.device("cpu"))
    first = next(microbatches)
    assert made[1].wait(60)
    assert first.tokens.tolist() == [0, 1, 2]
    assert next(microbatches).tokens.tolist() == [3, 4, 5, 6, 7]
    with pytest.raises(ValueError, match="the third"):
        next(microbatches)
