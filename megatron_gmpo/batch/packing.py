"""From sampled groups to packed microbatches: one flat TrainBatch, a plan of who computes what, and the THD layout of a rank.

The layout of one microbatch, for sequences of 5 and 3 tokens with two context-parallel ranks (``sequence_multiple`` = 4)::

    slots      a0 a1 a2 a3 a4 -- -- -- | b0 b1 b2 --       cu_seqlens [0, 8, 12]
    labels     a1 a2 a3 a4  0  0  0  0 | b1 b2  0  0
    rank 0     a0 a1 -- -- | b0 --                         chunks 0 and 3 of each sequence
    rank 1     a2 a3 a4 -- | b1 b2                         chunks 1 and 2
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left, insort
from itertools import chain, combinations

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from .columns import Microbatch, RoutingShape, TrainBatch
from .samples import Sample, SampleGroup

_ATTENTION_EQUALS_REST = 32768
"""Sequence length at which attention costs as much as everything else in a layer. Of a dense layer's forward FLOPs a token,
24 h^2 are in matrices and 2 L h in causal attention: equal at L = 12 h, here for a hidden size of 2,700."""


def make_train_batch(
    groups: list[SampleGroup], advantages: Tensor, routing: RoutingShape | None = None
) -> TrainBatch:
    """Lays the samples of all groups end to end.

    Args:
        groups: in order; every token list holds at least one prompt token.
        advantages: (S,), one for each sample, group by group.
        routing: what the samples' records of routed experts must look like; None leaves them out.

    Raises:
        InputError: see ``stack_routed_experts``.
    """
    samples = [sample for group in groups for sample in group.samples]
    assert advantages.shape == (len(samples),)
    assert not any(sample.response_mask[0] for sample in samples)
    mask = torch.tensor(
        list(chain.from_iterable(sample.response_mask for sample in samples)), dtype=torch.bool
    )
    rollout_logprobs = torch.tensor(
        list(chain.from_iterable(sample.rollout_logprobs for sample in samples)), dtype=torch.float32
    )
    return TrainBatch(
        tokens=torch.tensor(
            list(chain.from_iterable(sample.tokens for sample in samples)), dtype=torch.int64
        ),
        lengths=torch.tensor([len(sample.tokens) for sample in samples], dtype=torch.int64),
        response_mask=mask,
        advantages=advantages.float(),
        rollout_logprobs=rollout_logprobs.where(mask, 0.0),
        routed_experts=stack_routed_experts(samples, routing) if routing else None,
    )


def stack_routed_experts(samples: list[Sample], routing: RoutingShape) -> Tensor:
    """The samples' records end to end, (L, layers, topk) int16; -1 on each sample's last token and in layers without experts.

    Raises:
        InputError: a sample has no record, one of another shape, an expert that the model does not have, or one twice for a token.
    """
    moe = list(routing.moe_layers)
    record = np.full(
        (sum(len(sample.tokens) for sample in samples), routing.num_layers, routing.topk), -1, np.int16
    )
    start = 0
    for number, sample in enumerate(samples):
        found, expected = sample.routed_experts, (len(sample.tokens) - 1, routing.num_layers, routing.topk)
        if found is None:
            raise InputError(
                f"sample {number} has no record of its routed experts: generate with rollout.routed_experts = true"
            )
        if found.shape != expected:
            raise InputError(
                f"sample {number}: routed experts of shape {found.shape}, not {expected} (tokens - 1, layers, topk): "
                "generate with the model of model.path"
            )
        experts = found[:, moe]
        ranked = np.ascontiguousarray(
            experts.reshape(-1, routing.topk).T
        )  # (topk, tokens x layers): whole rows are compared
        if ranked.size and not 0 <= ranked.min() <= ranked.max() < routing.num_experts:
            outside = ranked[(ranked < 0) | (ranked >= routing.num_experts)]
            raise InputError(
                f"sample {number}: routed expert {outside[0]} of {routing.num_experts}: generate with the model of model.path"
            )
        if any((one == other).any() for one, other in combinations(ranked, 2)):
            raise InputError(
                f"sample {number}: a token has the same routed expert twice: generate with the model of model.path"
            )
        record[start : start + len(found), moe] = experts
        start += len(sample.tokens)
    return torch.from_numpy(record)


def cost(length: int) -> float:
    """Work of one sequence of ``length`` tokens, in tokens of a very short one: linear layers plus causal attention."""
    return length + length**2 / _ATTENTION_EQUALS_REST


def plan_microbatches(
    lengths: list[int],
    *,
    max_tokens: int,
    data_parallel_size: int,
    sequence_multiple: int = 1,
    count_multiple: int = 1,
) -> list[list[list[int]]]:
    """Shares sequences out over data-parallel ranks and microbatches.

    As few microbatches as best-fit decreasing finds, rounded up to equal counts on all ranks; within that number, evenly filled.
    Microbatches of like cost get the same place in the ranks' lists, since expert parallelism lets them wait for each other.

    Args:
        lengths: tokens of each sequence; padded here to ``sequence_multiple`` (2 * context_parallel_size, or 1 without).
        max_tokens: padded slots of a microbatch over all context-parallel ranks. A longer sequence gets a microbatch of its own.
        count_multiple: the number of microbatches a rank is a multiple of this (the interleaved pipeline schedule wants the
            pipeline size).

    Returns:
        ``plan[rank][microbatch]``, ascending numbers of sequences; each number exactly once. Microbatch counts are equal and at
        least ``count_multiple``; an empty list stands for a dummy microbatch. Equal arguments give equal plans.
    """
    padded = [-(-length // sequence_multiple) * sequence_multiple for length in lengths]
    longest_first = sorted(range(len(padded)), key=lambda i: -padded[i])
    fewest = _best_fit(padded, longest_first, max_tokens)
    rows = max(1, math.ceil(len(fewest) / (data_parallel_size * count_multiple))) * count_multiple
    bins = _even_fill(padded, longest_first, max_tokens, rows * data_parallel_size) or fewest
    bins += [[] for _ in range(rows * data_parallel_size - len(bins))]

    costs = [sum(cost(padded[i]) for i in members) for members in bins]
    dearest_first = sorted(range(len(bins)), key=lambda b: -costs[b])
    plan: list[list[list[int]]] = [[] for _ in range(data_parallel_size)]
    load = [0.0] * data_parallel_size
    for start in range(0, len(bins), data_parallel_size):
        row = dearest_first[start : start + data_parallel_size]
        least_loaded_first = sorted(range(data_parallel_size), key=lambda rank: load[rank])
        for rank, b in zip(least_loaded_first, row, strict=True):
            plan[rank].append(sorted(bins[b]))
            load[rank] += costs[b]
    return plan


def _best_fit(padded: list[int], longest_first: list[int], max_tokens: int) -> list[list[int]]:
    """Each sequence into the fullest bin that takes it, or a new one. (Coffman, Garey, Johnson 1996: at most 11/9 of the best.)"""
    bins: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (slots left, bin), ascending
    for i in longest_first:
        at = bisect_left(free, (padded[i], 0))
        if at < len(free):
            slots, b = free.pop(at)
        else:
            slots, b = max_tokens, len(bins)
            bins.append([])
        bins[b].append(i)
        if slots > padded[i]:
            insort(free, (slots - padded[i], b))
    return bins


def _even_fill(
    padded: list[int], longest_first: list[int], max_tokens: int, count: int
) -> list[list[int]] | None:
    """Each sequence into the emptiest of ``count`` bins; None when that overflows."""
    bins: list[list[int]] = [[] for _ in range(count)]
    filled = [(0, b) for b in range(count)]  # a heap of (slots taken, bin)
    for i in longest_first:
        slots, b = heapq.heappop(filled)
        if bins[b] and slots + padded[i] > max_tokens:
            return None
        bins[b].append(i)
        heapq.heappush(filled, (slots + padded[i], b))
    return bins


def pack(
    batch: TrainBatch,
    sequences: list[int],
    *,
    cp_size: int = 1,
    cp_rank: int = 0,
    sequence_multiple: int = 1,
    total_multiple: int = 1,
) -> Microbatch:
    """Packs ``sequences`` of ``batch``, in that order, as rank ``cp_rank`` of ``cp_size`` context-parallel ranks sees them.

    Each sequence is padded to a multiple of ``sequence_multiple`` and cut into 2 * cp_size equal chunks, of which rank r holds
    chunks r and 2 * cp_size - 1 - r: causal attention then costs every rank the same.

    Args:
        sequences: numbers of sequences; none makes a dummy of one padding sequence without loss.
        sequence_multiple: a multiple of 2 * cp_size when cp_size > 1.
        total_multiple: the slots over all ranks are a multiple of this (tensor_model_parallel_size * cp_size under sequence
            parallelism); the last sequence's padding makes up the difference.
    """
    assert cp_size == 1 or sequence_multiple % (2 * cp_size) == 0
    device = batch.tokens.device
    chosen = torch.tensor(sequences, dtype=torch.int64, device=device)
    lengths, firsts = batch.lengths[chosen], batch.starts[chosen]
    if not sequences:
        lengths = firsts = torch.zeros(1, dtype=torch.int64, device=device)
    padded = ((lengths + sequence_multiple - 1) // sequence_multiple) * sequence_multiple
    total = int(padded.sum())
    multiple = math.lcm(sequence_multiple, total_multiple)
    padded[-1] += max(multiple, -(-total // multiple) * multiple) - total
    cu_seqlens = torch.nn.functional.pad(padded.cumsum(0), (1, 0))

    owner = torch.repeat_interleave(
        torch.arange(len(padded), device=device), padded
    )  # (slots over all ranks,)
    position = torch.arange(len(owner), device=device) - cu_seqlens[owner]
    if cp_size > 1:
        chunk = position // (padded // (2 * cp_size))[owner]
        mine = (chunk == cp_rank) | (chunk == 2 * cp_size - 1 - cp_rank)
        owner, position = owner[mine], position[mine]  # (T,)

    input_index = torch.where(position < lengths[owner], firsts[owner] + position, -1)
    flat_index = torch.where(position + 1 < lengths[owner], firsts[owner] + position + 1, -1)

    def per_token(values: Tensor, index: Tensor, padding: int = 0) -> Tensor:
        """``values`` at ``index``, ``padding`` where the index is -1."""
        return values[index.clamp(min=0)].masked_fill(
            (index < 0).view(-1, *[1] * (values.dim() - 1)), padding
        )

    def per_sequence(values: Tensor) -> Tensor:
        return values[chosen] if sequences else values.new_zeros(1)

    return Microbatch(
        tokens=per_token(batch.tokens, input_index),
        labels=per_token(batch.tokens, flat_index),
        position_ids=position,
        cu_seqlens=cu_seqlens.int(),
        mask=per_token(batch.response_mask, flat_index),
        sequence_ids=owner,
        flat_index=flat_index,
        input_index=input_index,
        advantages=per_sequence(batch.advantages),
        old_logprobs=None if batch.old_logprobs is None else per_token(batch.old_logprobs, flat_index),
        ref_logprobs=None if batch.ref_logprobs is None else per_token(batch.ref_logprobs, flat_index),
        rollout_logprobs=per_token(batch.rollout_logprobs, flat_index),
        sequence_weights=None if batch.sequence_weights is None else per_sequence(batch.sequence_weights),
        token_weights=None if batch.token_weights is None else per_token(batch.token_weights, flat_index),
        kept_tokens=None if batch.kept_tokens is None else per_token(batch.kept_tokens, flat_index),
        router_shift=None if batch.router_shift is None else per_token(batch.router_shift, input_index),
        routed_experts=None
        if batch.routed_experts is None
        else per_token(batch.routed_experts, input_index, padding=-1),
        router_scores=None if batch.router_scores is None else per_token(batch.router_scores, input_index),
    )
