"""95 % intervals of a mean over problems, and paired tests of two evaluations of the same problems.

Neither scipy nor statsmodels is a dependency; the sources of the formulas are named.
"""

from __future__ import annotations

from math import comb, sqrt
from statistics import NormalDist

import numpy as np

_Z = NormalDist().inv_cdf(0.975)
_RESAMPLES = 10_000
_AT_A_TIME = 500
"""Resamples in memory at a time: 5 MB for 1,319 problems."""


def wilson(share: float, count: int) -> tuple[float, float]:
    """Return the 95 % score interval of a share of ``count`` problems (Wilson 1927).

    A problem's pass@k lies between 0 and 1, so the variance of the mean is at most share (1 - share) / count,
    and the interval is too wide rather than too narrow.
    """
    spread = 1 + _Z**2 / count
    centre = (share + _Z**2 / (2 * count)) / spread
    half = _Z / spread * sqrt(share * (1 - share) / count + _Z**2 / (4 * count**2))
    return max(0.0, centre - half), min(1.0, centre + half)  # rounding passes the end at a share of 0 or 1


def interval(values: np.ndarray) -> tuple[float, float]:
    """Return the 95 % interval of the mean of a figure over problems, for problems drawn at random.

    It is Wilson's if every value is 0 or 1, else the percentile bootstrap over problems (Efron and Tibshirani
    1993, chapter 13). If all problems have the same value, a bootstrap would give an interval of width 0, so
    it is Wilson's too.

    Args:
        values: (problems,) figure of each problem between 0 and 1, such as its share of right samples.
    """
    if np.isin(values, (0, 1)).all() or np.ptp(values) == 0:
        return wilson(float(values.mean()), len(values))
    low, high = np.quantile(_resampled_means(values), (0.025, 0.975))
    return float(low), float(high)


def mcnemar(first: np.ndarray, second: np.ndarray) -> float:
    """Return the two-sided p-value of McNemar's exact test (McNemar 1947).

    Among the problems that exactly one of the two solved, each is solved by either with probability 1/2 if
    both are equally good.

    Args:
        first: (problems,) bool, whether the first evaluation solved each problem.
        second: (problems,) bool, whether the second evaluation solved it.
    """
    only_first, only_second = int((first & ~second).sum()), int((~first & second).sum())
    n = only_first + only_second
    tail = sum(comb(n, i) for i in range(min(only_first, only_second) + 1))
    return min(1.0, 2 * tail / 2**n)


def paired_bootstrap(differences: np.ndarray) -> tuple[float, float, float]:
    """Return the 95 % interval of a mean difference over problems, and its two-sided p-value.

    The p-value is twice the share of resampled means on the other side of 0 (Efron and Tibshirani 1993,
    chapter 15.4). It is at least 2 / (number of resamples + 1), and 1 if all differences are 0.

    Args:
        differences: (problems,) difference of the two evaluations at each problem.
    """
    means = _resampled_means(differences)
    low, high = np.quantile(means, (0.025, 0.975))
    side = min((means <= 0).sum(), (means >= 0).sum())
    return float(low), float(high), min(1.0, 2 * (int(side) + 1) / (len(means) + 1))


def _resampled_means(values: np.ndarray) -> np.ndarray:
    """Return (resamples,) means of problems drawn with replacement; equal in every call."""
    generator, n = np.random.default_rng(0), len(values)
    draws = (generator.integers(n, size=(_AT_A_TIME, n)) for _ in range(_RESAMPLES // _AT_A_TIME))
    return np.concatenate([values[drawn].mean(1) for drawn in draws])
