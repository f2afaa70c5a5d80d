"""The curves of a run: the figures of metrics.jsonl as columns, thinned out to what a screen can show."""

from __future__ import annotations

import math
from array import array
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from ..metrics.panels import PANELS, moves
from .lines import GrowingLines

POINTS = 1000
"""Number of points of a curve, of which each has some pixels."""


class Metrics:
    """The figures of a ``metrics.jsonl`` that the panels show.

    ``refresh`` reads only the lines that were added. Ten thousand steps of 60 figures take 5 MB.

    Attributes:
        unreadable: number of lines that are not a JSON object with a step.
    """

    def __init__(self, path: Path) -> None:
        self._lines = GrowingLines(path)
        self._clear()

    def _clear(self) -> None:
        self._steps: array[int] = array("q")
        self._columns: dict[str, array[float]] = {}
        self._shown: dict[str, bool] = {}
        self.unreadable = 0

    def refresh(self) -> None:
        """Read the new lines, or all lines if the file was replaced, as after a rollback."""
        if self._lines.replaced():
            self._clear()
        for _, line in self._lines.new():
            try:
                record = orjson.loads(line)
                self._steps.append(record["step"])
            except (ValueError, KeyError, TypeError, OverflowError):
                self.unreadable += 1
            else:
                self._add(record)

    def _add(self, record: dict[str, Any]) -> None:
        before = len(self._steps) - 1
        for name in record.keys() - self._shown.keys():
            self._shown[name] = "/ci_" in name or any(p.choose([name]) for p in PANELS)
            if self._shown[name]:
                self._columns[name] = array("d", [math.nan]) * before
        for name, column in self._columns.items():
            value = record.get(name)
            column.append(value if isinstance(value, int | float) else math.nan)

    def series(self, first: int, last: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Return metric -> (steps, values) of the steps from ``first`` to ``last`` that have a value.

        The last line of a repeated step counts.
        """
        steps = np.array(self._steps, np.int64)
        newest = len(steps) - 1 - np.unique(steps[::-1], return_index=True)[1]  # one row per step, in order
        rows = newest[(steps[newest] >= first) & (steps[newest] <= last)]
        found = {}
        for name, column in self._columns.items():
            values = np.array(column)[rows]
            if (there := np.isfinite(values)).any():
                found[name] = (steps[rows][there], values[there])
        return found


def curves(runs: list[Metrics], first: int, last: int) -> dict[str, Any]:
    """Return the panels that have data, and each run's points in them.

    Returns:
        ``panels``: title, kind, log and ``metrics`` (metric -> name in the legend) of each panel;
        ``runs``: for each run, metric -> {x, y} and ``low`` and ``high`` of its interval, if the run has
        logged one, as for pass@k.
    """
    series = [run.series(first, last) for run in runs]
    present = {name for found in series for name, (_, values) in found.items() if moves(name, values)}
    panels = []
    for panel in PANELS:
        names, kind = present, panel.kind
        if kind == "stack" and len(runs) > 1:  # the stacks of several runs would hide each other
            names, kind = present & {"time/step"}, "lines"
        elif kind == "stack":
            names = present - {"time/step"}
        if chosen := panel.choose(names):
            panels.append({"title": panel.heading, "kind": kind, "log": panel.log, "metrics": chosen})
    return {"panels": panels, "runs": [_points(found) for found in series]}


def _points(series: dict[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, dict[str, np.ndarray]]:
    points = {}
    # the parts of a step's time need common steps, to be stacked
    total = series.get("time/step")
    common = total[0][thinned(total[1])] if total else np.array([], np.int64)
    for name, (steps, values) in series.items():
        kept = np.isin(steps, common) if name.startswith("time/") and total else thinned(values)
        points[name] = {"x": steps[kept], "y": values[kept].astype(np.float32)}
        benchmark, _, figure = name.rpartition("/")
        for end in ("low", "high"):
            if interval := series.get(f"{benchmark}/ci_{end}@{figure.removeprefix('pass@')}"):
                known = dict(zip(interval[0].tolist(), interval[1].tolist(), strict=True))
                ends = [known.get(step, math.nan) for step in steps[kept].tolist()]
                points[name][end] = np.array(ends, np.float32)
    return points


def thinned(values: np.ndarray) -> np.ndarray:
    """Return the indices of at most about ``POINTS`` values: the extremes of stretches of equal length.

    A curve through them has every peak of the whole curve.
    """
    if len(values) <= POINTS:
        return np.arange(len(values))
    width = -(-len(values) // (POINTS // 2))
    stretches = np.pad(values, (0, -len(values) % width), mode="edge").reshape(-1, width)
    starts = np.arange(0, len(values), width)
    kept = [[0], starts + stretches.argmin(1), starts + stretches.argmax(1), [len(values) - 1]]
    return np.unique(np.minimum(np.concatenate(kept), len(values) - 1))
