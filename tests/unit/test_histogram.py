"""Quantiles and effective sample size from merged counts, compared with numpy on the values."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_gmpo.metrics.figures import QUANTILES, Metric, figures_of, reduce_metrics, value_of
from megatron_gmpo.metrics.histogram import (
    BINS,
    LARGEST,
    RELATIVE_ERROR,
    SMALLEST,
    effective_sample_size,
    histogram,
    quantile,
)

sizes = st.floats(SMALLEST * 1.001, LARGEST)


@given(
    st.lists(st.one_of(st.just(0.0), sizes, sizes.map(lambda x: -x)), min_size=1, max_size=50),
    st.floats(0, 1),
    st.data(),
)
def test_a_quantile_is_within_its_relative_error_however_the_values_are_split(
    values: list[float], q: float, data: st.DataObject
) -> None:
    cut = data.draw(st.integers(0, len(values)))
    parts = [torch.tensor(part, dtype=torch.float64) for part in (values[:cut], values[cut:])]
    counts = histogram(parts[0], torch.ones(cut, dtype=torch.bool)) + histogram(
        parts[1], torch.ones(len(values) - cut, dtype=torch.bool)
    )
    expected = float(np.quantile(values, q, method="inverted_cdf"))
    assert counts.sum() == len(values)
    assert quantile(counts, q) == pytest.approx(expected, rel=RELATIVE_ERROR * 1.001, abs=0)


def test_values_outside_the_range() -> None:
    values = torch.tensor([SMALLEST / 2, -1e9, math.inf, math.nan, 5.0])
    counts = histogram(values, torch.tensor([True, True, True, False, False]))
    assert (counts[0], counts[BINS // 2], counts[-1]) == (1, 1, 1)
    assert quantile(counts, 0.5) == 0
    # NaN is counted: the check of the loss catches it, not the histogram
    assert histogram(torch.tensor([math.nan]), torch.tensor([True])).sum() == 1
    assert quantile(counts, 0.0) == pytest.approx(-LARGEST, rel=0.03)
    assert math.isnan(quantile(torch.zeros(BINS, dtype=torch.float64), 0.5))
    assert math.isnan(effective_sample_size(torch.zeros(BINS, dtype=torch.float64)))


def test_effective_sample_size_is_kishs() -> None:
    logs = torch.randn(2000, generator=torch.Generator().manual_seed(0)).double() * 0.5
    weights = logs.exp()
    share = float(weights.sum() ** 2 / (len(weights) * (weights**2).sum()))
    assert share < 0.85
    assert effective_sample_size(histogram(logs, torch.ones(2000, dtype=torch.bool))) == pytest.approx(
        share, rel=0.01
    )


def test_a_distribution_is_reported_as_quantiles() -> None:
    values = torch.linspace(-1, 1, 20_001)
    parts = [
        {"policy/log_ratio": Metric(histogram(part, torch.ones(len(part), dtype=torch.bool)), op="histogram")}
        for part in values.chunk(3)
    ]
    figures = figures_of(reduce_metrics(parts) | {"loss": Metric(1.0, 2)})
    for suffix, q in QUANTILES.items():
        assert figures.pop(f"policy/log_ratio_{suffix}") == pytest.approx(2 * q - 1, rel=2 * RELATIVE_ERROR)
    assert 0 < figures.pop("policy/ratio_effective_sample_size") < 1
    assert figures == {"loss": 0.5}
    assert value_of(reduce_metrics(parts)["policy/log_ratio"]) == pytest.approx(0, abs=1e-3)
