"""Draws the training curves of one or several runs: python -m tools.plot_metrics RUN_DIR [RUN_DIR...] [--out FILE]"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from megatron_gmpo.config import exit_with_one_line
from megatron_gmpo.errors import InputError
from megatron_gmpo.metrics.plots import plot_run


def main(run_dirs: Annotated[tuple[Path, ...], tyro.conf.Positional], /, out: Path | None = None) -> None:
    """Draws the training curves of one or several runs over each other.

    Args:
        run_dirs: run folders; each is labelled by its name.
        out: the picture, RUN_DIR/metrics.png of the first run by default.
    """
    try:
        if not run_dirs:
            raise InputError("no run folder: python -m tools.plot_metrics RUN_DIR [RUN_DIR...]")
        out = out or run_dirs[0] / "metrics.png"
        plot_run(_labels(run_dirs), out)
    except InputError as error:
        exit_with_one_line(error)
    print(out)


def _labels(run_dirs: tuple[Path, ...]) -> dict[str, Path]:
    """Folder name, or the whole path where two names are equal -> metrics file."""
    names = [d.resolve().name for d in run_dirs]
    return {
        name if names.count(name) == 1 else str(d): d / "metrics.jsonl"
        for name, d in zip(names, run_dirs, strict=True)
    }


if __name__ == "__main__":
    tyro.cli(main)
