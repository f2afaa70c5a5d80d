"""The data of one optimizer step: one flat batch on every rank, and the packed microbatches cut from it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class RoutingShape:
    """What the routing of a MoE looks like.

    Attributes:
        num_layers: decoder layers, with and without experts.
        moe_layers: numbers, from 0, of those with experts.
        num_experts: experts of such a layer.
        topk: experts of a token.
    """

    num_layers: int
    moe_layers: tuple[int, ...]
    num_experts: int
    topk: int


def minibatch_bounds(count: int, parts: int) -> list[tuple[int, int]]:
    """Return (start, end) of at most ``parts`` stretches of ``count`` sequences whose sizes differ by at most one."""
    parts = min(parts, count)
    bounds = [round(i * count / parts) for i in range(parts + 1)]
    return list(pairwise(bounds))


@dataclass
class TrainBatch:
    """The sequences of a step, laid end to end, equal on every rank (S sequences, L = sum of their lengths).

    Per-token tensors are aligned to the token they describe: ``old_logprobs[t]`` is the log probability of ``tokens[t]`` given
    the tokens before it in its sequence.

    Attributes:
        tokens: (L,) int64.
        lengths: (S,) int64, tokens of each sequence, at least 1.
        response_mask: (L,) bool; tokens that carry loss. Never True on the first token of a sequence.
        advantages: (S,) fp32.
        rollout_logprobs: (L,) fp32, from the rollout engine, 0 outside the mask.
        old_logprobs: (L,) fp32, from the policy before the step's first update, 0 outside the mask; None until computed.
        ref_logprobs: (L,) fp32, from the reference policy, 0 outside the mask; None without one.
        sequence_weights: (S,) fp32, importance weights that multiply each sequence's loss; None means 1.
        token_weights: (L,) fp32, the same for each token's; None means 1.
        kept_tokens: (L,) bool; tokens that count in the policy term of the loss, among those of ``response_mask``; None means all.
        routed_experts: (L, layers, topk) int16 on the CPU, the experts each token had as an INPUT, -1 where unknown: in layers without
            experts, and on last tokens when the rollout engine recorded them. None when nobody recorded. Every rank holds all of it; only
            the tokens and layers that a rank computes go to its device.
        router_scores: (L, layers, topk) fp32 on the CPU, for rspo: the log scores that the old policy's routers gave the experts of each
            input token, in ascending order of the experts; 0 in layers without experts.
        router_shift: (L,) fp32, for rspo: how far the routing of each INPUT token moved since the old policy, ``losses.rspo``'s gamma.
            The input token t is what the ratio of token t + 1 depends on; of last tokens it means nothing.
    """

    tokens: Tensor
    lengths: Tensor
    response_mask: Tensor
    advantages: Tensor
    rollout_logprobs: Tensor
    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    sequence_weights: Tensor | None = None
    token_weights: Tensor | None = None
    kept_tokens: Tensor | None = None
    routed_experts: Tensor | None = None
    router_scores: Tensor | None = None
    router_shift: Tensor | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def starts(self) -> Tensor:
        """(S,) int64: where each sequence starts in the flat tensors."""
        return self.lengths.cumsum(0) - self.lengths

    @property
    def response_lengths(self) -> Tensor:
        """(S,) int64: tokens in the mask of each sequence."""
        owners = torch.repeat_interleave(torch.arange(len(self)), self.lengths)
        return torch.zeros_like(self.lengths).index_add(0, owners, self.response_mask.long())

    def split(self, parts: int) -> list[TrainBatch]:
        """Cuts into at most ``parts`` minibatches of neighbouring sequences whose counts differ by at most one."""
        starts = [*self.starts.tolist(), len(self.tokens)]

        def cut(name: str, lo: int, hi: int) -> Tensor | None:
            value = getattr(self, name)
            if value is None:
                return None
            per_sequence = name in ("lengths", "advantages", "sequence_weights")
            return value[lo:hi] if per_sequence else value[starts[lo] : starts[hi]]

        return [
            replace(self, **{name: cut(name, lo, hi) for name in self.__dataclass_fields__})
            for lo, hi in minibatch_bounds(len(self), parts)
        ]


@dataclass
class Microbatch:
    """One packed pipeline unit as one context-parallel rank sees it (T local tokens, S sequences).

    Each slot holds an input token and the token it predicts; per-token tensors describe the PREDICTED token, so they line up with
    the logits. What describes routing is of the input instead, which is what a router sees.

    Attributes:
        tokens: (T,) int64 inputs.
        labels: (T,) int64 predicted tokens, 0 where there is none.
        position_ids: (T,) int64 position of the input in its sequence.
        cu_seqlens: (S + 1,) int32 padded boundaries of the sequences over all context-parallel ranks (THD layout).
        mask: (T,) bool; the predicted token carries loss.
        sequence_ids: (T,) int64, which of the S sequences a slot belongs to (padding belongs to its sequence, with mask False).
        flat_index: (T,) int64, place of the predicted token in the TrainBatch's flat tensors, -1 where there is none.
        input_index: (T,) int64, place of the input token, -1 on padding.
        advantages: (S,) fp32.
        old_logprobs, ref_logprobs, rollout_logprobs, token_weights: (T,) fp32 or None.
        sequence_weights: (S,) fp32 or None.
        kept_tokens: (T,) bool or None.
        router_shift: (T,) fp32, how far the routing of the input token moved since the old policy, 0 on padding; or None.
        routed_experts: (T, layers, topk) int16, -1 where unknown, or None; in a policy's passes cut to a rank's own slots and layers.
        router_scores: (T, layers, topk) fp32, 0 on padding, or None; cut likewise.
    """

    tokens: Tensor
    labels: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    mask: Tensor
    sequence_ids: Tensor
    flat_index: Tensor
    input_index: Tensor
    advantages: Tensor
    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    rollout_logprobs: Tensor | None = None
    sequence_weights: Tensor | None = None
    token_weights: Tensor | None = None
    kept_tokens: Tensor | None = None
    router_shift: Tensor | None = None
    routed_experts: Tensor | None = None
    router_scores: Tensor | None = None

    def to(self, device: torch.device) -> Microbatch:
        """Moves every tensor to ``device``."""
        moved = {k: v.to(device, non_blocking=True) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved)
