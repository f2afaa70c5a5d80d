"""Divide the images of a microbatch over the context-parallel ranks, and find the slots of their features."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .columns import TrainBatch
from .images import ROW, MicrobatchImages, distinct_rows
from .pixels import PixelReader
from .schema import ranges, take


def pack_images(
    batch: TrainBatch,
    sequences: Tensor,
    cu_seqlens: Tensor,
    slots: Tensor | slice,
    cp_size: int,
    cp_rank: int,
    pixels: PixelReader,
    *,
    encodes: bool,
) -> MicrobatchImages | None:
    """Return the images of a microbatch on one context-parallel rank; None if it has none on any rank.

    Args:
        sequences: (S,) rows of the batch; -1 is the sequence of a dummy microbatch.
        cu_seqlens: (S + 1,) boundaries of the sequences over all ranks.
        slots: index of this rank's slots in the slots of all ranks.
        pixels: reads the images.
        encodes: whether this stage of the pipeline encodes the images.
    """
    assert batch.image_counts is not None
    assert batch.image_starts is not None
    assert batch.image_grids is not None
    assert batch.image_digests is not None
    counts = take(batch.image_counts, sequences)
    images = ranges(take(batch.image_counts.cumsum(0) - batch.image_counts, sequences), counts)
    if not len(images):
        return None
    digests, grids = batch.image_digests[images], batch.image_grids[images]
    first, number = _distinct(digests, grids)
    sizes = grids.prod(1) // pixels.merge_size**2

    of_ranks = _split(grids[first].prod(1).tolist(), cp_size)
    order = first[torch.tensor([image for own in of_ranks for image in own], dtype=torch.int64)]
    ends = torch.zeros_like(sizes).index_copy(0, number[order], sizes[order].cumsum(0))[number]
    index = torch.full((int(cu_seqlens[-1]),), -1)
    starts = cu_seqlens[:-1].repeat_interleave(counts) + batch.image_starts[images]
    index[ranges(starts, sizes)] = ranges(ends - sizes, sizes)

    mine = first[torch.tensor(of_ranks[cp_rank] if encodes else [], dtype=torch.int64)]
    return MicrobatchImages(
        pixels=pixels.read(digests[mine], grids[mine]),
        grids=grids[mine],
        features=tuple(int(sizes[first[torch.tensor(own, dtype=torch.int64)]].sum()) for own in of_ranks),
        feature_index=index[slots],
    )


def _distinct(digests: Tensor, grids: Tensor) -> tuple[Tensor, Tensor]:
    """Return what ``distinct_rows`` does."""
    rows = np.zeros(len(digests), ROW)
    rows["digest"], rows["grid"] = digests.numpy(), grids.numpy()
    first, number = distinct_rows(rows)
    return torch.from_numpy(first), torch.from_numpy(number)


def _split(patches: list[int], parts: int) -> list[list[int]]:
    """Return the numbers of the images of each part. The largest come first, each to the smallest part."""
    own: list[list[int]] = [[] for _ in range(parts)]
    load = [0] * parts
    for image in sorted(range(len(patches)), key=lambda i: -patches[i]):
        part = load.index(min(load))
        own[part].append(image)
        load[part] += patches[image]
    return own
