"""What the policy losses share: masked tokens of packed sequences, their sums per sequence, penalties and metrics."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..distributed import sum_over_group
from ..metrics.figures import Metric
from ..metrics.histogram import histogram


@dataclass(frozen=True)
class LossOutput:
    """What a policy loss returns: the SUM over sequences (0-d fp32, with gradient) and its metrics (no gradient)."""

    loss: Tensor
    metrics: dict[str, Metric]


@dataclass(frozen=True)
class TokenPenalty:
    """Per-token terms added to a policy loss: ``kl_coef * k3(pi_new, pi_ref) - entropy_coef * entropy``.

    A sequence's penalty is reduced with the same divisor as its policy term: the mean over its tokens in the sequence losses, the
    sum in the token-mean losses, ``sum / length_normalizer`` in Dr. GRPO. ``sequence_weights`` do not multiply it.

    Attributes:
        ref_logprobs: (T,) of the reference policy; needed when ``kl_coef`` is not 0, else only logged as policy/kl_ref.
        kl_coef: weight of the KL to the reference.
        entropy: (T,) of the current policy, in nats, with gradient; needed when ``entropy_coef`` is not 0, else only logged.
        entropy_coef: weight of the entropy bonus.
    """

    ref_logprobs: Tensor | None = None
    kl_coef: float = 0.0
    entropy: Tensor | None = None
    entropy_coef: float = 0.0

    def __post_init__(self) -> None:
        assert self.kl_coef == 0 or self.ref_logprobs is not None, "kl_coef needs ref_logprobs"
        assert self.entropy_coef == 0 or self.entropy is not None, "entropy_coef needs entropy"


@dataclass(frozen=True)
class PolicyMask:
    """What is left out of the policy term of a loss. Divisors and penalties stay as they are: nothing else gets heavier.

    A token left out has no gradient. Where the term is a sum over tokens it loses its summand, as in IcePop's definition; in the
    geometric mean of gmpo, rspo and gspo its ratio becomes 1 and n_i still counts it, as it does a clipped token. A sequence left out,
    or without any token kept, contributes exactly 0.

    Attributes:
        kept: (T,) bool, tokens that stay; None means all.
        rollout_logprobs: (T,) of the policy that sampled the tokens; needed for a finite ``max_kl``.
        max_kl: a sequence with A < 0 is left out where the mean over its tokens of rollout_logprobs - logprobs is above this, in nats
            (off-policy sequence masking, DeepSeek-V3.2, arXiv 2512.02556, section 3.1). It is that of the CURRENT policy, so it
            covers the engines' mismatch, stale samples and the drift over the updates of a step.
    """

    kept: Tensor | None = None
    rollout_logprobs: Tensor | None = None
    max_kl: float = math.inf

    def __post_init__(self) -> None:
        assert self.max_kl == math.inf or self.rollout_logprobs is not None, "max_kl needs rollout_logprobs"


def k3(log_ratio: Tensor) -> Tensor:
    """Schulman's k3 estimator ``exp(x) - x - 1`` of KL(q || p) from samples of q, with ``x = log p - log q``."""
    return torch.expm1(log_ratio) - log_ratio


def clip_one_sided(x: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """PPO's pessimistic clip as one value: ``min(x A, clip(x, low, high) A) == A * clip_one_sided(x, A, low, high)``."""
    return torch.where(advantages > 0, x.clamp(max=high), x.clamp(min=low))


def clip_events(x: Tensor, advantages: Tensor, low: float, high: float) -> dict[str, Tensor]:
    """Where ``clip_one_sided`` acts, by side; a zero advantage never counts."""
    return {
        "clip_fraction_high": (advantages > 0) & (x > high),
        "clip_fraction_low": (advantages < 0) & (x < low),
    }


class PackedTokens:
    """The tokens of a microbatch as the losses see them: zero outside the mask, in fp32 (float64 when given float64).

    Arguments are those of ``gmpo_loss``.

    Attributes:
        logprobs: (T,) with gradient.
        drift: (T,) log pi_new - log pi_old, without gradient.
        kept: (T,) bool, tokens that count in the policy term.
        log_ratio: (T,) the same as ``drift`` with gradient, 0 where a token is not kept.
        advantages: (S,).
        token_advantages: (T,), each token's sequence's.
    """

    def __init__(
        self,
        logprobs: Tensor,
        old_logprobs: Tensor,
        mask: Tensor,
        sequence_ids: Tensor,
        advantages: Tensor,
        sequence_weights: Tensor | None,
        policy_mask: PolicyMask | None,
        penalty: TokenPenalty | None,
    ) -> None:
        self.dtype = torch.promote_types(logprobs.dtype, torch.float32)
        self.mask = mask
        self.sequence_ids = sequence_ids
        self.penalty = penalty or TokenPenalty()
        self.masks = policy_mask is not None
        self.policy_mask = policy_mask or PolicyMask()
        self.kept = mask if self.policy_mask.kept is None else mask & self.policy_mask.kept
        self.logprobs = self.masked(logprobs)
        log_ratio = self.logprobs - self.masked(old_logprobs)
        self.drift = log_ratio.detach()
        # Before any exp: the ratio of a token left out may overflow, and 0 * inf is nan.
        self.log_ratio = torch.where(self.kept, log_ratio, 0)
        self.sequence_weights = None if sequence_weights is None else sequence_weights.to(self.dtype)
        self.advantages = advantages.to(self.dtype)
        self.token_advantages = self.advantages[sequence_ids]

    def masked(self, x: Tensor) -> Tensor:
        """``x`` in the arithmetic's dtype, 0 outside the mask."""
        # Selecting before any arithmetic keeps inf and nan in padding slots out of values and gradients.
        return torch.where(self.mask, x.to(self.dtype), 0)

    def sum_per_sequence(
        self, cp_group: dist.ProcessGroup | None, columns: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Sums (T,) columns, and those every loss needs, over the tokens in the mask of each sequence, on all CP ranks: (S,) each.

        One all-reduce whose backward is the identity: the results, and the loss made of them, are replicated over ``cp_group``.
        """
        columns = columns | {"tokens": self.mask, "kept": self.kept, "kl_old": k3(self.drift)}
        if self.policy_mask.max_kl < math.inf:
            assert self.policy_mask.rollout_logprobs is not None
            columns["kl_rollout"] = self.masked(self.policy_mask.rollout_logprobs) - self.logprobs.detach()
        if self.penalty.ref_logprobs is not None:
            columns["kl_ref"] = k3(self.masked(self.penalty.ref_logprobs) - self.logprobs)
        if self.penalty.entropy is not None:
            columns["entropy"] = self.penalty.entropy
        stacked = torch.stack([self.masked(column) for column in columns.values()], dim=1)  # (T, C)
        # float64: one after another, fp32 additions lose four digits over 20k tokens.
        zeros = stacked.new_zeros(len(self.advantages), len(columns), dtype=torch.float64)
        sums = zeros.index_add(0, self.sequence_ids, stacked.double()).to(self.dtype)  # (S, C)
        sums = sum_over_group(sums, cp_group).unbind(1)
        # Stacking gave every column a gradient: counts and metrics drop theirs.
        return {
            name: x if columns[name].requires_grad else x.detach()
            for name, x in zip(columns, sums, strict=True)
        }

    def kept_sequences(self, sums: dict[str, Tensor]) -> Tensor:
        """(S,) bool: sequences that count in the policy term; one without tokens does not."""
        kept = sums["kept"] > 0
        if "kl_rollout" in sums:
            drifted = sums["kl_rollout"] > self.policy_mask.max_kl * sums["tokens"]
            kept &= ~(drifted & (self.advantages < 0))
        return kept

    def output(
        self, objective: Tensor, divisor: Tensor | float, sums: dict[str, Tensor], metrics: dict[str, Metric]
    ) -> LossOutput:
        """Minus the sum of the (S,) ``objective`` plus the penalties ``sums / divisor``, and the metrics all losses share."""
        kept = self.kept_sequences(sums)
        objective = torch.where(kept, objective, 0)
        if self.sequence_weights is not None:
            objective = objective * self.sequence_weights
        loss = -objective.sum()
        if self.penalty.kl_coef != 0:
            loss = loss + self.penalty.kl_coef * (sums["kl_ref"] / divisor).sum()
        if self.penalty.entropy_coef != 0:
            loss = loss - self.penalty.entropy_coef * (sums["entropy"] / divisor).sum()
        count = sums["tokens"].sum()
        shared = [name for name in ("kl_old", "kl_ref", "entropy") if name in sums]
        metrics = metrics | {f"policy/{name}": Metric(sums[name].detach().sum(), count) for name in shared}
        metrics |= extremes("log_ratio", self.drift, self.mask)
        metrics["policy/log_ratio"] = Metric(histogram(self.drift, self.mask), op="histogram")
        if self.masks:
            nonempty = sums["tokens"] > 0
            metrics |= fractions({"masked_fraction": count - sums["kept"].where(kept, 0).sum()}, count)
            metrics |= fractions({"masked_sequences": nonempty & ~kept}, nonempty.sum())
        return LossOutput(loss, metrics)


def extremes(name: str, values: Tensor, where: Tensor) -> dict[str, Metric]:
    """Largest and smallest of ``values`` where ``where`` holds; -inf and inf when it holds nowhere."""
    values = values.detach()
    return {
        f"policy/{name}_max": Metric(torch.where(where, values, -torch.inf).max(), op="max"),
        f"policy/{name}_min": Metric(torch.where(where, values, torch.inf).min(), op="min"),
    }


def fractions(events: dict[str, Tensor], count: Tensor) -> dict[str, Metric]:
    """Metrics of how many of ``count`` tokens, or sequences, each event hit."""
    return {f"policy/{name}": Metric(hits.sum(), count) for name, hits in events.items()}
