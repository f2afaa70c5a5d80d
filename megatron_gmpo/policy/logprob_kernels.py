"""Triton kernels of ``policy.logprobs`` for CUDA tensors: each reads the logits of a tile once.

The formulas are those of ``policy.logprobs``. The kernels run in Triton's interpreter in
tests/unit/test_logprob_kernels.py. They have not run on a GPU yet.
"""

from __future__ import annotations

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from .logprobs import ChunkTokens

_BLOCK = 4096
_WARPS = 16


def statistics(logits: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Return (4, T) fp32 of y = logits / temperature, one column per token.

    The rows are the largest y and, with y relative to it, the sum of e^y, the sum of e^y * y, and y at the
    label.

    Args:
        logits: (T, V) with contiguous rows, V > 0.
        labels: (T,) int64 columns.
    """
    found = torch.empty(4, len(logits), dtype=torch.float32, device=logits.device)
    _statistics[(len(logits),)](  # pyright: ignore[reportIndexIssue]
        logits, labels, found, *logits.shape, logits.stride(0), temperature, BLOCK=_BLOCK, num_warps=_WARPS
    )
    return found


def gradient_(logits: Tensor, tokens: ChunkTokens, temperature: float) -> Tensor:
    """Replace ``logits`` by the gradient of the loss with respect to them, and return them.

    Args:
        logits: (T, V) with contiguous rows.
    """
    # the gradient of a sum has stride 0, but the kernel reads consecutive numbers
    known = [column.contiguous() for column in tokens if column is not None]
    with_entropy = tokens.grad_entropy is not None
    columns = logits.shape[1]
    _gradient[(len(logits), triton.cdiv(columns, _BLOCK))](  # pyright: ignore[reportIndexIssue]
        logits,
        *known,
        *([] if with_entropy else known[-1:]),  # an argument that is not read
        columns,
        logits.stride(0),
        temperature,
        WITH_ENTROPY=with_entropy,
        BLOCK=_BLOCK,
        num_warps=_WARPS,
    )
    return logits


@triton.jit
def _statistics(logits, labels, found, tokens, columns, stride, temperature, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    highest = -float("inf")
    total = 0.0
    weighted = 0.0
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < columns
        y = tl.load(logits + token * stride + column, mask=inside, other=-float("inf")).to(tl.float32)
        y = y / temperature
        higher = tl.maximum(highest, tl.max(y))
        # before the first block the sums are 0 and ``highest - higher`` is -inf
        shift = tl.where(start == 0, 0.0, highest - higher)
        y = y - higher
        e = tl.exp(y)
        weighted = (weighted + total * shift) * tl.exp(shift) + tl.sum(tl.where(inside, e * y, 0.0))
        total = total * tl.exp(shift) + tl.sum(e)
        highest = higher
    label = tl.load(labels + token)
    at_label = tl.load(logits + token * stride + label).to(tl.float32) / temperature - highest
    tl.store(found + token, highest)
    tl.store(found + tokens + token, total)
    tl.store(found + 2 * tokens + token, weighted)
    tl.store(found + 3 * tokens + token, at_label)


@triton.jit
def _gradient(
    logits,
    labels,
    mine,
    highest,
    log_z,
    entropy,
    grad_logprobs,
    grad_entropy,
    columns,
    stride,
    temperature,
    WITH_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    where = logits + token * stride + column
    y = tl.load(where, mask=inside, other=0.0).to(tl.float32) / temperature
    log_p = y - tl.load(highest + token) - tl.load(log_z + token)
    upstream = tl.load(grad_logprobs + token)
    factor = -upstream
    if WITH_ENTROPY:
        factor = factor - tl.load(grad_entropy + token) * (log_p + tl.load(entropy + token))
    at_label = (column == tl.load(labels + token)) & tl.load(mine + token)
    gradient = tl.exp(log_p) * factor + tl.where(at_label, upstream, 0.0)
    tl.store(where, (gradient / temperature).to(logits.dtype.element_ty), mask=inside)
