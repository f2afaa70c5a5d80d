"""The policy losses by name: one ``Loss`` entry per loss states all that the trainer must know about it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_type_hints

from pydantic import PydanticUserError, TypeAdapter, ValidationError

from ..errors import InputError
from ..plugins import check_callable, nearest, resolve
from .gmpo import gmpo
from .ppo_family import cispo, dapo, dr_grpo, grpo, gspo
from .rspo import rspo
from .tokens import LossOutput

Divisor = Literal["sequences", "tokens"]
ClipSpace = Literal["log_ratio", "ratio"]

COLUMNS = frozenset({"ref_logprobs", "rollout_logprobs", "entropy", "router_shift"})
"""Columns that the trainer makes for a loss that needs them. ``router_shift`` is in ``LossTokens.columns``,
the others are attributes."""


@dataclass(frozen=True)
class DefaultClip:
    """The clips of a loss if the config sets none.

    Attributes:
        low, high: ``clip_low`` and ``clip_high``.
        source: where the values come from, for the line that a run prints.
        moe: other values for mixtures of experts; None means the same.
    """

    low: float
    high: float
    source: str
    moe: DefaultClip | None = None


@dataclass(frozen=True)
class Loss:
    """A policy loss and its properties.

    Attributes:
        function: ``(tokens: LossTokens, *, clip_low, clip_high, ...) -> LossOutput``. Further keyword-only
            parameters are the options ``algorithm.options.*``, checked by their annotations.
        divisor: the SUM that the function returns is divided by the non-empty ``sequences`` or the response
            ``tokens`` of the optimizer step.
        clip_space: The clips bound a ``log_ratio`` to [-clip_low, clip_high], or a ``ratio`` to [1 -
            clip_low, 1 + clip_high].
        default_clip: None means the defaults of the function's ``clip_low`` and ``clip_high``.
        needs: columns that the function reads besides the required attributes of ``LossTokens``: names in
            ``COLUMNS``.
        token_weights: The function multiplies each token's term by ``tokens.token_weights``, so
            ``algorithm.correction = "token"`` is supported.
    """

    function: Callable[..., LossOutput]
    divisor: Divisor = "sequences"
    clip_space: ClipSpace = "ratio"
    default_clip: DefaultClip | None = None
    needs: tuple[str, ...] = ()
    token_weights: bool = False


_MOE_CLIP = DefaultClip(
    0.2,
    0.2,
    "MoE: the GMPO authors lower the clip without a value; 0.2 was the steadiest of docs/studies/clip_sweep",
)

LOSSES: dict[str, Loss] = {
    "gmpo": Loss(
        gmpo,
        clip_space="log_ratio",
        default_clip=DefaultClip(0.4, 0.4, "GMPO paper, dense models", moe=_MOE_CLIP),
    ),
    "rspo": Loss(rspo, clip_space="log_ratio", default_clip=_MOE_CLIP, needs=("router_shift",)),
    "grpo": Loss(grpo, default_clip=DefaultClip(0.2, 0.2, "usual for PPO"), token_weights=True),
    "dr_grpo": Loss(dr_grpo, default_clip=DefaultClip(0.2, 0.2, "usual for PPO"), token_weights=True),
    "dapo": Loss(
        dapo, divisor="tokens", default_clip=DefaultClip(0.2, 0.28, "DAPO paper"), token_weights=True
    ),
    "gspo": Loss(gspo, default_clip=DefaultClip(3e-4, 4e-4, "GSPO paper")),
    "cispo": Loss(
        cispo,
        divisor="tokens",
        # MiniMax-M1 sets no lower bound and publishes no upper one.
        default_clip=DefaultClip(1.0, 4.0, "ratio in [0, 5], the upper bound of ScaleRL, arXiv 2510.13786"),
        token_weights=True,
    ),
}


def resolve_loss(name: str) -> Loss:
    """Return the entry that ``algorithm.loss`` names: a built-in loss, or ``module:attribute``, a function or
    a ``Loss``.

    Raises:
        InputError: an unknown name, a module or attribute that cannot be imported, a signature that does not
            fit, a property with an unknown value, or a needed column that nothing makes.
    """
    entry = resolve("algorithm.loss", name, LOSSES)
    if not isinstance(entry, Loss):
        remedy = "give a function (tokens, *, clip_low, clip_high) -> LossOutput, or a Loss"
        check_callable("algorithm.loss", name, entry, remedy)
        entry = Loss(entry)
    _check_signature(name, entry.function)
    for field, choices in (("divisor", get_args(Divisor)), ("clip_space", get_args(ClipSpace))):
        if getattr(entry, field) not in choices:
            raise InputError(
                f"algorithm.loss = {name!r}: {field} = {getattr(entry, field)!r} is unknown: choose one of {choices}"
            )
    for column in entry.needs:
        if column not in COLUMNS:
            raise InputError(
                f"algorithm.loss = {name!r} needs the column {column!r}, which nothing makes: "
                f"choose one of {sorted(COLUMNS)}"
            )
    return entry


def default_clips(name: str, loss: Loss, is_moe: bool) -> tuple[dict[str, float], str]:
    """Return the values of ``clip_low`` and ``clip_high`` that hold if the config sets none, and where they
    come from.

    A loss without ``default_clip`` whose function has no default for a clip lacks the clip's key.
    """
    if loss.default_clip:
        default = (is_moe and loss.default_clip.moe) or loss.default_clip
        return {"clip_low": default.low, "clip_high": default.high}, default.source
    parameters = inspect.signature(loss.function).parameters
    found = {name: parameters[name].default for name in ("clip_low", "clip_high")}
    return {k: v for k, v in found.items() if v is not inspect.Parameter.empty}, f"default of {name}"


def check_options(name: str, loss: Loss, options: Mapping[str, Any]) -> None:
    """Check ``algorithm.options`` against the keyword-only parameters of the loss and their annotations.

    Raises:
        InputError: an unknown option (the line names the nearest), a missing one, or a value of the wrong
            type or out of range.
    """
    parameters = {
        key: parameter
        for key, parameter in inspect.signature(loss.function).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and key not in ("clip_low", "clip_high")
    }
    places = {key: f"algorithm.options.{key}" for key in parameters}
    places |= {key: f"algorithm.{key}" for key in ("clip_low", "clip_high")}
    for key in options:
        if key not in parameters:
            raise InputError(
                f"algorithm.options.{key} is not an option of {name}: did you mean {places[nearest(key, places)]}?"
            )
    for key, annotation in _annotations(name, loss.function, parameters).items():
        if key in options:
            try:
                annotation.validate_python(options[key], strict=True)
            except ValidationError as error:
                message = error.errors()[0]["msg"]
                raise InputError(f"algorithm.options.{key} = {options[key]!r}: {message}") from None
        elif parameters[key].default is inspect.Parameter.empty:
            raise InputError(f"algorithm.options.{key} is missing: {name} has no default for it, set it")


def _annotations(
    name: str, function: Callable[..., LossOutput], parameters: Mapping[str, inspect.Parameter]
) -> dict[str, TypeAdapter[Any]]:
    adapters: dict[str, TypeAdapter[Any]] = {}
    try:
        hints = get_type_hints(function, include_extras=True)
        for key in parameters:
            adapters[key] = TypeAdapter(hints.get(key, Any))
    except (NameError, PydanticUserError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"algorithm.loss = {name!r}: the annotation of a parameter is not a type of config values ({reason}): "
            "annotate options with types such as float, bool or Literal, and read tensors from tokens"
        ) from None
    return adapters


def _check_signature(name: str, function: Callable[..., LossOutput]) -> None:
    remedy = "write def loss(tokens, *, clip_low, clip_high, ...)"
    try:
        first, *others = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # not a Python function, or one without parameters
        raise InputError(
            f"algorithm.loss = {name!r} does not take the parameter 'tokens': {remedy}"
        ) from None
    if first.kind not in (first.POSITIONAL_ONLY, first.POSITIONAL_OR_KEYWORD):
        raise InputError(f"algorithm.loss = {name!r}: parameter {first.name!r} is not positional: {remedy}")
    for parameter in others:
        if parameter.kind is not parameter.KEYWORD_ONLY:
            raise InputError(
                f"algorithm.loss = {name!r}: parameter {parameter.name!r} is not keyword-only: {remedy}"
            )
    for clip in ("clip_low", "clip_high"):
        if clip not in (parameter.name for parameter in others):
            raise InputError(f"algorithm.loss = {name!r} does not take the parameter {clip!r}: {remedy}")
