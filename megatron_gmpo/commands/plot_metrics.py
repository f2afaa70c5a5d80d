"""Draw the training curves of one or several runs.

Usage::

    megatron-gmpo plot_metrics RUN_DIR [RUN_DIR ...] [--out FILE]
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from ..command_line import Options, Positional, parse_options


class PlotMetrics(Options):
    """Draw the training curves of one or several runs in the same panels."""

    run_dirs: Annotated[tuple[Path, ...], Positional]
    """Run folders; each curve is labelled by the folder's name."""
    out: Path | None = None
    """Picture to write; by default metrics.png in the first run folder."""


def main(argv: list[str]) -> None:
    options = parse_options(PlotMetrics, argv, "megatron-gmpo plot_metrics")
    print(plot_runs(options.run_dirs, options.out))


def plot_runs(run_dirs: Sequence[Path], out: Path | None = None) -> Path:
    """Draw the curves of several runs, by default to metrics.png in the first run folder; return the path.

    Raises:
        InputError: see ``plot_run``.
    """
    from ..metrics.plots import plot_run

    out = out or run_dirs[0] / "metrics.png"
    plot_run(_labels(run_dirs), out)
    return out


def _labels(run_dirs: Sequence[Path]) -> dict[str, Path]:
    """Return label -> metrics file.

    The labels are the names of the folders, or their paths if two names are equal.
    """
    names = [d.resolve().name for d in run_dirs]
    return {
        name if names.count(name) == 1 else str(d): d / "metrics.jsonl"
        for name, d in zip(names, run_dirs, strict=True)
    }
