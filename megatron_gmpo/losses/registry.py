"""The policy losses by name. The ``Loss`` entry of a loss has all its properties that the trainer uses."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from ..batch.columns import COLUMNS as BATCH_COLUMNS
from ..batch.columns import Column, TrainBatch
from ..errors import InputError
from ..plugins import check_callable, resolve
from .gmpo import gmpo
from .ppo_family import cispo, dapo, dr_grpo, grpo, gspo
from .rspo import rspo
from .signature import check_signature
from .tokens import LossOutput

Divisor = Literal["sequences", "tokens"]
ClipSpace = Literal["log_ratio", "ratio"]

TRAINER_COLUMNS = frozenset({"ref_logprobs", "rollout_logprobs", "entropy", "router_shift"})
"""Columns that the trainer makes for a loss that needs them. ``router_shift`` is a key of
``LossTokens.columns``; the others are attributes of ``LossTokens``."""


@dataclass(frozen=True)
class DefaultClip:
    """The clips of a loss that are used if the config sets none.

    Attributes:
        low, high: ``clip_low`` and ``clip_high``.
        source: where the values come from, for the line that a run prints.
        moe: values for mixtures of experts; None means ``low`` and ``high``.
    """

    low: float
    high: float
    source: str
    moe: DefaultClip | None = None


@dataclass(frozen=True)
class NewColumn:
    """A column that a user's loss defines, in ``LossTokens.columns``.

    Attributes:
        name: key of the column.
        column: dtype, alignment and padding.
        make: returns the values for a batch of L tokens and S sequences: (L,), or (S,) if the column is
            aligned to the sequence. Called once per step on every rank, with equal batches, after old and
            reference log probabilities are computed.
    """

    name: str
    column: Column
    make: Callable[[TrainBatch], Tensor]


@dataclass(frozen=True)
class Loss:
    """A policy loss and its properties.

    Attributes:
        function: ``(tokens: LossTokens, *, clip_low, clip_high, ...) -> LossOutput``. Other keyword-only
            parameters are the options ``algorithm.options.*``, checked by their annotations.
        divisor: divisor of the SUM that the function returns: the number of non-empty ``sequences``, or of
            response ``tokens``, of the optimizer step.
        clip_space: quantity that the clips bound: a ``log_ratio`` to [-clip_low, clip_high], or a ``ratio``
            to [1 - clip_low, 1 + clip_high].
        default_clip: clips if the config sets none; None means the defaults of the function's parameters.
        needs: columns that the function reads besides the required attributes of ``LossTokens``: names in
            ``TRAINER_COLUMNS``, and ``NewColumn``s.
        token_weights: whether the function multiplies each token's term by ``tokens.token_weights``.
            ``algorithm.correction = "token"`` requires it.
        default_advantage: ``algorithm.advantage`` if the config sets none.
        needs_advantage: whether a sequence with advantage 0 has no loss and no gradient, apart from the terms
            of ``kl_coef`` and ``entropy_coef``. The trainer then does not compute such sequences.
    """

    function: Callable[..., LossOutput]
    divisor: Divisor = "sequences"
    clip_space: ClipSpace = "ratio"
    default_clip: DefaultClip | None = None
    needs: tuple[str | NewColumn, ...] = ()
    token_weights: bool = False
    default_advantage: str = "normalized"
    needs_advantage: bool = False


_MOE_CLIP = DefaultClip(
    0.2,
    0.2,
    "MoE: the GMPO authors lower the clip and publish no value; 0.2 had the pass@1 of 0.4 and less KL in "
    "docs/studies/clip_sweep",
)

LOSSES: dict[str, Loss] = {
    "gmpo": Loss(
        gmpo,
        clip_space="log_ratio",
        default_clip=DefaultClip(0.4, 0.4, "GMPO paper, dense models", moe=_MOE_CLIP),
        needs_advantage=True,
    ),
    "rspo": Loss(
        rspo,
        clip_space="log_ratio",
        default_clip=_MOE_CLIP,
        needs=("router_shift",),
        needs_advantage=True,
    ),
    "grpo": Loss(
        grpo,
        default_clip=DefaultClip(0.2, 0.2, "usual for PPO"),
        token_weights=True,
        needs_advantage=True,
    ),
    "dr_grpo": Loss(
        dr_grpo,
        default_clip=DefaultClip(0.2, 0.2, "usual for PPO"),
        token_weights=True,
        default_advantage="mean",  # the paper removes the division by the standard deviation
        needs_advantage=True,
    ),
    "dapo": Loss(
        dapo,
        divisor="tokens",
        default_clip=DefaultClip(0.2, 0.28, "DAPO paper"),
        token_weights=True,
        needs_advantage=True,
    ),
    "gspo": Loss(gspo, default_clip=DefaultClip(3e-4, 4e-4, "GSPO paper"), needs_advantage=True),
    "cispo": Loss(
        cispo,
        divisor="tokens",
        # MiniMax-M1 sets no lower bound and publishes no upper bound.
        default_clip=DefaultClip(1.0, 4.0, "ratio in [0, 5], the upper bound of ScaleRL, arXiv 2510.13786"),
        token_weights=True,
        needs_advantage=True,
    ),
}


def resolve_loss(name: str) -> Loss:
    """Return the entry of ``algorithm.loss``.

    ``name`` is a built-in loss, or ``module:attribute``, where the attribute is a function or a ``Loss``.

    Raises:
        InputError: an unknown name, a module or attribute that cannot be imported, a signature that does not
            fit, a property with an unknown value, or a needed column that nothing makes.
    """
    entry = resolve("algorithm.loss", name, LOSSES)
    if not isinstance(entry, Loss):
        remedy = "give a function (tokens, *, clip_low, clip_high) -> LossOutput, or a Loss"
        check_callable("algorithm.loss", name, entry, remedy)
        entry = Loss(entry)
    check_signature(name, entry.function)
    for field, choices in (("divisor", get_args(Divisor)), ("clip_space", get_args(ClipSpace))):
        if getattr(entry, field) not in choices:
            raise InputError(
                f"algorithm.loss = {name!r}: {field} = {getattr(entry, field)!r} is unknown: "
                f"choose one of {choices}"
            )
    for need in entry.needs:
        if isinstance(need, NewColumn) and need.name in TRAINER_COLUMNS | BATCH_COLUMNS.keys():
            raise InputError(
                f"algorithm.loss = {name!r}: its new column {need.name!r} exists already: "
                "give it another name"
            )
        if isinstance(need, str) and need not in TRAINER_COLUMNS:
            raise InputError(
                f"algorithm.loss = {name!r} needs the column {need!r}, which nothing makes: "
                f"choose one that the trainer makes, {sorted(TRAINER_COLUMNS)}, or give a NewColumn "
                "with a function that makes it"
            )
    return entry


def default_clips(name: str, loss: Loss, is_moe: bool) -> tuple[dict[str, float], str]:
    """Return the default values of ``clip_low`` and ``clip_high``, and where they come from.

    A clip is missing if the loss has no ``default_clip`` and its function has no default for that clip.
    """
    if loss.default_clip:
        default = (is_moe and loss.default_clip.moe) or loss.default_clip
        return {"clip_low": default.low, "clip_high": default.high}, default.source
    parameters = inspect.signature(loss.function).parameters
    found = {name: parameters[name].default for name in ("clip_low", "clip_high")}
    return {k: v for k, v in found.items() if v is not inspect.Parameter.empty}, f"default of {name}"
