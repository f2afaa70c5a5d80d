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

Op = Literal["mean", "max", "min", "histogram", "weights"]


@dataclass(frozen=True)
class Metric:
    """A metric that can be reduced: a (sum, count) pair, an extreme, a distribution, or the sums of weights.

    ``Metric(total, count)`` is reported as total / count; ``Metric(value, op="max")`` and ``op="min"`` as the
    extreme; ``Metric(counts, op="histogram")``, with the counts of ``histogram.histogram``, as quantiles;
    ``weights_metric`` as an effective sample size.
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
            if new.op == "weights":
                tops = torch.stack([torch.as_tensor(m.total)[0] for m in (old, new)])
                sums = torch.stack([rescaled(torch.as_tensor(m.total), tops.max()) for m in (old, new)])
                sums = torch.cat([tops.max()[None], sums.sum(0)])
                merged[name] = Metric(sums, old.count + new.count, new.op)
            elif new.op in ("mean", "histogram"):
                merged[name] = Metric(old.total + new.total, old.count + new.count, new.op)
            else:
                pick = torch.maximum if new.op == "max" else torch.minimum
                extremes = (torch.as_tensor(m.total, dtype=torch.float64) for m in (old, new))
                merged[name] = Metric(pick(*extremes), op=new.op)
    return merged


def weights_metric(log_weights: Tensor) -> Metric:
    """Return the metric of the effective sample size of weights w with these (n,) logarithms, n > 0.

    Its total is (3,) float64: the largest logarithm m, ``sum(w / e^m)`` and ``sum((w / e^m)^2)``. The result
    does not depend on the scale of the weights, and this scale cannot overflow.
    """
    scaled = (log_weights - log_weights.max()).double().exp()
    sums = torch.stack([log_weights.max().double(), scaled.sum(), (scaled**2).sum()])
    return Metric(sums, len(log_weights), "weights")


def rescaled(total: Tensor, log_scale: Tensor) -> Tensor:
    """Return the two sums in the (3,) total of a ``weights_metric`` as sums of ``w / e^log_scale``."""
    return total[1:] * torch.exp((total[0] - log_scale) * total.new_tensor([1.0, 2.0]))


def value_of(metric: Metric | float) -> float:
    """Return one figure for a metric: the median of a distribution, NaN for a mean with count 0.

    Weights give Kish's effective sample size as a share of their number, ``(sum w)^2 / (n sum w^2)``.
    """
    if not isinstance(metric, Metric):
        return float(metric)
    if metric.op == "weights":
        _, total, squares = torch.as_tensor(metric.total).tolist()
        return total**2 / (float(metric.count) * squares) if squares else math.nan
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
