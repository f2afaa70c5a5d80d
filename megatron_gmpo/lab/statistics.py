"""Means over seeds, their uncertainty, and paired differences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import mpmath
import numpy as np

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean of ``n`` values, and half the width of its confidence interval: inf for a single value, which says nothing of the spread."""

    mean: float
    half: float
    n: int

    @property
    def sign(self) -> int:
        """1 or -1 where the interval lies above or below 0, 0 where it holds 0."""
        return 0 if abs(self.mean) <= self.half else int(math.copysign(1, self.mean))


def estimate(values: Sequence[float] | np.ndarray) -> Estimate | None:
    """Mean and Student's t interval of independent values; None of nothing."""
    x = np.asarray(values, dtype=np.float64)
    n = len(x)
    if n < 2:
        return Estimate(float(x[0]), math.inf, 1) if n else None
    return Estimate(float(x.mean()), t_quantile(n - 1) * float(x.std(ddof=1)) / math.sqrt(n), n)


def paired_difference(values: Mapping[int, float], baseline: Mapping[int, float]) -> Estimate | None:
    """Of ``values - baseline`` over the seeds that both have: what the seeds share (prompts, their order) cancels."""
    return estimate([values[seed] - baseline[seed] for seed in sorted(values.keys() & baseline.keys())])


@cache
def t_quantile(degrees: int) -> float:
    """The t that Student's distribution leaves within [-t, t] with probability ``CONFIDENCE``."""

    def too_much_outside(t: Any) -> Any:
        return mpmath.betainc(degrees / 2, 0.5, 0, degrees / (degrees + t * t), regularized=True) - (
            1 - CONFIDENCE
        )

    return float(mpmath.findroot(too_much_outside, (1.9, 13.0), solver="anderson"))
