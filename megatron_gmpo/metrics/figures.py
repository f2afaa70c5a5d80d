"""Metrics that can be reduced over microbatches and ranks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .histogram import effective_sample_size, quantile

QUANTILES = {"q001": 0.001, "q01": 0.01, "q99": 0.99, "q999": 0.999}
"""Quantiles reported for a distribution: suffix of the figure's name -> fraction of values at or below it."""

Op = Literal["mean", "max", "min", "histogram"]


@dataclass(frozen=True)
class Metric:
    """A metric that can be reduced: a (sum, count) pair, an extreme, or a distribution.

    ``Metric(total, count)`` is reported as total / count; ``Metric(value, op="max")`` and ``op="min"`` as the
    extreme; ``Metric(counts, op="histogram")``, with the counts of ``histogram.histogram``, as quantiles.
    """

    total: Tensor | float
    count: Tensor | float = 1.0
    op: Op = "mean"


def reduce_metrics(parts: Iterable[Mapping[str, Metric]]) -> dict[str, Metric]:
    """Merge the metrics of microbatches or minibatches.

    Totals, counts and histograms are added; extremes take the extreme. Tensors stay tensors, so that the host
    does not wait for the device.
    """
    merged: dict[str, Metric] = {}
    for part in parts:
        for name, new in part.items():
            old = merged.get(name)
            if old is None:
                merged[name] = new
                continue
            assert old.op == new.op, f"{name} is both {old.op} and {new.op}"
            if new.op in ("mean", "histogram"):
                merged[name] = Metric(old.total + new.total, old.count + new.count, new.op)
            else:
                pick = torch.maximum if new.op == "max" else torch.minimum
                extremes = (torch.as_tensor(m.total, dtype=torch.float64) for m in (old, new))
                merged[name] = Metric(pick(*extremes), op=new.op)
    return merged


def value_of(metric: Metric | float) -> float:
    """Return one figure for a metric: the median of a distribution, NaN for a mean with count 0."""
    if not isinstance(metric, Metric):
        return float(metric)
    if metric.op == "histogram":
        return quantile(torch.as_tensor(metric.total), 0.5)
    if metric.op != "mean":
        return float(metric.total)
    return float(metric.total) / float(metric.count) if float(metric.count) else math.nan


def figures_of(metrics: Mapping[str, Metric]) -> dict[str, float]:
    """Return the figures of metrics by name.

    A distribution ``a/log_b`` gives its QUANTILES, ``a/log_b_q001`` and so on. It also gives
    ``a/b_effective_sample_size``, the effective sample size of the weights whose logarithms it holds.
    """
    figures: dict[str, float] = {}
    for name, metric in metrics.items():
        if metric.op == "histogram":
            counts = torch.as_tensor(metric.total)
            figures |= {f"{name}_{suffix}": quantile(counts, q) for suffix, q in QUANTILES.items()}
            figures[f"{name.replace('/log_', '/')}_effective_sample_size"] = effective_sample_size(counts)
        else:
            figures[name] = value_of(metric)
    return figures
