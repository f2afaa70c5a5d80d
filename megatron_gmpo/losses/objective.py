"""The loss of an optimizer step: a policy loss with its options, penalties and divisor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch.distributed as dist
from torch import Tensor

from ..batch.columns import Microbatch, TrainBatch
from ..config import AlgorithmConfig
from ..errors import InputError
from .advantages import resolve_advantage
from .registry import Loss, NewColumn, default_clips, resolve_loss
from .signature import check_options
from .tokens import LossOutput, LossTokens, log_interval


@dataclass(frozen=True)
class Objective:
    """The loss that the config describes.

    Calling it returns the SUM of one microbatch. The sum over all microbatches of a minibatch, divided by
    ``count`` of the minibatch, is the loss of the optimizer step.

    Attributes:
        name: name of the loss, as the config has it.
        loss: registry entry of the loss.
        needs: columns that the run must make, see ``needed_columns``.
        options: keyword arguments of the loss besides the clips.
        clip_low, clip_high: clips of the loss.
        max_kl: bound of off-policy sequence masking, in nats per token; None disables it.
        kl_coef: weight of the KL to the reference policy.
        entropy_coef: weight of the entropy bonus.
        max_response_tokens: token limit of a sequence of the loss.
        old_logprobs: whose log probabilities the ratio divides by, see ``AlgorithmConfig.old_logprobs``.
        advantage: name of the function from rewards to advantages, see ``resolve_advantage``.
        description: one line for the user: the loss, its clips and its advantage, and where they come from.
    """

    name: str
    loss: Loss
    needs: frozenset[str]
    options: Mapping[str, Any]
    clip_low: float
    clip_high: float
    max_kl: float | None
    kl_coef: float
    entropy_coef: float
    max_response_tokens: int
    old_logprobs: Literal["policy", "rollout"]
    advantage: str
    description: str

    def __call__(
        self, logprobs: Tensor, entropy: Tensor, microbatch: Microbatch, cp_group: dist.ProcessGroup | None
    ) -> LossOutput:
        """Return the SUM of the loss over a microbatch.

        Args:
            logprobs, entropy: (T,) of the predicted tokens, with gradient.

        Raises:
            InputError: a user's loss returned something other than a ``LossOutput``.
        """
        old_logprobs = self.old_logprobs_of(microbatch)
        assert old_logprobs is not None, "no old log probabilities: call Policy.prepare before train_step"
        uses_entropy = self.entropy_coef != 0 or "entropy" in self.needs
        shift = microbatch.router_shift
        tokens = LossTokens(
            logprobs,
            old_logprobs,
            microbatch.mask,
            microbatch.sequence_ids,
            microbatch.advantages,
            cp_group,
            ref_logprobs=microbatch.ref_logprobs,
            rollout_logprobs=microbatch.rollout_logprobs,
            entropy=entropy if uses_entropy else entropy.detach(),
            sequence_weights=microbatch.sequence_weights,
            token_weights=microbatch.token_weights,
            kept=microbatch.kept_tokens,
            max_kl=self.max_kl,
            kl_coef=self.kl_coef,
            entropy_coef=self.entropy_coef,
            max_response_tokens=self.max_response_tokens,
            columns=microbatch.extra if shift is None else microbatch.extra | {"router_shift": shift},
        )
        output = self.loss.function(tokens, clip_low=self.clip_low, clip_high=self.clip_high, **self.options)
        if not isinstance(output, LossOutput):
            raise InputError(
                f"algorithm.loss = {self.name!r} returned a {type(output).__name__}: "
                "return tokens.output(...)"
            )
        return output

    def old_logprobs_of(self, columns: TrainBatch | Microbatch) -> Tensor | None:
        """Return the log probabilities that the ratio divides by; None before they are computed."""
        return columns.rollout_logprobs if self.old_logprobs == "rollout" else columns.old_logprobs

    @property
    def log_clip(self) -> tuple[float, float]:
        """Return the bounds that the clips mean for a log ratio."""
        if self.loss.clip_space == "log_ratio":
            return -self.clip_low, self.clip_high
        return log_interval(self.clip_low, self.clip_high)

    @property
    def needs_advantage(self) -> bool:
        """Return whether a sequence with advantage 0 has no loss and no gradient."""
        return self.loss.needs_advantage and self.kl_coef == 0 and self.entropy_coef == 0

    def add_columns(self, batch: TrainBatch) -> None:
        """Add the loss's own columns to the batch, which must have all other columns.

        The functions that make them see the old log probabilities that the loss sees.

        Raises:
            InputError: the dtype or shape of a column differs from its ``Column``.
        """
        for need in self.loss.needs:
            if isinstance(need, NewColumn):
                seen = replace(batch, old_logprobs=self.old_logprobs_of(batch))
                batch.add_extra(need.name, need.column, need.make(seen))

    def count(self, sequences: int, tokens: int) -> int:
        """Return the divisor of the SUM over so many sequences with response tokens and so many of these."""
        return tokens if self.loss.divisor == "tokens" else sequences


def make_objective(cfg: AlgorithmConfig, *, is_moe: bool, max_new_tokens: int) -> Objective:
    """Return the objective of ``cfg``; clips and advantage that are not set take the loss's defaults.

    Args:
        max_new_tokens: ``Config.max_sequence_tokens``.

    Raises:
        InputError: see ``resolve_loss``, ``check_options`` and ``resolve_advantage``; or the loss has no
            default clips and none are set, or does not support ``algorithm.correction`` or
            ``algorithm.old_logprobs``.
    """
    loss = resolve_loss(cfg.loss)
    options = check_options(cfg.loss, loss.function, cfg.options)
    advantage = cfg.advantage or loss.default_advantage
    resolve_advantage(advantage)
    if cfg.correction == "token" and not loss.token_weights:
        raise InputError(
            f"algorithm.correction = 'token': {cfg.loss} weighs whole sequences; choose 'geometric'"
        )
    if cfg.old_logprobs == "rollout" and "router_shift" in loss.needs:
        raise InputError(
            f"algorithm.old_logprobs = 'rollout': {cfg.loss} compares the routers' scores with those that "
            "the pass of the old log probabilities records; set it to 'policy'"
        )
    defaults, source = default_clips(cfg.loss, loss, is_moe)
    chosen = {"clip_low": cfg.clip_low, "clip_high": cfg.clip_high}
    clips = defaults | {name: value for name, value in chosen.items() if value is not None}
    for name in chosen.keys() - clips.keys():
        raise InputError(f"algorithm.{name} is not set, and {cfg.loss} has no default for it: set it")
    if None not in chosen.values():
        source = "from the config"
    advantage_source = "from the config" if cfg.advantage else f"default of {cfg.loss}"
    return Objective(
        name=cfg.loss,
        loss=loss,
        needs=needed_columns(cfg),
        options=options,
        **clips,
        max_kl=cfg.mask_kl if cfg.mask == "off_policy" else None,
        kl_coef=cfg.kl_coef,
        entropy_coef=cfg.entropy_coef,
        max_response_tokens=max_new_tokens,
        old_logprobs=cfg.old_logprobs,
        advantage=advantage,
        description=(
            f"{cfg.loss}, clip_low {clips['clip_low']:g}, clip_high {clips['clip_high']:g} ({source}), "
            f"advantage {advantage} ({advantage_source})"
            + (", old log probabilities of the rollout engine" if cfg.old_logprobs == "rollout" else "")
            + (", each turn a sequence" if cfg.unit == "turn" else "")
        ),
    )


def needed_columns(cfg: AlgorithmConfig) -> frozenset[str]:
    """Return which of ``registry.TRAINER_COLUMNS`` the run must make for its loss and penalties.

    Raises:
        InputError: see ``resolve_loss``.
    """
    needs = frozenset(need for need in resolve_loss(cfg.loss).needs if isinstance(need, str))
    return needs | {"ref_logprobs"} if cfg.kl_coef > 0 else needs


def minibatches_without_pass(cfg: AlgorithmConfig, minibatches: int, *, is_moe: bool) -> int:
    """Return how many of a step's minibatches, from the first, need no pass for old log probabilities.

    None needs one if the old log probabilities are the rollout engine's. The policy that the first minibatch
    updates is the old policy, so its training pass computes them too. But corrections, masks and a loss's own
    columns read them earlier, and RSPO uses what their pass records. A MoE with several minibatches has one
    pass for all of them, so that the figures and the record of its routers come from one pass.

    Args:
        minibatches: number of minibatches of a step.
    """
    if cfg.old_logprobs == "rollout":
        return minibatches
    needs = resolve_loss(cfg.loss).needs
    whole = (
        cfg.correction != "none"
        or cfg.mask in ("icepop", "geometric")
        or "router_shift" in needs
        or any(isinstance(need, NewColumn) for need in needs)
        or (is_moe and minibatches > 1)
    )
    return 0 if whole else 1
