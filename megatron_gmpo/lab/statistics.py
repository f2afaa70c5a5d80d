"""Compute means over seeds, their confidence intervals, and paired differences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

T_975 = (
    *(12.70620, 4.30265, 3.18245, 2.77645, 2.57058, 2.44691, 2.36462, 2.30600, 2.26216, 2.22814),
    *(2.20099, 2.17881, 2.16037, 2.14479, 2.13145, 2.11991, 2.10982, 2.10092, 2.09302, 2.08596),
    *(2.07961, 2.07387, 2.06866, 2.06390, 2.05954, 2.05553, 2.05183, 2.04841, 2.04523, 2.04227),
)
"""Student's t for 1 to 30 degrees of freedom. The interval [-t, t] contains 95 % of the distribution."""


@dataclass(frozen=True)
class Estimate:
    """A mean of ``n`` values with its 95 % confidence interval, mean ± half.

    ``half`` is inf for a single value, because the spread is unknown.
    """

    mean: float
    half: float
    n: int

    @property
    def sign(self) -> int:
        """Return 1 or -1 if the interval lies above or below 0, and 0 if it contains 0."""
        return 0 if abs(self.mean) <= self.half else int(math.copysign(1, self.mean))


def estimate(values: Sequence[float] | np.ndarray) -> Estimate | None:
    """Return the mean and Student's t interval of independent values; None if there are none."""
    x = np.asarray(values, dtype=np.float64)
    n = len(x)
    if n < 2:
        return Estimate(float(x[0]), math.inf, 1) if n else None
    return Estimate(float(x.mean()), t_quantile(n - 1) * float(x.std(ddof=1)) / math.sqrt(n), n)


def paired_difference(values: Mapping[int, float], baseline: Mapping[int, float]) -> Estimate | None:
    """Return the estimate of ``values - baseline`` over the seeds that both have.

    The effect of the prompts and their order, which are equal for runs of the same seed, cancels.
    """
    return estimate([values[seed] - baseline[seed] for seed in sorted(values.keys() & baseline.keys())])


def t_quantile(degrees: int) -> float:
    """Return the t for which Student's distribution has 95 % of its mass in [-t, t].

    Above 30 degrees of freedom this is the Cornish-Fisher expansion (Abramowitz and Stegun 26.7.5), with an
    error below 2e-6.
    """
    if degrees <= len(T_975):
        return T_975[degrees - 1]
    z = NormalDist().inv_cdf(0.975)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return sum(term / degrees**power for power, term in enumerate(terms))
