"""The loss of an optimizer step as the config describes it: a policy loss with its settings, penalties, and its divisor."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch.distributed as dist
from torch import Tensor

from ..batch.columns import Microbatch
from ..config import AlgorithmConfig
from ..errors import InputError
from .registry import POLICY_LOSSES, TOKEN_MEAN_LOSSES, check_loss, default_clip
from .tokens import LossOutput, PolicyMask, TokenPenalty


@dataclass(frozen=True)
class Objective:
    """Called on one microbatch, it gives that microbatch's SUM; dividing by ``count`` of the whole minibatch gives the loss.

    Attributes:
        loss: a function of POLICY_LOSSES with its options filled in.
        clip_low, clip_high: its clips.
        max_kl: bound of off-policy sequence masking, in nats a token; None masks none.
        per_token: the loss is divided by response tokens instead of non-empty sequences.
        kl_coef: weight of the KL to the reference policy.
        entropy_coef: weight of the entropy bonus.
        description: one line for the user: the loss, its clips, and where they come from.
    """

    loss: Callable[..., LossOutput]
    clip_low: float
    clip_high: float
    max_kl: float | None
    per_token: bool
    kl_coef: float
    entropy_coef: float
    description: str

    def __call__(
        self, logprobs: Tensor, entropy: Tensor, microbatch: Microbatch, cp_group: dist.ProcessGroup | None
    ) -> LossOutput:
        """Logprobs and entropy of the predicted tokens, each (T,), with gradient."""
        assert microbatch.old_logprobs is not None
        penalty = TokenPenalty(
            ref_logprobs=microbatch.ref_logprobs,
            kl_coef=self.kl_coef,
            entropy=entropy if self.entropy_coef else entropy.detach(),
            entropy_coef=self.entropy_coef,
        )
        of_some_losses = {"token_weights": microbatch.token_weights, "router_shift": microbatch.router_shift}
        return self.loss(
            logprobs,
            microbatch.old_logprobs,
            microbatch.mask,
            microbatch.sequence_ids,
            microbatch.advantages,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            cp_group=cp_group,
            sequence_weights=microbatch.sequence_weights,
            policy_mask=self._policy_mask(microbatch),
            penalty=penalty,
            **{name: tensor for name, tensor in of_some_losses.items() if tensor is not None},
        )

    def _policy_mask(self, microbatch: Microbatch) -> PolicyMask | None:
        if self.max_kl is not None:
            return PolicyMask(microbatch.kept_tokens, microbatch.rollout_logprobs, self.max_kl)
        return None if microbatch.kept_tokens is None else PolicyMask(microbatch.kept_tokens)

    def count(self, response_lengths: Tensor) -> int:
        """What the sum over sequences of these lengths (S,) is divided by: their tokens, or how many are not empty."""
        return int(response_lengths.sum() if self.per_token else (response_lengths > 0).sum())


def make_objective(cfg: AlgorithmConfig, *, is_moe: bool, max_new_tokens: int) -> Objective:
    """The objective of ``cfg``; clips left open take the loss's defaults.

    Raises:
        InputError: an unknown loss or option, or a bad value of one, or a loss or correction that does not fit the model or the loss.
    """
    check_loss(cfg.loss, cfg.options)
    if (
        cfg.correction == "token"
        and "token_weights" not in inspect.signature(POLICY_LOSSES[cfg.loss]).parameters
    ):
        raise InputError(
            f"algorithm.correction = 'token': {cfg.loss} weighs whole sequences; choose 'geometric'"
        )
    default_low, default_high, source = default_clip(cfg.loss, is_moe)
    clip_low = default_low if cfg.clip_low is None else cfg.clip_low
    clip_high = default_high if cfg.clip_high is None else cfg.clip_high
    defaulted = cfg.clip_low is None or cfg.clip_high is None
    options = dict(cfg.options)
    if cfg.loss == "dr_grpo":
        options.setdefault("length_normalizer", float(max_new_tokens))
    return Objective(
        loss=partial(POLICY_LOSSES[cfg.loss], **options),
        clip_low=clip_low,
        clip_high=clip_high,
        max_kl=cfg.mask_kl if cfg.mask == "off_policy" else None,
        per_token=cfg.loss in TOKEN_MEAN_LOSSES,
        kl_coef=cfg.kl_coef,
        entropy_coef=cfg.entropy_coef,
        description=f"{cfg.loss}, clip_low {clip_low:g}, clip_high {clip_high:g} ({source if defaulted else 'from the config'})",
    )
