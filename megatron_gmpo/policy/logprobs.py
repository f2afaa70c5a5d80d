"""Log probability and entropy under vocabulary-parallel logits, without a second copy of the logits.

Forward and backward passes process the tokens in chunks, and the backward pass recomputes the softmax.
Besides the logits and their gradient, memory holds only a few chunks in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def vocab_parallel_logprobs(
    logits: Tensor,
    labels: Tensor,
    *,
    vocab_size: int,
    tp_group: dist.ProcessGroup | None,
    temperature: float = 1.0,
    chunk_tokens: int = 128,
) -> tuple[Tensor, Tensor]:
    """Return log softmax(logits / temperature)[label] and the entropy of that softmax, both differentiable.

    Args:
        logits: (T, V_local) columns of this tensor-parallel rank, any float dtype.
        labels: (T,) int64 global token ids.
        vocab_size: size of the vocabulary without padding; columns beyond it get no probability.
        tp_group: ranks that share the vocabulary, in order; None if this rank has all of it.
        temperature: divides the logits.
        chunk_tokens: number of tokens per chunk.

    Returns:
        logprobs and entropy in nats, each (T,), fp32 (fp64 for fp64 logits), equal on every rank of the
        group.
    """
    logprobs, entropy = _VocabParallelLogprobs.apply(
        logits, labels, vocab_size, tp_group, temperature, chunk_tokens
    )  # pyright: ignore[reportGeneralTypeIssues]
    return logprobs, entropy


class _VocabParallelLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int,
        tp_group: dist.ProcessGroup | None,
        temperature: float,
        chunk_tokens: int,
    ) -> tuple[Tensor, Tensor]:
        tokens, columns = logits.shape
        tp_group = None if tp_group is None or tp_group.size() == 1 else tp_group
        first = 0 if tp_group is None else tp_group.rank() * columns
        valid = max(0, min(columns, vocab_size - first))  # columns of this rank without padding
        dtype = torch.promote_types(logits.dtype, torch.float32)
        local = labels - first
        mine = (local >= 0) & (local < valid)
        local = local.clamp(0, columns - 1)

        highest = torch.full((tokens,), -torch.inf, dtype=dtype, device=logits.device)
        if valid:
            highest.copy_(logits[:, :valid].amax(-1)).div_(temperature)
        _reduce(highest, dist.ReduceOp.MAX, tp_group)

        # sum of e^y, sum of e^y * y, and y at the label, with y = logits / temperature - highest
        sums = torch.zeros(3, tokens, dtype=dtype, device=logits.device)
        for chunk in _chunks(tokens, chunk_tokens):
            y = logits[chunk, :valid].to(dtype, copy=True).div_(temperature).sub_(highest[chunk, None])
            if valid:
                sums[2, chunk] = y.gather(1, local[chunk, None].clamp(max=valid - 1))[:, 0] * mine[chunk]
            e = y.exp()
            sums[0, chunk] = e.sum(-1)
            sums[1, chunk] = e.mul_(y).sum(-1)
        _reduce(sums, dist.ReduceOp.SUM, tp_group)

        log_z = sums[0].log()
        entropy = log_z - sums[1] / sums[0]
        ctx.save_for_backward(logits, local, mine, highest, log_z, entropy)
        ctx.valid, ctx.temperature, ctx.chunk_tokens = valid, temperature, chunk_tokens
        return sums[2] - log_z, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        grad_logprobs, grad_entropy = grads
        logits, local, mine, highest, log_z, entropy = ctx.saved_tensors
        grad = torch.empty_like(logits)
        grad[:, ctx.valid :] = 0
        for chunk in _chunks(len(logits), ctx.chunk_tokens):
            # with p = softmax: d logprob / d y = onehot - p,  d entropy / d y = -p (log p + entropy)
            logp = logits[chunk, : ctx.valid].to(entropy.dtype, copy=True).div_(ctx.temperature)
            # two subtractions, because the sum of log_z and a large ``highest`` would be rounded
            logp.sub_(highest[chunk, None]).sub_(log_z[chunk, None])
            p = logp.exp()
            factor = (
                logp.add_(entropy[chunk, None])
                .mul_(-grad_entropy[chunk, None])
                .sub_(grad_logprobs[chunk, None])
            )
            p.mul_(factor)
            if ctx.valid:
                onehot = (grad_logprobs[chunk] * mine[chunk])[:, None]
                p.scatter_add_(1, local[chunk, None].clamp(max=ctx.valid - 1), onehot)
            grad[chunk, : ctx.valid] = p.div_(ctx.temperature)
        return grad, None, None, None, None, None


def _chunks(tokens: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, tokens, size))


def _reduce(x: Tensor, op: Any, group: dist.ProcessGroup | None) -> None:
    if group is not None:
        dist.all_reduce(x, op=op, group=group)
