"""Collapse detection from the history of entropy, gradient norm and reward in a run."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from pydantic import ConfigDict, Field, model_validator

from ..config import CollapseConfig
from ..config.saved import SavedState
from ..distributed import broadcast_object

STANDARD_ERRORS = 4.0
"""Margin for noise in the limit of the reward, in standard errors of a mean over ``window`` steps."""


@dataclass(frozen=True)
class Collapse:
    """A detected collapse.

    Attributes:
        reason: one line with the figure, its value and its limit.
        began: first step whose figures show the collapse.
    """

    reason: str
    began: int


class _Signal(SavedState):
    """The detector of one figure. A checkpoint saves its fields.

    Attributes:
        history: values with which the next value is compared.
        streak: number of the latest consecutive steps whose value was beyond the limit.
    """

    model_config = ConfigDict(frozen=False)
    history: list[float]
    streak: int = Field(ge=0)

    def update(self, value: float, cfg: CollapseConfig) -> str | None:
        """Return the reason if ``value`` is the ``patience``-th consecutive value beyond the limit.

        A streak is reported once. A value within the limit ends it. NaN, the value of a step without response
        tokens, is skipped.
        """
        if math.isnan(value):
            return None
        reason = self._check(value, cfg)
        self.streak = self.streak + 1 if reason else 0
        return reason if self.streak == cfg.patience else None

    @abstractmethod
    def _check(self, value: float, cfg: CollapseConfig) -> str | None:
        """Return the reason if ``value`` is beyond the limit, else None, and update ``history``."""

    def steps_seen(self, cfg: CollapseConfig) -> int:
        """Return the number of steps, up to the reported step, that contribute to a reason."""
        return cfg.patience


class _Entropy(_Signal):
    """Compare the entropy with its median over the first ``window`` steps."""

    def _check(self, value: float, cfg: CollapseConfig) -> str | None:
        if len(self.history) < cfg.window:
            self.history.append(value)
            return None
        limit = max(cfg.entropy_share * median(self.history), cfg.entropy_floor)
        return f"policy/entropy {value:.3g} is below {limit:.3g}" if value < limit else None


class _GradNorm(_Signal):
    """Compare the gradient norm with its median over the last ``window`` steps.

    Steps beyond the limit and steps without a gradient do not count.
    """

    def _check(self, value: float, cfg: CollapseConfig) -> str | None:
        if len(self.history) >= cfg.window and value > (limit := cfg.grad_norm_factor * median(self.history)):
            return f"grad_norm {value:.3g} is above {limit:.3g}"
        if value > 0:
            self.history = [*self.history, value][-cfg.window :]
        return None


class _Reward(_Signal):
    """Compare the mean reward of the last ``window`` steps with the best such mean.

    Attributes:
        best: the best mean; None until the first mean is known.
        steps: number of values seen.
        squares: sum of squared differences of successive values. Its mean is twice the variance of one value
            and, unlike the sample variance, is hardly affected by a trend (von Neumann 1941).
    """

    best: float | None
    steps: int = Field(ge=0)
    squares: float = Field(ge=0)

    @model_validator(mode="after")
    def _history_is_counted(self) -> _Reward:
        if self.steps < len(self.history):
            raise ValueError(f"steps = {self.steps} is less than the {len(self.history)} values of history")
        return self

    def _check(self, value: float, cfg: CollapseConfig) -> str | None:
        self.steps += 1
        if self.history:
            change = value - self.history[-1]
            self.squares += change * change  # ** raises an OverflowError
        self.history = [*self.history, value][-cfg.window :]
        if len(self.history) < cfg.window:
            return None
        mean = fmean(self.history)
        if self.best is None or mean > self.best:
            self.best = mean
        standard_error = math.sqrt(self.squares / (2 * (self.steps - 1) * cfg.window))
        noise = STANDARD_ERRORS * standard_error
        if math.isinf(cfg.reward_drop) or self.best - mean <= cfg.reward_drop * abs(self.best) + noise:
            return None
        return f"reward/mean over {cfg.window} steps fell from {self.best:.3g} to {mean:.3g}"

    def steps_seen(self, cfg: CollapseConfig) -> int:
        return cfg.patience + cfg.window - 1


class _Signals(SavedState):
    entropy: _Entropy = Field(alias="policy/entropy")
    grad_norm: _GradNorm
    reward: _Reward = Field(alias="reward/mean")

    def by_figure(self) -> dict[str, _Signal]:
        """Return the signals under the names of their figures."""
        return {"policy/entropy": self.entropy, "grad_norm": self.grad_norm, "reward/mean": self.reward}


class CollapseState(SavedState):
    """State of a detector, as a checkpoint holds it."""

    rollbacks: int = Field(ge=0, lt=2**31)
    window: int | None = None
    signals: _Signals


class CollapseDetector:
    """Check a run's figures with one ``update`` per step. ``CollapseConfig`` defines the limits.

    Attributes:
        rollbacks: number of rollbacks so far; the trainer increments it.
    """

    def __init__(self, cfg: CollapseConfig) -> None:
        self.rollbacks = 0
        self._cfg = cfg
        self._signals = _new_signals()

    def update(self, step: int, figures: Mapping[str, float]) -> Collapse | None:
        """Check the figures of a step and return the collapse that they complete, or None.

        Collective: every rank returns rank 0's result.
        """
        found = {name: signal.update(figures[name], self._cfg) for name, signal in self._signals.items()}
        reasons = {name: reason for name, reason in found.items() if reason}
        if not reasons:
            return broadcast_object(None)
        began = step + 1 - max(self._signals[name].steps_seen(self._cfg) for name in reasons)
        return broadcast_object(Collapse("; ".join(reasons.values()), began))

    def state_dict(self) -> dict[str, Any]:
        """Return the state as JSON-serializable values."""
        return {
            "rollbacks": self.rollbacks,
            "window": self._cfg.window,
            "signals": {name: signal.model_dump() for name, signal in self._signals.items()},
        }

    def load_state_dict(self, saved: CollapseState) -> None:
        """Restore a state.

        Reference levels of another ``window`` are not comparable: detection then starts again.
        """
        self.rollbacks = saved.rollbacks
        same_window = saved.window in (None, self._cfg.window)  # earlier versions did not save it
        self._signals = saved.signals.by_figure() if same_window else _new_signals()


def _new_signals() -> dict[str, _Signal]:
    return {
        "policy/entropy": _Entropy(history=[], streak=0),
        "grad_norm": _GradNorm(history=[], streak=0),
        "reward/mean": _Reward(history=[], streak=0, best=None, steps=0, squares=0.0),
    }
