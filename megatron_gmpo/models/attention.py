"""Core attention and RMSNorm in plain torch, for machines without Transformer Engine.

They replace Megatron's DotProductAttention, which does not support packed sequences and context parallelism,
and its WrappedTorchNorm, which does not support sequence parallelism (dot_product_attention.py and
torch_norm.py in megatron/core/transformer).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise, repeat
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from torch import Tensor


@dataclass
class Packing(PackedSeqParams):
    """Packed sequences as Megatron's attention expects them, with their bounds on the host too."""

    bounds: list[int] = field(default_factory=list)


def packing_of(bounds: list[int], cu_seqlens: Tensor | None = None) -> Packing:
    """Return the description of packed sequences that Megatron's attention expects.

    Args:
        bounds: the start of each sequence and the end of the last sequence, in slots over all
            context-parallel ranks.
        cu_seqlens: the same as (sequences + 1,) int32 on the device; None puts them on the host.
    """
    if cu_seqlens is None:
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    longest = max(end - start for start, end in pairwise(bounds))
    return Packing(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        cu_seqlens_q_padded=cu_seqlens,
        cu_seqlens_kv_padded=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        bounds=bounds,
    )


class RMSNorm(torch.nn.RMSNorm):
    """Root-mean-square norm. Megatron sums the gradient of its weight over the sequence-parallel ranks."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # pyright: ignore[reportAttributeAccessIssue]

    def forward(self, x: Tensor) -> Tensor:
        return _Normed.apply(x, self.weight, self.eps)  # pyright: ignore[reportReturnType]


class _Normed(torch.autograd.Function):
    """``rms_norm`` of torch, bit for bit. On a CPU its backward pass takes two to three times as long."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = exact.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (exact * scale).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        # with n = x * scale: d n / d x = scale * (1 - n n^T / H)
        grad, normed = grads[0].to(scale.dtype), x * scale
        products = grad * normed
        along = (products @ weight.to(scale.dtype)).unsqueeze(-1) / x.shape[-1]
        of_x = (grad * weight).addcmul_(normed, along, value=-1).mul_(scale)
        return of_x.to(x.dtype), products.flatten(0, -2).sum(0).to(weight.dtype), None


class PackedAttention(torch.nn.Module):
    """Causal attention over packed (THD) sequences, distributed zig-zag over the context-parallel ranks.

    It gathers keys and values over the context-parallel group and restores their order. The backward pass
    reduce-scatters their gradients. The causal mask uses global positions.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        pg_collection: Any,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        cp_comm_type: str | None = None,
    ) -> None:
        super().__init__()
        self.softmax_scale = softmax_scale
        self.cp_group: dist.ProcessGroup = pg_collection.cp

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Packing | None = None,
    ) -> Tensor:
        """Return the attention output (T, heads * e) of this rank's T tokens.

        Args:
            query: (T, heads, d).
            key: (T, groups, d).
            value: (T, groups, e).
        """
        assert packed_seq_params is not None, "only packed sequences are supported"
        cp, rank = self.cp_group.size(), self.cp_group.rank()
        bounds = packed_seq_params.bounds
        lengths = [end - start for start, end in pairwise(bounds)]
        masks: Iterable[Tensor | None] = repeat(None)
        if cp > 1:
            slots, positions = zip(
                *(_zigzag(start, end, bounds[-1], cp, rank, query.device) for start, end in pairwise(bounds)),
                strict=True,
            )
            in_order = torch.cat(slots)
            key, value = (
                gather_from_sequence_parallel_region(x, group=self.cp_group)[in_order] for x in (key, value)
            )
            masks = (  # one at a time: each has length^2 / cp elements
                at[:, None] >= torch.arange(length, device=query.device)
                for at, length in zip(positions, lengths, strict=True)
            )

        outputs = []
        # (1, tokens, heads, d). The gradient of a split is one concatenation. That of a slice is as long as
        # the whole tensor.
        queries = query[None].split([length // cp for length in lengths], 1)
        keys, values = (x[None].split(lengths, 1) for x in (key, value))
        for q, k, v, mask in zip(queries, keys, values, masks, strict=False):
            out = F.scaled_dot_product_attention(
                *(x.transpose(1, 2) for x in (q, k, v)),
                attn_mask=mask,
                is_causal=mask is None,
                scale=self.softmax_scale,
                enable_gqa=True,
            )
            outputs.append(out.transpose(1, 2))
        return torch.cat(outputs, 1)[0].flatten(1)


class LatentAttention(MLASelfAttention):
    """Multi-head latent attention with transformers' epsilon in the norms of the latents.

    Megatron uses the epsilon of the model's other norms. Source: modeling_deepseek_v3.py of transformers.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        module: Any
        for module in self.children():
            if hasattr(module, "eps"):  # a norm, or the up projection into which Transformer Engine fuses it
                module.eps = 1e-6

    def _resolve_qk_norm_config(self, submodules: Any) -> dict[str, Any]:
        """Return the modules of the layer spec unchanged.

        Megatron-Core 0.19 calls this hook (multi_latent_attention.py). Its default rejects ``qk_layernorm``
        for a model without a low-rank query projection, because it would put a norm before the full query
        projection.
        """
        return {name: getattr(submodules, name) for name in _QK_MODULES}


_QK_MODULES = ("linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj", "q_layernorm", "kv_layernorm")


def _zigzag(
    start: int, end: int, total: int, cp: int, rank: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return a sequence's slots in the gathered tensor and this rank's positions in it, both int64.

    A sequence consists of 2 * cp chunks, and rank r holds the chunks r and 2 * cp - 1 - r. The gathered
    tensor holds the tokens of rank 0, then the tokens of rank 1, and so on.
    """
    chunk = (end - start) // (2 * cp)
    step = torch.arange(chunk, device=device)
    first_slots = [r * (total // cp) + start // cp for r in range(cp)]
    early = [slot + step for slot in first_slots]
    late = [slot + chunk + step for slot in reversed(first_slots)]
    positions = torch.cat([rank * chunk + step, (2 * cp - 1 - rank) * chunk + step])
    return torch.cat([*early, *late]), positions
