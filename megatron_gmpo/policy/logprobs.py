"""Log probability and entropy of tokens from hidden states and the output matrix, without the logits.

Forward and backward passes process tiles, which are chunks of tokens times blocks of the vocabulary. The
backward pass computes the logits of a tile again. Memory holds the logits of one tile, and never those of all
tokens or their gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..models.fp32_head import fp32_product


def vocab_parallel_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    vocab_size: int,
    tp_group: dist.ProcessGroup | None,
    temperature: float = 1.0,
    chunk_tokens: int = 2048,
    fp32_head: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return log softmax(hidden @ weight.T / temperature)[label] and the entropy of that softmax.

    Both are differentiable. The gradient of ``hidden`` is this rank's summand: the caller sums it over the
    ranks of ``tp_group``.

    Args:
        hidden: (T, H) inputs of the output layer, any float dtype.
        weight: (V_local, H) rows of the output matrix on this tensor-parallel rank, in the dtype of
            ``hidden``.
        labels: (T,) int64 global token ids.
        vocab_size: size of the vocabulary without padding; rows beyond it get no probability.
        tp_group: ranks that share the vocabulary, in order; None if this rank has all of it.
        temperature: divides the logits.
        chunk_tokens: tokens of a tile.
        fp32_head: do not round the logits of bf16 inputs to bf16. Their gradient is rounded to the dtype of
            the inputs in any case, for the products of the backward pass.

    Returns:
        logprobs and entropy in nats, each (T,), fp32 (fp64 for fp64 inputs), equal on every rank of the
        group.
    """
    logprobs, entropy = _VocabParallelLogprobs.apply(
        hidden, weight, labels, vocab_size, tp_group, temperature, chunk_tokens, fp32_head
    )  # pyright: ignore[reportGeneralTypeIssues]
    return logprobs, entropy


class ChunkTokens(NamedTuple):
    """The T tokens of a tile in the backward pass; each field is (T,).

    Attributes:
        labels: int64 columns of the tile.
        mine: bool, whether the label is a column of this tile; if not, ``labels`` has any column.
        highest: largest y of all ranks; ``log_z`` is relative to it.
        log_z: logarithm of the sum of e^y.
        entropy: entropies.
        grad_logprobs: gradients of the log probabilities.
        grad_entropy: gradients of the entropies; None if the loss does not use them.
    """

    labels: Tensor
    mine: Tensor
    highest: Tensor
    log_z: Tensor
    entropy: Tensor
    grad_logprobs: Tensor
    grad_entropy: Tensor | None


class _VocabParallelLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        vocab_size: int,
        tp_group: dist.ProcessGroup | None,
        temperature: float,
        chunk_tokens: int,
        fp32_head: bool,
    ) -> tuple[Tensor, Tensor]:
        tokens, rows = len(hidden), len(weight)
        tp_group = None if tp_group is None or tp_group.size() == 1 else tp_group
        first = 0 if tp_group is None else tp_group.rank() * rows
        valid = max(0, min(rows, vocab_size - first))  # rows of this rank without padding
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        local = labels - first
        mine = (local >= 0) & (local < valid)

        arithmetic, product = _arithmetic(hidden.device), _product(hidden.dtype, fp32_head)
        found = torch.zeros(4, tokens, dtype=dtype, device=hidden.device)
        width = tile_columns(hidden.device)
        blocks = list(_spans(valid, width))
        for chunk in _spans(tokens, chunk_tokens) if valid else ():
            # one tensor, because small ones between the tiles would leave gaps in the heap
            parts = found.new_empty(len(blocks), 4, len(local[chunk]))
            for part, block in zip(parts, blocks, strict=True):
                logits = product(hidden[chunk], weight[block].T)
                part.copy_(arithmetic.statistics(logits, _within(block, local[chunk])[0], temperature))
                del logits  # before the product of the next block
            found[:, chunk] = _merged(parts, local[chunk].clamp(0, valid - 1) // width)
        highest, sums = found[0], found[1:]
        sums[2].mul_(mine)
        if valid == 0:
            highest.fill_(-torch.inf)
        if tp_group is not None:
            highest = _relative_to_highest(sums, highest, mine, tp_group)

        log_z = sums[0].log()
        entropy = log_z - sums[1] / sums[0]
        ctx.save_for_backward(hidden, weight, local, highest, log_z, entropy)
        ctx.valid, ctx.temperature, ctx.chunk_tokens, ctx.product = valid, temperature, chunk_tokens, product
        ctx.set_materialize_grads(False)
        return sums[2] - log_z, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_logprobs, grad_entropy = grads
        hidden, weight, local, highest, log_z, entropy = ctx.saved_tensors
        arithmetic = _arithmetic(hidden.device)
        if grad_logprobs is None:
            grad_logprobs = torch.zeros_like(log_z)
        grad_hidden = torch.zeros_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=log_z.dtype) if ctx.needs_input_grad[1] else None
        for chunk in _spans(len(hidden), ctx.chunk_tokens) if ctx.valid else ():
            known = (highest, log_z, entropy, grad_logprobs, grad_entropy)
            of_chunk = [None if column is None else column[chunk] for column in known]
            total = torch.zeros_like(hidden[chunk], dtype=log_z.dtype)
            for block in _spans(ctx.valid, tile_columns(hidden.device)):
                logits = ctx.product(hidden[chunk], weight[block].T)
                inside = _within(block, local[chunk])
                tokens = ChunkTokens(*inside, *of_chunk)  # pyright: ignore[reportArgumentType]
                grad = arithmetic.gradient_(logits, tokens, ctx.temperature).to(hidden.dtype)
                _add_product(total, grad, weight[block])
                if grad_weight is not None:
                    _add_product(grad_weight[block], grad.T, hidden[chunk])
                del logits, grad  # before the product of the next block
            grad_hidden[chunk] = total
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), *[None] * 6


class TorchArithmetic:
    """The arithmetic on the logits of a tile in plain torch; ``logprob_kernels`` has it for CUDA tensors."""

    @staticmethod
    def statistics(logits: Tensor, labels: Tensor, temperature: float) -> Tensor:
        """See ``logprob_kernels.statistics``."""
        y = _scaled(logits, temperature)
        highest = y.amax(-1)
        y.sub_(highest[:, None])
        at_label = y.gather(1, labels[:, None])[:, 0]
        e = y.exp()
        return torch.stack([highest, e.sum(-1), y.mul_(e).sum(-1), at_label])

    @staticmethod
    def gradient_(logits: Tensor, tokens: ChunkTokens, temperature: float) -> Tensor:
        """See ``logprob_kernels.gradient_``."""
        labels, mine, highest, log_z, entropy, grad_logprobs, grad_entropy = tokens
        # with p = softmax: d logprob / d y = onehot - p,  d entropy / d y = -p (log p + entropy)
        logp = _scaled(logits, temperature)
        # two subtractions, because the sum of log_z and a large ``highest`` would be rounded
        logp.sub_(highest[:, None]).sub_(log_z[:, None])
        if grad_entropy is None:
            grad = logp.exp_().mul_(-grad_logprobs[:, None])
        else:
            grad = logp.exp()
            logp.add_(entropy[:, None]).mul_(-grad_entropy[:, None])
            grad.mul_(logp.sub_(grad_logprobs[:, None]))
        grad.scatter_add_(1, labels[:, None], (grad_logprobs * mine)[:, None])
        if temperature != 1:
            grad.div_(temperature)
        return grad.to(logits.dtype)


def _arithmetic(device: torch.device) -> Any:
    if device.type != "cuda":
        return TorchArithmetic
    from . import logprob_kernels  # CPU builds of torch come without Triton

    return logprob_kernels


def _product(dtype: torch.dtype, fp32_head: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the function that makes logits from hidden states and a transposed output matrix."""
    return fp32_product if fp32_head and dtype == torch.bfloat16 else torch.matmul


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    """Return the logits divided by the temperature, at least fp32; may change them in place."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits if temperature == 1 else logits.div_(temperature)


def _within(block: slice, local: Tensor) -> tuple[Tensor, Tensor]:
    """Return the columns of a block that hold the labels, and whether they do; others get any column."""
    columns, width = local - block.start, block.stop - block.start
    return columns.clamp(0, width - 1), (columns >= 0) & (columns < width)


def _merged(parts: Tensor, owners: Tensor) -> Tensor:
    """Combine the ``statistics`` of B blocks, (B, 4, T), to those of all their columns, (4, T).

    Args:
        owners: (T,) int64, the block that has the label.
    """
    highest, total, weighted, at_label = parts.unbind(1)
    overall = highest.amax(0)
    shift = highest - overall
    scale = shift.exp()
    weighted = ((weighted + total * shift) * scale).sum(0)
    at_label = (at_label + shift).gather(0, owners[None])[0]
    return torch.stack([overall, (total * scale).sum(0), weighted, at_label])


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add ``a @ b`` to ``total`` in the dtype of ``total``, which is fp32 for bf16 factors."""
    if a.is_cuda and a.dtype != total.dtype:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)  # not run on a GPU yet
    else:
        torch.addmm(total, a.to(total.dtype), b.to(total.dtype), out=total)


def _relative_to_highest(sums: Tensor, highest: Tensor, mine: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum over the ranks of the group in place, relative to the largest y of all ranks, which is returned."""
    overall = highest.clone()
    dist.all_reduce(overall, op=dist.ReduceOp.MAX, group=group)
    shift = (highest - overall).nan_to_num(neginf=0.0)  # -inf on a rank without valid rows, whose sums are 0
    scale = shift.exp()
    sums[1].addcmul_(sums[0], shift).mul_(scale)
    sums[0].mul_(scale)
    sums[2].add_(shift * mine)
    dist.all_reduce(sums, group=group)
    return overall


def _spans(length: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


def tile_columns(device: torch.device) -> int:
    """Return the columns of a tile. With 2,048 tokens in fp32, 512 fit in a CPU's cache.

    A GPU needs large products.
    """
    return 512 if device.type == "cpu" else 8192
