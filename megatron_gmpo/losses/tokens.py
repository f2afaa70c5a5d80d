"""The argument of every policy loss, its result, and the arithmetic that losses share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..distributed import sum_over_group
from ..metrics.figures import Metric
from ..metrics.histogram import histogram

K3_BOUND = 20.0
"""Largest log ratio whose ``k3`` is exact, the bound of verl (trainer/ppo/core_algos.py)."""


@dataclass(frozen=True)
class LossOutput:
    """The result of a policy loss.

    Attributes:
        loss: the SUM over sequences, 0-d fp32 with gradient.
        metrics: metrics of the microbatch by name, without gradient.
    """

    loss: Tensor
    metrics: dict[str, Metric]


_FLOAT_COLUMNS = ("logprobs", "old_logprobs", "ref_logprobs", "rollout_logprobs", "entropy", "token_weights")


@dataclass(frozen=True)
class LossTokens:
    """The T packed tokens of a microbatch and its S sequences, in any order.

    A sequence is a response, an episode of several turns, or one of these turns (``algorithm.unit``).

    Under context parallelism the T tokens are those of this rank, and all ranks of ``cp_group`` hold the same
    S sequences. The constructor converts the (T,) floating-point tensors below to fp32 (float64 stays
    float64) and sets them to 0 outside the mask, so that a loss can compute with all T slots.

    Attributes:
        logprobs: (T,) log probabilities under the current policy, with gradient.
        old_logprobs: (T,) log probabilities under the policy before the step's first update, or those of the
            rollout engine (``algorithm.old_logprobs``). They center the clip interval.
        mask: (T,) bool, True for response tokens. Values of other tokens are ignored, nan and inf included.
        sequence_ids: (T,) int64 in 0..S-1, the sequence of each token. Response tokens of a sequence need not
            be adjacent.
        advantages: (S,), one per sequence.
        cp_group: ranks among which the tokens of a sequence are split; None means one rank.
        ref_logprobs: (T,) log probabilities under the reference policy, or None.
        rollout_logprobs: (T,) log probabilities that the rollout engine reported, or None.
        entropy: (T,) entropy of the current policy in nats, or None. It has a gradient if ``entropy_coef`` is
            not 0 or the loss needs the column ``entropy``.
        sequence_weights: (S,) importance weights of the policy terms of the sequences; None means 1.
        token_weights: (T,) importance weights that multiply the policy term of each token, in losses whose
            entry supports them; None means 1.
        kept: (T,) bool, tokens that count in the policy term; None means all.
        max_kl: bound, in nats, of off-policy sequence masking (DeepSeek-V3.2, arXiv 2512.02556, section 3.1):
            the policy term excludes a sequence with a negative advantage if the mean of
            ``rollout_logprobs - logprobs`` over its tokens exceeds the bound. The mean uses the CURRENT
            policy, so it includes the mismatch with the rollout engine, stale samples and the step's earlier
            updates. None disables the mask.
        kl_coef: weight of ``k3(pi, pi_ref)``, the KL penalty; needs ``ref_logprobs``.
        entropy_coef: weight of the entropy bonus; needs ``entropy``.
        max_response_tokens: token limit of a sequence in the rollout, or None.
        columns: other columns that the loss needs, by name, as its registry entry lists them.
    """

    logprobs: Tensor
    old_logprobs: Tensor
    mask: Tensor
    sequence_ids: Tensor
    advantages: Tensor
    cp_group: dist.ProcessGroup | None = None
    ref_logprobs: Tensor | None = None
    rollout_logprobs: Tensor | None = None
    entropy: Tensor | None = None
    sequence_weights: Tensor | None = None
    token_weights: Tensor | None = None
    kept: Tensor | None = None
    max_kl: float | None = None
    kl_coef: float = 0.0
    entropy_coef: float = 0.0
    max_response_tokens: int | None = None
    columns: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert self.kl_coef == 0 or self.ref_logprobs is not None, "kl_coef needs ref_logprobs"
        assert self.entropy_coef == 0 or self.entropy is not None, "entropy_coef needs entropy"
        assert self.max_kl is None or self.rollout_logprobs is not None, "max_kl needs rollout_logprobs"
        converted = {
            name: self.masked(x) for name in _FLOAT_COLUMNS if (x := getattr(self, name)) is not None
        }
        converted["advantages"] = self.advantages.to(self.dtype)
        if self.sequence_weights is not None:
            converted["sequence_weights"] = self.sequence_weights.to(self.dtype)
        for name, tensor in converted.items():
            object.__setattr__(self, name, tensor)  # the dataclass is frozen

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the arithmetic: fp32, or float64 if ``logprobs`` are float64."""
        return torch.promote_types(self.logprobs.dtype, torch.float32)

    @cached_property
    def policy_mask(self) -> Tensor:
        """Return (T,) bool: tokens that count in the policy term."""
        return self.mask if self.kept is None else self.mask & self.kept

    @cached_property
    def log_ratio(self) -> Tensor:
        """Return (T,) ``log pi - log pi_old`` with gradient, 0 outside ``policy_mask``."""
        # Select before any exp: the ratio of an excluded token may overflow, and 0 * inf is nan.
        return torch.where(self.policy_mask, self.logprobs - self.old_logprobs, 0)

    @cached_property
    def drift(self) -> Tensor:
        """Return (T,) ``log pi - log pi_old`` of all response tokens, without gradient."""
        return (self.logprobs - self.old_logprobs).detach()

    @cached_property
    def token_advantages(self) -> Tensor:
        """Return (T,) advantages: for each token, the advantage of its sequence."""
        return self.advantages[self.sequence_ids]

    def masked(self, x: Tensor) -> Tensor:
        """Return the (T,) tensor ``x`` in ``dtype``, 0 outside the mask."""
        # Select before any arithmetic, so that inf and nan in padding slots reach no value and no gradient.
        return torch.where(self.mask, x.to(self.dtype), 0)

    def sum_per_sequence(self, columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Sum (T,) columns over the response tokens of each sequence, on all ranks of ``cp_group``.

        One all-reduce in ``dtype`` carries all columns, so call this once per loss. Its backward pass is the
        identity, because the sums, and the loss computed from them, are replicated over ``cp_group``.

        Returns:
            (S,) per column. Also ``tokens`` (number of response tokens n_i), ``kept`` (number of tokens in
            ``policy_mask``) and the sums that ``output`` needs.
        """
        shared = {"tokens": self.mask, "kept": self.policy_mask, "kl_old": k3(self.drift)}
        bounded = self.drift > K3_BOUND
        if self.max_kl is not None:
            assert self.rollout_logprobs is not None
            shared["kl_rollout"] = self.rollout_logprobs - self.logprobs.detach()
        if self.ref_logprobs is not None:
            log_ratio = self.ref_logprobs - self.logprobs
            shared["kl_ref"] = k3(log_ratio)
            bounded = bounded | (log_ratio.detach() > K3_BOUND)
        shared["kl_bounded"] = bounded
        if self.entropy is not None:
            shared["entropy"] = self.entropy
        assert not columns.keys() & shared.keys(), f"names in use: {sorted(columns.keys() & shared.keys())}"
        columns = {**columns, **shared}
        stacked = torch.stack([self.masked(column) for column in columns.values()], dim=1)  # (T, C)
        # float64, because sequential fp32 additions lose four digits over 20k tokens
        zeros = stacked.new_zeros(len(self.advantages), len(columns), dtype=torch.float64)
        sums = zeros.index_add(0, self.sequence_ids, stacked.double()).to(self.dtype)  # (S, C)
        sums = sum_over_group(sums, self.cp_group).unbind(1)
        # Stacking gave every column a gradient, so detach the columns that had none.
        return {
            name: x if columns[name].requires_grad else x.detach()
            for name, x in zip(columns, sums, strict=True)
        }

    def kept_sequences(self, sums: Mapping[str, Tensor]) -> Tensor:
        """Return (S,) bool: sequences that count in the policy term.

        A sequence without tokens in ``policy_mask`` does not count.
        """
        kept = sums["kept"] > 0
        if self.max_kl is not None:
            drifted = sums["kl_rollout"] > self.max_kl * sums["tokens"]
            kept &= ~(drifted & (self.advantages < 0))
        return kept

    def output(
        self,
        objective: Tensor,
        sums: Mapping[str, Tensor],
        metrics: Mapping[str, Metric] | None = None,
        *,
        penalty_divisor: Tensor | float | None = None,
    ) -> LossOutput:
        """Return minus the sum of ``objective``, plus the penalties, with the metrics of every loss.

        ``sequence_weights`` multiply the objective; a weight of 0 gives exactly 0, also where the objective
        overflows. Excluded sequences and tokens lose only their policy term. Divisors and penalties include
        them, so the other terms keep their weight.

        Args:
            objective: (S,) with gradient, the value to maximize; ignored for sequences that do not count.
            sums: the result of ``sum_per_sequence``.
            metrics: the loss's own metrics.
            penalty_divisor: divisor of each sequence's sum of KL and entropy terms, scalar or (S,). None
                means the sequence's number of tokens. A loss that divides its policy term by something else
                passes the same divisor here.
        """
        kept = self.kept_sequences(sums)
        if self.sequence_weights is None:
            objective = torch.where(kept, objective, 0)
        else:
            weights = self.sequence_weights
            objective = torch.where(kept & (weights != 0), objective, 0) * weights
        loss = -objective.sum()
        divisor = sums["tokens"].clamp(min=1) if penalty_divisor is None else penalty_divisor
        if self.kl_coef != 0:
            loss = loss + self.kl_coef * (sums["kl_ref"] / divisor).sum()
        if self.entropy_coef != 0:
            loss = loss - self.entropy_coef * (sums["entropy"] / divisor).sum()
        return LossOutput(loss, {**(metrics or {}), **self._shared_metrics(sums, kept)})

    def _shared_metrics(self, sums: Mapping[str, Tensor], kept: Tensor) -> dict[str, Metric]:
        count = sums["tokens"].sum()
        names = ("kl_old", "kl_ref", "kl_bounded", "entropy")
        metrics = means({name: sums[name] for name in names if name in sums}, count)
        metrics |= extremes("log_ratio", self.drift, self.mask)
        metrics["policy/log_ratio"] = Metric(histogram(self.drift, self.mask), op="histogram")
        if self.kept is not None or self.max_kl is not None:
            nonempty = sums["tokens"] > 0
            metrics |= means({"masked_fraction": count - sums["kept"].where(kept, 0).sum()}, count)
            metrics |= means({"masked_sequences": nonempty & ~kept}, nonempty.sum())
        return metrics


def k3(log_ratio: Tensor) -> Tensor:
    """Return the k3 estimate ``exp(x) - x - 1`` of KL(q || p) from samples of q, with ``x = log p - log q``.

    Source: Schulman, Approximating KL divergence. Where x exceeds ``K3_BOUND``, the value is that of
    ``K3_BOUND``, 4.9e8, and the gradient is 0; exp would overflow fp32 at 88.7. The metrics
    ``policy/kl_bounded`` and ``rollout/k3_kl_bounded`` count such tokens.
    """
    x = log_ratio.clamp(max=K3_BOUND)
    return torch.expm1(x) - x


class _Exp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        result = x.exp()
        ctx.save_for_backward(result)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (result,) = ctx.saved_tensors
        return torch.where(grads[0] == 0, 0, grads[0] * result)


def exp(x: Tensor) -> Tensor:
    """Return ``x.exp()``, whose gradient is exactly 0 where the incoming gradient is 0.

    torch returns 0 * inf = nan there if the exponential overflows: for a token or sequence that a mask, an
    advantage of 0 or a weight of 0 removes from the loss after the exponential.
    """
    return _Exp.apply(x)  # pyright: ignore[reportReturnType]


def log_interval(clip_low: float, clip_high: float) -> tuple[float, float]:
    """Return the bounds of a log ratio whose ratio is clipped to [1 - clip_low, 1 + clip_high].

    Clip the log ratio instead of the ratio, which overflows fp32 where the log ratio exceeds 88.7: the
    gradient of a clipped infinite ratio is 0 * inf = nan. The lower bound is -inf from ``clip_low`` = 1 on.
    """
    return math.log1p(-clip_low) if clip_low < 1 else -math.inf, math.log1p(clip_high)


def clip_one_sided(x: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """Return the value c for which ``A c`` is PPO's pessimistic objective.

    That objective is ``min(x A, clip(x, low, high) A)`` with A = ``advantages``.
    """
    return torch.where(advantages > 0, x.clamp(max=high), x.clamp(min=low))


def clip_events(x: Tensor, advantages: Tensor, low: float, high: float) -> dict[str, Tensor]:
    """Return bool tensors, by side, that are True where ``clip_one_sided`` changes ``x``.

    Where the advantage is zero, both are False.
    """
    return {
        "clip_fraction_high": (advantages > 0) & (x > high),
        "clip_fraction_low": (advantages < 0) & (x < low),
    }


def extremes(name: str, values: Tensor, where: Tensor) -> dict[str, Metric]:
    """Return the metrics ``policy/NAME_max`` and ``policy/NAME_min`` of ``values`` where ``where`` is True.

    If ``where`` is False everywhere, they are -inf and inf.
    """
    values = values.detach()
    return {
        f"policy/{name}_max": Metric(torch.where(where, values, -torch.inf).max(), op="max"),
        f"policy/{name}_min": Metric(torch.where(where, values, torch.inf).min(), op="min"),
    }


def means(totals: Mapping[str, Tensor], count: Tensor) -> dict[str, Metric]:
    """Return the metrics ``policy/NAME``: each tensor's sum, over ``count`` tokens or sequences."""
    return {f"policy/{name}": Metric(total.detach().sum(), count) for name, total in totals.items()}
