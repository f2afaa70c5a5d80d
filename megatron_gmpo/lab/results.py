"""Aggregate the metrics of trials over seeds: curves with intervals, and measures to compare arms."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..metrics.plots import Series, read_metrics
from .statistics import Estimate, estimate, paired_difference
from .study import Arm, Study
from .trials import Record, read_record

POINTS = 40
"""Maximum number of points per curve; each point is the mean over its share of the steps."""
TAIL = 10
"""Number of last steps that ``tail`` averages."""


@dataclass(frozen=True)
class Result:
    """The metrics of a trial that logged at least one step; ``record`` is None until it ends."""

    record: Record | None
    series: Series

    @property
    def counts(self) -> bool:
        """Return whether the trial finished or stopped itself. A stopped run counts with its last figures."""
        return self.record is not None and self.record.outcome != "failed"


@dataclass(frozen=True)
class Curve:
    """A curve of P points, as (P,) arrays.

    The arrays are the steps, the mean over the seeds that have the step, and the bounds of its interval. The
    bounds are nan if only one seed has the step.
    """

    steps: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


@dataclass(frozen=True)
class Measure:
    """One number per run, computed from a metric.

    It is the ``last``, ``best`` (largest) or ``mean`` value of the metric, or its mean over the last ``TAIL``
    steps.
    """

    title: str
    metric: str
    kind: Literal["last", "best", "mean", "tail"]

    def of(self, series: Series) -> float | None:
        """Return the measure of a run, or None if the run has not logged the metric."""
        if self.metric not in series:
            return None
        values = series[self.metric][1]
        return float(
            {"last": values[-1], "best": values.max(), "mean": values.mean(), "tail": values[-TAIL:].mean()}[
                self.kind
            ]
        )


@dataclass(frozen=True)
class Row:
    """The mean of a measure over one arm's seeds, and its mean paired difference from the arm's baseline."""

    measure: Measure
    arm: Arm
    value: Estimate | None
    difference: Estimate | None


TAILS = {
    "reward/mean": "reward",
    "response_length/mean": "response length, tokens",
    "policy/entropy": "entropy, nats a token",
    "moe/router_entropy": "router entropy, nats",
}
"""Metric -> name of its mean over a run's last steps."""

MEANS = {
    "policy/kl_old": "KL to the old policy, nats a token",
    "grad_norm": "gradient norm",
    "policy/log_ratio_q001": "log ratio, 0.1 % quantile",
    "policy/log_ratio_q999": "log ratio, 99.9 % quantile",
    "policy/sequence_ratio_min": "smallest ratio of a sequence",
    "policy/sequence_ratio_max": "largest ratio of a sequence",
    "policy/clip_fraction_low": "clipped below, fraction",
    "policy/clip_fraction_high": "clipped above, fraction",
    "rollout/k3_kl": "KL rollout to policy, nats a token",
    "moe/routing_differs_tokens": "tokens routed differently in the rollout, fraction",
    "moe/routing_drift_tokens": "tokens rerouted by updates, fraction",
}
"""Metric -> name of its mean over a run.

These metrics describe updates, which are small in the last steps if the learning rate decays."""


def read_results(study: Study) -> dict[str, dict[int, Result]]:
    """Return arm -> seed -> result for the trials that have logged a step."""
    results: dict[str, dict[int, Result]] = {arm.name: {} for arm in study.arms}
    for trial in study.trials:
        if (path := trial.folder / "metrics.jsonl").exists():
            results[trial.arm.name][trial.seed] = Result(read_record(trial), read_metrics(path))
    return results


def curve(runs: Sequence[Series], metric: str) -> Curve | None:
    """Return the metric over steps, or None if no run has it."""
    having = [series[metric] for series in runs if metric in series and len(series[metric][0])]
    if not having:
        return None
    steps = np.unique(np.concatenate([at for at, _ in having]))
    values = np.full((len(having), len(steps)), np.nan)  # (seeds, steps)
    for row, (at, of_seed) in zip(values, having, strict=True):
        row[np.searchsorted(steps, at)] = of_seed
    points: list[tuple[float, float, float, float]] = []
    for share in np.array_split(np.arange(len(steps)), min(POINTS, len(steps))):
        part = values[:, share]
        present = ~np.isnan(part)
        some = present.any(1)
        of_seeds = np.where(present, part, 0)[some].sum(1) / present[some].sum(1)
        point = estimate(of_seeds)
        assert point is not None
        half = point.half if point.n > 1 else np.nan
        points.append((steps[share].mean(), point.mean, point.mean - half, point.mean + half))
    return Curve(*np.array(points).T)


def compare(study: Study, results: dict[str, dict[int, Result]]) -> list[Row]:
    """Return every measure of every arm, over the runs that count. A measure that no run has is left out."""
    counted = {
        arm: {seed: run.series for seed, run in runs.items() if run.counts} for arm, runs in results.items()
    }
    present = {metric for runs in counted.values() for series in runs.values() for metric in series}
    measures = [
        Measure(f"{name} {metric.removeprefix('eval/')}", metric, kind)
        for metric, name, kind in _evaluations(present)
    ]
    measures += [Measure(title, metric, "tail") for metric, title in TAILS.items() if metric in present]
    measures += [Measure(title, metric, "mean") for metric, title in MEANS.items() if metric in present]
    rows: list[Row] = []
    for measure in measures:
        values = {arm: _present(measure, runs) for arm, runs in counted.items()}
        for arm in study.arms:
            difference = (
                None
                if arm.name == arm.baseline
                else paired_difference(values[arm.name], values[arm.baseline])
            )
            rows.append(Row(measure, arm, estimate(list(values[arm.name].values())), difference))
    return rows


def _present(measure: Measure, runs: dict[int, Series]) -> dict[int, float]:
    return {seed: value for seed, series in runs.items() if (value := measure.of(series)) is not None}


def _evaluations(present: set[str]) -> list[tuple[str, str, Literal["last", "best"]]]:
    of_each: list[tuple[str, Literal["last", "best"]]] = [("final", "last"), ("best", "best")]
    return [
        (metric, name, kind)
        for metric in sorted(fnmatch.filter(present, "eval/*/pass@1"))
        for name, kind in of_each
    ]
