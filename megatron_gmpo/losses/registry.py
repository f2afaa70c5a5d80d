"""Pure functions over tensors: policy losses and advantages."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from typing import Any, get_type_hints

from pydantic import ConfigDict, ValidationError, create_model

from ..errors import InputError
from .advantages import group_advantages
from .gmpo import gmpo_loss
from .ppo_family import cispo_loss, dapo_loss, dr_grpo_loss, grpo_loss, gspo_loss
from .rspo import rspo_loss
from .tokens import LossOutput, PolicyMask, TokenPenalty

__all__ = [
    "LOG_CLIP_LOSSES",
    "POLICY_LOSSES",
    "TOKEN_MEAN_LOSSES",
    "PolicyMask",
    "TokenPenalty",
    "check_loss",
    "default_clip",
    "group_advantages",
]

POLICY_LOSSES: dict[str, Callable[..., LossOutput]] = {
    "gmpo": gmpo_loss,
    "rspo": rspo_loss,
    "grpo": grpo_loss,
    "dr_grpo": dr_grpo_loss,
    "dapo": dapo_loss,
    "gspo": gspo_loss,
    "cispo": cispo_loss,
}
"""All take (logprobs, old_logprobs, mask, sequence_ids, advantages) and the keywords clip_low, clip_high, cp_group,
sequence_weights, policy_mask and penalty; ``.loss`` is a SUM. Sums over tokens also take token_weights, and rspo needs router_shift."""

TOKEN_MEAN_LOSSES = frozenset({"dapo", "cispo"})
"""Losses whose sum the caller divides by the response tokens of the optimizer step; all others by its non-empty sequences."""

LOG_CLIP_LOSSES = frozenset({"gmpo", "rspo"})
"""Losses whose clips bound a log ratio; those of the others are distances of a ratio from 1."""

_FROM_TRAINER = frozenset(
    {
        "clip_low",
        "clip_high",
        "cp_group",
        "sequence_weights",
        "token_weights",
        "policy_mask",
        "penalty",
        "router_shift",
    }
)


def default_clip(loss: str, is_moe: bool) -> tuple[float, float, str]:
    """(clip_low, clip_high, where they come from) of a loss when the user names none."""
    if loss in LOG_CLIP_LOSSES and is_moe:
        return (
            0.2,
            0.2,
            "MoE: the GMPO authors lower the clip without a value; 0.2 was the steadiest of docs/studies/clip_sweep",
        )
    parameters = inspect.signature(POLICY_LOSSES[loss]).parameters
    source = "GMPO paper, dense models" if loss == "gmpo" else f"default of {loss}"
    return parameters["clip_low"].default, parameters["clip_high"].default, source


def check_loss(name: str, options: dict[str, Any]) -> None:
    """Checks ``algorithm.loss`` and ``algorithm.options`` against the loss's signature.

    ``length_normalizer`` of dr_grpo may be missing: the caller then passes ``rollout.max_new_tokens``.

    Raises:
        InputError: unknown loss or option (naming the nearest), or an option's value of the wrong type or out of range.
    """
    if name not in POLICY_LOSSES:
        raise InputError(
            f"algorithm.loss = {name!r} is unknown: did you mean {_nearest(name, POLICY_LOSSES)!r}?"
        )
    loss = POLICY_LOSSES[name]
    hints = get_type_hints(loss, include_extras=True)
    keywords = [
        key
        for key, parameter in inspect.signature(loss).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    ]
    known = {key: f"algorithm.options.{key}" for key in keywords if key not in _FROM_TRAINER}
    places = known | {key: f"algorithm.{key}" for key in ("clip_low", "clip_high")}
    for key in options:
        if key not in known:
            raise InputError(
                f"algorithm.options.{key} is not an option of {name}: did you mean {places[_nearest(key, places)]}?"
            )
    fields: dict[str, Any] = {key: (hints[key], None) for key in known}
    try:
        create_model("Options", __config__=ConfigDict(strict=True), **fields).model_validate(options)
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(
            f"algorithm.options.{first['loc'][0]} = {first['input']!r}: {first['msg']}"
        ) from None


def _nearest(word: str, known: Any) -> str:
    return difflib.get_close_matches(word, known, n=1, cutoff=0.0)[0]
