"""Has the run collapsed? Entropy, gradient norm and reward of each step against their own history."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from ..config import CollapseConfig
from ..distributed import broadcast_object

STANDARD_ERRORS = 4.0
"""Margin for noise of the reward's limit, in standard errors of a mean over ``window`` steps."""


@dataclass(frozen=True)
class Collapse:
    """What the detector found.

    Attributes:
        reason: which figure did what, in words.
        began: the first step whose figures show it.
    """

    reason: str
    began: int


class _Signal(ABC):
    """One figure. ``vars`` is its state.

    Attributes:
        history: the values that the next one is compared with.
        streak: for how many steps in a row the figure has looked like a collapse.
    """

    def __init__(self) -> None:
        self.history: list[float] = []
        self.streak = 0

    def update(self, value: float, cfg: CollapseConfig) -> str | None:
        """What is wrong, at the step that makes it ``patience`` in a row and not again before it was right once."""
        if math.isnan(value):  # a step without response tokens says nothing
            return None
        wrong = self._look(value, cfg)
        self.streak = self.streak + 1 if wrong else 0
        return wrong if self.streak == cfg.patience else None

    @abstractmethod
    def _look(self, value: float, cfg: CollapseConfig) -> str | None:
        """What is wrong with the value, if anything; remembers it if later ones shall be compared with it."""

    def steps_seen(self, cfg: CollapseConfig) -> int:
        """How many steps went into what ``update`` has just judged."""
        return cfg.patience


class _Entropy(_Signal):
    """Against the level of the first steps."""

    def _look(self, value: float, cfg: CollapseConfig) -> str | None:
        if len(self.history) < cfg.window:
            self.history.append(value)
            return None
        limit = max(cfg.entropy_share * median(self.history), cfg.entropy_floor)
        return f"policy/entropy {value:.3g} is below {limit:.3g}" if value < limit else None


class _GradNorm(_Signal):
    """Against the last steps that were not too large themselves. A step without gradient is none of them."""

    def _look(self, value: float, cfg: CollapseConfig) -> str | None:
        if len(self.history) >= cfg.window and value > (limit := cfg.grad_norm_factor * median(self.history)):
            return f"grad_norm {value:.3g} is above {limit:.3g}"
        if value > 0:
            self.history = [*self.history, value][-cfg.window :]
        return None


class _Reward(_Signal):
    """The mean of the last steps against the best such mean.

    Attributes:
        best: that mean, once there is one.
        steps: values seen.
        squares: sum of their squared differences from step to step, twice the variance of one whatever the trend (von Neumann).
    """

    def __init__(self) -> None:
        super().__init__()
        self.best: float | None = None
        self.steps = 0
        self.squares = 0.0

    def _look(self, value: float, cfg: CollapseConfig) -> str | None:
        self.steps += 1
        if self.history:
            self.squares += (value - self.history[-1]) ** 2
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


class CollapseDetector:
    """Watches a run's figures, one ``update`` a step. What counts as a collapse: see ``CollapseConfig``.

    Attributes:
        rollbacks: how often the run has gone back because of one; the trainer counts.
    """

    def __init__(self, cfg: CollapseConfig) -> None:
        self.rollbacks = 0
        self._cfg = cfg
        self._signals: dict[str, _Signal] = {
            "policy/entropy": _Entropy(),
            "grad_norm": _GradNorm(),
            "reward/mean": _Reward(),
        }

    def update(self, step: int, figures: Mapping[str, float]) -> Collapse | None:
        """What the figures of ``step`` complete, if anything. Collective: every rank gets what the first one finds."""
        found = {name: signal.update(figures[name], self._cfg) for name, signal in self._signals.items()}
        wrong = {name: reason for name, reason in found.items() if reason}
        if not wrong:
            return broadcast_object(None)
        began = step + 1 - max(self._signals[name].steps_seen(self._cfg) for name in wrong)
        return broadcast_object(Collapse("; ".join(wrong.values()), began))

    def state_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "rollbacks": self.rollbacks,
            "signals": {name: dict(vars(signal)) for name, signal in self._signals.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what ``state_dict`` gave."""
        self.rollbacks = state["rollbacks"]
        for name, signal in self._signals.items():
            vars(signal).update(state["signals"][name])
