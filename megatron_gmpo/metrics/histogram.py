"""Quantiles over microbatches and ranks: counts in logarithmic bins of both signs, which merge by adding (DDSketch, VLDB 2019)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

RELATIVE_ERROR = 0.01
"""Of a quantile whose magnitude lies between SMALLEST and LARGEST."""
SMALLEST, LARGEST = 1e-6, 1e2
"""Smaller magnitudes count as 0, larger ones as LARGEST."""

_GROWTH = math.log((1 + RELATIVE_ERROR) / (1 - RELATIVE_ERROR))
_PER_SIGN = math.ceil(math.log(LARGEST / SMALLEST) / _GROWTH)
BINS = 2 * _PER_SIGN + 1


def histogram(values: Tensor, where: Tensor) -> Tensor:
    """(BINS,) float64 counts of the (T,) ``values`` at which the (T,) bool ``where`` holds; nothing waits for the device."""
    values = values.double().nan_to_num(nan=LARGEST)
    sizes = torch.ceil(torch.log(values.abs().clamp(SMALLEST, LARGEST) / SMALLEST) / _GROWTH).long()
    bins = _PER_SIGN + torch.sign(values).long() * sizes.clamp(max=_PER_SIGN)
    counts = torch.zeros(BINS, dtype=torch.float64, device=values.device)
    return counts.index_add(0, bins.where(where, 0), where.double())


def representatives() -> Tensor:
    """(BINS,) float64: the value that stands for a bin, within RELATIVE_ERROR of all in it."""
    upper = SMALLEST * torch.exp(_GROWTH * torch.arange(1, _PER_SIGN + 1, dtype=torch.float64))
    middle = upper * (1 - RELATIVE_ERROR)
    return torch.cat([-middle.flip(0), torch.zeros(1, dtype=torch.float64), middle])


def quantile(counts: Tensor, q: float) -> float:
    """The smallest value that at least the fraction ``q`` of all do not exceed; NaN of nothing."""
    below = counts.cpu().cumsum(0)
    if not below[-1]:
        return math.nan
    # at least one value, and all of them where rounding puts q * count above the count
    rank = (q * below[-1]).ceil().clamp(min=1)
    return float(representatives()[int(torch.searchsorted(below, rank))])


def effective_sample_size(counts: Tensor) -> float:
    """Kish's effective sample size of weights with these LOGARITHMS, as a share of their number: ``(sum w)^2 / (n sum w^2)``."""
    counts, logs = counts.cpu(), representatives()
    logs = logs - logs[counts > 0].max() if counts.any() else logs  # the share does not change with the scale
    weights = torch.exp(logs).where(counts > 0, 0)
    return float((counts @ weights) ** 2 / (counts.sum() * (counts @ weights**2)))
