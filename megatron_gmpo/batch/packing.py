"""Pack a flat TrainBatch: assign sequences to ranks and microbatches, and pack a microbatch in THD format.

The layout of one microbatch, for sequences of 5 and 3 tokens with two context-parallel ranks
(``sequence_multiple`` = 4)::

    slots      a0 a1 a2 a3 a4 -- -- -- | b0 b1 b2 --       cu_seqlens [0, 8, 12]
    labels     a1 a2 a3 a4  0  0  0  0 | b1 b2  0  0
    rank 0     a0 a1 -- -- | b0 --                         chunks 0 and 3 of each sequence
    rank 1     a2 a3 a4 -- | b1 b2                         chunks 1 and 2
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left, insort
from collections.abc import Callable

import torch
from torch import Tensor

from .columns import Column, Microbatch, TrainBatch
from .image_packing import pack_images
from .pixels import PixelReader
from .schema import ranges, take

_NOT_PACKED = {
    "routed_experts",  # ``Routing.cut`` selects the layers of a chunk
    "lengths",  # ``cu_seqlens`` and ``position_ids`` replace it
    "numbers",
    "image_counts",  # ``MicrobatchImages`` replaces these
    "image_starts",
    "image_grids",
    "image_digests",
}

_ATTENTION_EQUALS_REST = 32768
"""Sequence length at which attention costs as much as the rest of a layer.

The forward pass of a dense layer takes 24 h^2 FLOPs per token in matrix products and 2 L h in causal
attention. They are equal at L = 12 h. This value assumes a hidden size of 2,700."""


def cost(length: int) -> float:
    """Return the work of linear layers and causal attention, in units of one token's linear layers."""
    return length + length**2 / _ATTENTION_EQUALS_REST


def plan_microbatches(
    lengths: list[int],
    *,
    max_tokens: int,
    data_parallel_size: int,
    sequence_multiple: int = 1,
    count_multiple: int = 1,
    image_cost: Callable[[list[int]], float] | None = None,
) -> list[list[list[int]]]:
    """Assign sequences to data-parallel ranks and microbatches.

    Best-fit decreasing determines the number of microbatches, which is rounded up to equal counts on all
    ranks. The microbatches are then filled evenly. Microbatches of similar cost get the same position in the
    ranks' lists, because expert parallelism makes the ranks wait for each other.

    Args:
        lengths: tokens of each sequence.
        max_tokens: maximum padded slots of a microbatch over all context-parallel ranks. A longer sequence
            gets its own microbatch.
        data_parallel_size: number of ranks.
        sequence_multiple: sequences are padded to a multiple of this (2 * context_parallel_size, or 1 without
            context parallelism).
        count_multiple: each rank's number of microbatches is a multiple of this (the interleaved pipeline
            schedule needs the pipeline size).
        image_cost: the work of a vision tower on the images of a microbatch's sequences, in units of
            ``cost``. Their patches need no limit of their own: ``max_tokens`` bounds the tokens of images,
            and each stands for a fixed number of patches.

    Returns:
        ``plan[rank][microbatch]``: ascending numbers of sequences. Each number occurs once. All ranks have
        the same number of microbatches, at least ``count_multiple``. An empty list is a dummy microbatch.
        Equal arguments give equal plans.
    """
    padded = [-(-length // sequence_multiple) * sequence_multiple for length in lengths]
    longest_first = sorted(range(len(padded)), key=lambda i: -padded[i])
    fewest = _best_fit(padded, longest_first, max_tokens)
    rows = max(1, math.ceil(len(fewest) / (data_parallel_size * count_multiple))) * count_multiple
    bins = _even_fill(padded, longest_first, max_tokens, rows * data_parallel_size) or fewest
    bins += [[] for _ in range(rows * data_parallel_size - len(bins))]

    costs = [sum(cost(padded[i]) for i in members) for members in bins]
    if image_cost:
        costs = [total + image_cost(members) for total, members in zip(costs, bins, strict=True)]
    most_expensive_first = sorted(range(len(bins)), key=lambda b: -costs[b])
    plan: list[list[list[int]]] = [[] for _ in range(data_parallel_size)]
    load = [0.0] * data_parallel_size
    for start in range(0, len(bins), data_parallel_size):
        row = most_expensive_first[start : start + data_parallel_size]
        least_loaded_first = sorted(range(data_parallel_size), key=lambda rank: load[rank])
        for rank, b in zip(least_loaded_first, row, strict=True):
            plan[rank].append(sorted(bins[b]))
            load[rank] += costs[b]
    return plan


def _best_fit(padded: list[int], longest_first: list[int], max_tokens: int) -> list[list[int]]:
    """Put each sequence into the fullest bin with room for it, or into a new bin.

    The number of bins is at most about 11/9 of the optimum (Coffman, Garey, Johnson 1996).
    """
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
    """Put each sequence into the emptiest of ``count`` bins; return None if a bin overflows."""
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
    pixels: PixelReader | None = None,
    encodes: bool = True,
) -> Microbatch:
    """Pack ``sequences`` of ``batch``, in that order, for one context-parallel rank.

    Each sequence is padded to a multiple of ``sequence_multiple`` and cut into 2 * cp_size equal chunks. Rank
    r holds chunks r and 2 * cp_size - 1 - r, so that causal attention has the same cost on every rank. The
    turns of an episode stay in one sequence; only ``sequence_ids`` separates them.

    Args:
        sequences: numbers of sequences; [] makes a dummy microbatch of one padding sequence without loss.
        sequence_multiple: a multiple of 2 * cp_size if cp_size > 1.
        total_multiple: the number of slots over all ranks is a multiple of this (tensor_model_parallel_size *
            cp_size under sequence parallelism). The last sequence is padded to reach it.
        pixels: reads the images; None for a model without vision.
        encodes: whether this stage of the pipeline encodes images. The others get their slots only.
    """
    assert cp_size == 1 or sequence_multiple % (2 * cp_size) == 0
    chosen = torch.tensor(sequences or [-1], dtype=torch.int64, device=batch.tokens.device)
    lengths, firsts = take(batch.lengths, chosen), take(batch.starts, chosen)
    units, first_units = take(batch.units, chosen, 1), take(batch.first_units, chosen, -1)
    padded = _padded(lengths, sequence_multiple, total_multiple)
    owner, position, cu_seqlens = _slots(padded)
    mine = _slots_of_rank(padded, owner, position, cp_size, cp_rank)
    images = pixels and pack_images(
        batch, chosen, cu_seqlens, mine, cp_size, cp_rank, pixels, encodes=encodes
    )
    owner, position = owner[mine], position[mine]
    first, length = firsts[owner], lengths[owner]
    input_index = torch.where(position < length, first + position, -1)
    flat_index = torch.where(position + 1 < length, first + position + 1, -1)
    index = {"input": input_index, "predicted": flat_index}
    index |= {"sequence": chosen.repeat_interleave(units), "unit": ranges(first_units, units)}

    def slots(column: Column, values: Tensor) -> Tensor:
        return take(values, index[column.aligned_to], column.padding).to(column.dtype)

    packed = batch.mapped(slots, leave_out=_NOT_PACKED)
    mask, turns = packed.pop("response_mask"), packed.pop("turns", 0)
    return Microbatch(
        labels=take(batch.tokens, flat_index).long(),
        position_ids=position,
        cu_seqlens=cu_seqlens.int(),
        bounds=cu_seqlens.tolist(),
        mask=mask,
        loss_slots=mask.nonzero()[:, 0],  # on the host, where a size needs no wait for the device
        sequence_ids=(units.cumsum(0) - units)[owner] + turns,
        flat_index=flat_index,
        input_index=input_index,
        images=images,
        **packed,
    )


def _padded(lengths: Tensor, sequence_multiple: int, total_multiple: int) -> Tensor:
    """Return (S,) int64: the slots of each sequence."""
    padded = (lengths + sequence_multiple - 1) // sequence_multiple * sequence_multiple
    total = int(padded.sum())
    multiple = math.lcm(sequence_multiple, total_multiple)
    padded[-1] += max(multiple, -(-total // multiple) * multiple) - total
    return padded


def _slots(padded: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Concatenate sequences of ``padded`` (S,) slots.

    Returns:
        (C,) sequence and (C,) position of each slot, and the (S + 1,) boundaries of the sequences.
    """
    cu_seqlens = torch.nn.functional.pad(padded.cumsum(0), (1, 0))
    owner = torch.repeat_interleave(torch.arange(len(padded), device=padded.device), padded)
    position = torch.arange(len(owner), device=padded.device) - cu_seqlens[owner]
    return owner, position, cu_seqlens


def _slots_of_rank(
    padded: Tensor, owner: Tensor, position: Tensor, cp_size: int, cp_rank: int
) -> Tensor | slice:
    """Return the index of the slots that one context-parallel rank holds."""
    if cp_size == 1:
        return slice(None)
    chunk = position // (padded // (2 * cp_size))[owner]
    return (chunk == cp_rank) | (chunk == 2 * cp_size - 1 - cp_rank)
