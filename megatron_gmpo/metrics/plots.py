"""Plot the training curves of one or several runs on one page."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from ..errors import InputError
from .panels import PANELS, Panel, moves

Series = dict[str, tuple[np.ndarray, np.ndarray]]
"""Metric name -> (steps, values) of the steps that have a value."""

COLORS = ("#2f6fb2", "#d9772b", "#3a9a5c", "#b8405e", "#7b5ea7", "#8a6d3b", "#3aa6a6", "#6b6b6b")
INK, MUTED, GRID = "#22262b", "#6a727c", "#e4e7eb"


def plot_run(metrics_paths: Mapping[str, str | Path], out_png: str | Path) -> list[str]:
    """Plot ``metrics.jsonl`` files in the same panels; panels without data are omitted.

    Args:
        metrics_paths: label of a run -> its ``metrics.jsonl``.
        out_png: file to write.

    Returns:
        Headings of the drawn panels.

    Raises:
        InputError: a file is missing or does not consist of JSON lines, or no file has a figure to plot.
    """
    runs = {label: read_metrics(path) for label, path in metrics_paths.items()}
    drawn = [(panel, chosen) for panel in PANELS if (chosen := _choose(panel, runs))]
    if not drawn:
        paths = ", ".join(str(path) for path in metrics_paths.values())
        raise InputError(f"no figures to plot in {paths}: has the run logged a step?")

    columns = min(3, len(drawn))
    rows = -(-len(drawn) // columns)
    figure = Figure(figsize=(4.6 * columns, 2.9 * rows + 0.55), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax, (panel, chosen) in zip(axes, drawn, strict=False):
        _draw(ax, panel, chosen, runs)
    for ax in axes[len(drawn) :]:
        ax.set_axis_off()
    handles = [
        Line2D([], [], color=COLORS[i % len(COLORS)], lw=2.2, label=verbatim(label))
        for i, label in enumerate(runs)
    ]
    figure.legend(
        handles=handles, loc="outside upper left", ncols=6, frameon=False, fontsize=10, labelcolor=INK
    )
    figure.savefig(str(out_png), dpi=130)
    return [panel.heading for panel, _ in drawn]


def read_metrics(path: str | Path) -> Series:
    """Read the series of every metric in a ``metrics.jsonl``; the last line of a repeated step counts.

    Raises:
        InputError: the file does not exist, or a line is not a JSON object with a step.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} does not exist: give the folder of a run that has logged a step")
    points: dict[str, dict[int, float]] = {}
    complete_lines = path.read_text().split("\n")[:-1]  # a crash may leave an incomplete last line
    for number, line in enumerate(complete_lines, 1):
        try:
            record = json.loads(line)
            step = int(record.pop("step"))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise InputError(
                f"line {number} of {path} is not a JSON object with a step: remove the line"
            ) from None
        for name, value in record.items():
            if isinstance(value, int | float):
                points.setdefault(name, {})[step] = float(value)
    return {name: (np.array(list(p)), np.array(list(p.values()))) for name, p in points.items()}


def _choose(panel: Panel, runs: Mapping[str, Series]) -> dict[str, str]:
    """Return metric -> legend name for the panel's metrics that at least one run has."""
    present = {
        name for series in runs.values() for name, (_, values) in series.items() if moves(name, values)
    }
    if panel.kind == "stack":  # stacks of several runs would hide each other, so plot only the total
        if len(runs) > 1:
            return {"time/step": ""} if "time/step" in present else {}
        present.discard("time/step")
    return panel.choose(present)


def verbatim(label: str) -> str:
    """Return a label in which matplotlib shows ``$`` instead of reading it as mathematics."""
    return label.replace("$", r"\$")


def set_up_axes(ax: Axes, title: str, *, log: bool) -> None:
    """Apply the common style: title, y scale, grid, and steps on the x axis."""
    ax.set_title(title, loc="left", fontsize=9.5, color=INK, pad=7)
    ax.grid(axis="y", color=GRID, lw=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.spines["bottom"].set_color(GRID)
    ax.tick_params(which="both", colors=MUTED, labelsize=8, length=0)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    if log:
        ax.set_yscale("log")


def _draw(ax: Axes, panel: Panel, chosen: dict[str, str], runs: Mapping[str, Series]) -> None:
    set_up_axes(ax, panel.title, log=panel.log)
    ax.set_xlabel("step", fontsize=8, color=MUTED)
    ax.set_ylabel(panel.unit, fontsize=8, color=MUTED)
    if panel.kind == "stack" and len(runs) == 1:
        _draw_stack(ax, chosen, *runs.values())
    else:
        for number, series in enumerate(runs.values()):
            if panel.kind == "band" and all(name in series for name in chosen) and len(chosen) == 2:
                _draw_band(ax, [series[name] for name in chosen], COLORS[number % len(COLORS)])
            else:
                _draw_lines(ax, panel, chosen, series, number, alone=len(runs) == 1)
    if panel.kind == "stack":
        ax.set_ylim(bottom=0)
    if ax.get_legend_handles_labels()[1]:
        ax.legend(  # beside the curves, and from the top as they are stacked
            loc="upper left",
            bbox_to_anchor=(1, 1),
            reverse=panel.kind == "stack",
            frameon=False,
            fontsize=7.5,
            labelcolor=MUTED,
            handlelength=1.4,
        )


def _draw_lines(
    ax: Axes, panel: Panel, chosen: dict[str, str], series: Series, number: int, *, alone: bool
) -> None:
    """Draw the metrics of one run.

    Colors distinguish the metrics of a single run. With several runs the color identifies the run, and line
    styles distinguish the metrics.
    """
    styles = ("-", (0, (3, 1.5)), (0, (1, 1.2)), (0, (5, 1, 1, 1)))
    for i, (name, label) in enumerate(chosen.items()):
        if name not in series:
            continue
        steps, values = series[name]
        color = COLORS[(i if alone else number) % len(COLORS)]
        if panel.smoothed and len(values) >= 20:
            ax.plot(steps, values, color=color, lw=0.8, alpha=0.28)
            values = _running_mean(values)
        ax.plot(
            steps,
            values,
            color=color,
            lw=1.6,
            ls="-" if alone else styles[i % len(styles)],
            marker="o" if len(values) < 20 else None,
            ms=3.5,
            label=verbatim(label) if label and number == 0 else None,
        )


def _draw_band(ax: Axes, edges: list[tuple[np.ndarray, np.ndarray]], color: str) -> None:
    (steps, low), (_, high) = edges
    ax.fill_between(steps, low, high, color=color, alpha=0.22, lw=0)
    ax.plot(steps, low, color=color, lw=1.0)
    ax.plot(steps, high, color=color, lw=1.0)
    ax.axhline(0, color=MUTED, lw=0.7)


def _draw_stack(ax: Axes, chosen: dict[str, str], series: Series) -> None:
    """Draw the parts of a total; a part is 0 at steps that do not have it."""
    steps = np.unique(np.concatenate([series[name][0] for name in chosen]))
    heights = np.zeros((len(chosen), len(steps)))
    for row, name in enumerate(chosen):
        at, values = series[name]
        heights[row, np.searchsorted(steps, at)] = values
    ax.stackplot(steps, heights, labels=list(chosen.values()), colors=COLORS, alpha=0.85)


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Return the centered mean over about 1/20 of the run; the window shrinks at both ends."""
    half = max(2, len(values) // 40)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    low, high = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)
