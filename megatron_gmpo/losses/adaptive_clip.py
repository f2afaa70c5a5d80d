"""Adaptive clips, adjusted after every step to reach a target.

The GMPO paper (arXiv 2507.20673) leaves them to future work.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import FiniteFloat

from ..config import AlgorithmConfig
from ..config.saved import SavedState
from ..errors import InputError
from ..metrics.figures import Metric
from ..metrics.histogram import quantile
from .objective import Objective

SPAN = 8.0
"""Largest factor between a clip and its initial value if ``algorithm.clip_bounds`` is not set."""
TAIL = 0.001
"""Share of the tokens beyond each of the two quantiles that the signal ``tail`` measures."""
DEFAULT_FRACTION = 0.01
"""Target of the signal ``fraction`` if the config sets none."""


class ClipState(SavedState):
    """Clips, as a checkpoint holds them. Those of earlier versions have no ``loss`` and no ``start``."""

    low: FiniteFloat
    high: FiniteFloat
    loss: str | None = None
    start: dict[str, float] | None = None


class AdaptiveClip:
    """An integral controller of ``clip_low`` and ``clip_high``, independent of each other, in log space.

    After every step it computes e = signal / target - 1, clamped to [-1, 1]. If the signal is the clipped
    fraction, ``clip *= exp(gain e)``: a fraction above the target widens the clip. If the signal is a tail of
    the log ratio, ``clip *= exp(-gain e)``: a tail above the target narrows the clip. Equal metrics give
    equal clips, so all ranks agree.

    The controller updates once per step, from the metrics of all optimizer steps of the step. Within a step
    ratios start at 1 and spread. An update after every optimizer step would narrow the clips at the start of
    every step and widen them at its end.

    Args:
        loss: name of the loss that the clips belong to.
        clip_low, clip_high: initial values, within the bounds.
        signal: ``fraction`` or ``tail``, see ``AlgorithmConfig.clip_signal``.
        target: target of the signal.
        bounds_low, bounds_high: (smallest, largest) value of each clip.
        gain: logarithm of the largest change per step.
    """

    def __init__(
        self,
        loss: str,
        clip_low: float,
        clip_high: float,
        *,
        signal: Literal["fraction", "tail"],
        target: float,
        bounds_low: tuple[float, float],
        bounds_high: tuple[float, float],
        gain: float,
    ) -> None:
        self._loss, self._start = loss, {"low": clip_low, "high": clip_high}
        self.clips = dict(self._start)
        self._bounds = {"low": bounds_low, "high": bounds_high}
        self._signal, self._target, self._gain = signal, target, gain

    def update(self, metrics: Mapping[str, Metric]) -> None:
        """Update the clips from the reduced metrics of a step.

        A step without response tokens leaves them unchanged.

        Raises:
            InputError: the signal is ``fraction`` and the loss does not report clip fractions.
        """
        for side, clip in self.clips.items():
            signal = self._measure(side, metrics)
            if math.isnan(signal):
                continue
            error = min(max(signal / self._target - 1, -1.0), 1.0)
            if self._signal == "tail":
                error = -error
            smallest, largest = self._bounds[side]
            self.clips[side] = min(max(clip * math.exp(self._gain * error), smallest), largest)

    def _measure(self, side: str, metrics: Mapping[str, Metric]) -> float:
        if self._signal == "tail":
            return abs(
                quantile(
                    torch.as_tensor(metrics["policy/log_ratio"].total), TAIL if side == "low" else 1 - TAIL
                )
            )
        name = f"policy/clip_fraction_{side}"
        if name not in metrics:
            raise InputError(
                f"algorithm.clip_signal = 'fraction' needs the metric {name}, which the loss does not "
                "report: return it, or choose 'tail'"
            )
        clipped = metrics[name]
        return float(clipped.total) / float(clipped.count) if clipped.count else math.nan

    def applied_to(self, objective: Objective) -> Objective:
        """Return the objective with these clips."""
        return replace(objective, clip_low=self.clips["low"], clip_high=self.clips["high"])

    def state_dict(self) -> dict[str, Any]:
        """Return the clips, their initial values and the loss, as JSON values."""
        return {**self.clips, "loss": self._loss, "start": self._start}

    def load_state_dict(self, saved: ClipState) -> None:
        """Restore the clips, clamped to the bounds.

        A clip starts again if the loss or the clip's initial value differs from that of ``saved``, as the
        config then asks for another clip.
        """
        same_loss, start = saved.loss in (None, self._loss), saved.start or self._start
        for side, (smallest, largest) in self._bounds.items():
            goes_on = same_loss and start.get(side) == self._start[side]
            self.clips[side] = (
                min(max(getattr(saved, side), smallest), largest) if goes_on else self._start[side]
            )


def make_adaptive_clip(cfg: AlgorithmConfig, objective: Objective) -> AdaptiveClip | None:
    """Return the controller of ``cfg``, starting from the clips of ``objective``, or None for fixed clips.

    Raises:
        InputError: the loss clips nothing, an initial clip is 0 or out of bounds, or the signal ``tail`` has
            no target.
    """
    if cfg.clip == "fixed":
        return None
    if cfg.options.get("clip_mode") == "none":
        raise InputError(
            "algorithm.clip = 'adaptive': algorithm.options.clip_mode = 'none' clips nothing; "
            "choose 'token' or clip = 'fixed'"
        )
    if cfg.clip_signal == "tail" and cfg.clip_target is None:
        raise InputError(
            "algorithm.clip_signal = 'tail' needs algorithm.clip_target, the size of a log ratio: "
            "set it, e.g. to 0.2"
        )
    bounds: dict[str, tuple[float, float]] = {}
    for side, start in (("low", objective.clip_low), ("high", objective.clip_high)):
        smallest, largest = cfg.clip_bounds or (start / SPAN, start * SPAN)
        if side == "low" and objective.loss.clip_space == "ratio":
            largest = min(largest, 1.0)  # ratios are positive
        if not 0 < smallest <= start <= largest:
            raise InputError(
                f"algorithm.clip_{side} = {start:g} cannot adapt: "
                f"start within [{smallest:g}, {largest:g}] and above 0"
            )
        bounds[side] = smallest, largest
    return AdaptiveClip(
        objective.name,
        objective.clip_low,
        objective.clip_high,
        signal=cfg.clip_signal,
        target=DEFAULT_FRACTION if cfg.clip_target is None else cfg.clip_target,
        bounds_low=bounds["low"],
        bounds_high=bounds["high"],
        gain=cfg.clip_gain,
    )
