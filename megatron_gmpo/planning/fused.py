"""Stand-ins for fused GPU kernels in a dry run.

They save the tensors that the kernels save for the backward pass, and compute nothing.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from .observer import Observer


class FusedNorm(torch.nn.Module):
    """Stand-in for a fused RMSNorm, which saves its input and one fp32 number per token."""

    def __init__(self, weight: torch.nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return _FusedNormFunction.apply(x, self.weight)  # pyright: ignore[reportReturnType]


class _FusedNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


class FusedAttention(torch.nn.Module):
    """Stand-in for FlashAttention, whose backward pass recomputes the scores.

    It saves queries, keys, values, the output, and one fp32 number per token and head. Context-parallel ranks
    gather keys and values, and reduce-scatter their gradients.
    """

    def __init__(self, cp_group: dist.ProcessGroup, observer: Observer) -> None:
        super().__init__()
        self.cp_group, self.observer = cp_group, observer

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *_: Any,
        packed_seq_params: PackedSeqParams,
        **__: Any,
    ) -> Tensor:
        bounds = packed_seq_params.cu_seqlens_q
        squares = int(((bounds[1:] - bounds[:-1]).long() ** 2).sum()) // self.cp_group.size()
        # two matrix products; the causal mask halves their FLOPs
        flops = squares * query.shape[1] * (query.shape[2] + value.shape[2])
        return fused_attention(query, key, value, self.observer, flops, self.cp_group)


def fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    observer: Observer,
    flops: int,
    cp_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Return the output (T, heads * e) of (T, heads, d), (T, groups, d) and (T, groups, e).

    Args:
        flops: FLOPs of the two matrix products.
        cp_group: ranks that gather keys and values.
    """
    return _FusedAttentionFunction.apply(query, key, value, cp_group, observer, flops)  # pyright: ignore[reportReturnType]


class _FusedAttentionFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cp_group: dist.ProcessGroup | None,
        observer: Observer,
        flops: int,
    ) -> Tensor:
        tokens, heads, _ = query.shape
        out = query.new_empty(tokens, heads * value.shape[2])
        ctx.save_for_backward(query, key, value, out, query.new_empty(tokens, heads, dtype=torch.float32))
        ctx.cp_group, ctx.observer, ctx.flops = cp_group, observer, flops
        observer.flops += flops
        for x in (key, value):
            if cp_group and cp_group.size() > 1:
                whole = x.new_empty(cp_group.size() * len(x), *x.shape[1:])
                dist.all_gather_into_tensor(whole, x.contiguous(), group=cp_group)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        query, key, value, _, _ = ctx.saved_tensors
        ctx.observer.flops += ctx.flops * 5 // 2  # one product for the scores, four for the gradients
        for x in (key, value):
            if ctx.cp_group and ctx.cp_group.size() > 1:
                whole = x.new_empty(ctx.cp_group.size() * len(x), *x.shape[1:])
                dist.reduce_scatter_tensor(torch.empty_like(x), whole, group=ctx.cp_group)
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None, None, None
