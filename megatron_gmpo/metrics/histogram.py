"""Compute quantiles over microbatches and ranks (DDSketch, VLDB 2019).

Values are counted in logarithmic bins for both signs. The counts of two sets of values merge by addition.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

RELATIVE_ERROR = 0.01
"""Relative error of a quantile whose magnitude lies between SMALLEST and LARGEST."""
SMALLEST, LARGEST = 1e-6, 1e2
"""Range of magnitudes. Smaller magnitudes are counted as 0, larger magnitudes as LARGEST."""

_GROWTH = math.log((1 + RELATIVE_ERROR) / (1 - RELATIVE_ERROR))
_PER_SIGN = math.ceil(math.log(LARGEST / SMALLEST) / _GROWTH)
BINS = 2 * _PER_SIGN + 1


def histogram(values: Tensor, where: Tensor) -> Tensor:
    """Count the (T,) ``values`` selected by the (T,) bool ``where``, without waiting for the device.

    Returns:
        (BINS,) float64 counts. NaN is counted as LARGEST.
    """
    values = values.double().nan_to_num(nan=LARGEST)
    sizes = torch.ceil(torch.log(values.abs().clamp(SMALLEST, LARGEST) / SMALLEST) / _GROWTH).long()
    bins = _PER_SIGN + torch.sign(values).long() * sizes.clamp(max=_PER_SIGN)
    counts = torch.zeros(BINS, dtype=torch.float64, device=values.device)
    return counts.index_add(0, bins.where(where, 0), where.double())


def representatives() -> Tensor:
    """Return (BINS,) float64: for each bin, a value within RELATIVE_ERROR of all values in the bin."""
    upper = SMALLEST * torch.exp(_GROWTH * torch.arange(1, _PER_SIGN + 1, dtype=torch.float64))
    middle = upper * (1 - RELATIVE_ERROR)
    return torch.cat([-middle.flip(0), torch.zeros(1, dtype=torch.float64), middle])


def quantile(counts: Tensor, q: float) -> float:
    """Return the smallest value v such that at least a fraction ``q`` of the values is <= v, else NaN."""
    below = counts.cpu().cumsum(0)
    if not below[-1]:
        return math.nan
    # at least one value must be <= the quantile, also for q = 0
    rank = (q * below[-1]).ceil().clamp(min=1)
    return float(representatives()[int(torch.searchsorted(below, rank))])


def effective_sample_size(counts: Tensor) -> float:
    """Return Kish's effective sample size as a fraction of the number of weights.

    This is ``(sum w)^2 / (n sum w^2)``.

    Args:
        counts: (BINS,) counts of the LOGARITHMS of the weights.
    """
    counts, logs = counts.cpu(), representatives()
    logs = logs - logs[counts > 0].max() if counts.any() else logs  # the result does not depend on the scale
    weights = torch.exp(logs).where(counts > 0, 0)
    return float((counts @ weights) ** 2 / (counts.sum() * (counts @ weights**2)))
