"""Show progress: a bar with figures on a terminal, one line per step in other outputs."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress

from ..distributed import rank
from ..errors import printable

SHOWN = {  # metric -> (label, format)
    "reward/mean": ("reward", ".3f"),
    "loss": ("loss", ".3g"),
    "policy/entropy": ("entropy", ".3f"),
    "throughput/tokens_per_second": ("tok/s", ",.0f"),
    "train/saved": ("saved", ".0%"),
}


class Progress:
    """Show the progress of a run on rank 0; other ranks print nothing.

    Usage: ``with Progress(num_steps, done=step) as progress: ... progress.update(step, figures)``.

    Args:
        total: number of steps of the run.
        done: number of completed steps of a resumed run.
        enabled: False prints nothing.
        console: output console, stderr by default.
    """

    def __init__(
        self, total: int, *, done: int = 0, enabled: bool = True, console: Console | None = None
    ) -> None:
        self._total = total
        self._console = console or Console(stderr=True)
        self._enabled = enabled and rank() == 0
        self._bar: RichProgress | None = None
        if self._enabled and self._console.is_terminal:
            self._bar = RichProgress(
                TextColumn("[bold]step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=None),
                TaskProgressColumn(),
                TextColumn("{task.fields[figures]}"),
                TimeElapsedColumn(),
                TextColumn("eta"),
                TimeRemainingColumn(),
                console=self._console,
                expand=True,
            )
            self._task = self._bar.add_task("train", total=total, completed=done, figures="")

    def __enter__(self) -> Progress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, step: int, figures: Mapping[str, float]) -> None:
        """Show that ``step`` steps are completed, with the figures of the last step."""
        texts = [
            f"{label} {figures[name]:{form}}" for name, (label, form) in SHOWN.items() if name in figures
        ]
        if self._bar:
            self._bar.update(self._task, completed=step, figures=" ".join(f"[cyan]{t}[/cyan]" for t in texts))
        elif self._enabled:
            seconds = [f"{figures['time/step']:.2f} s"] if "time/step" in figures else []
            self._console.out(f"step {step}/{self._total}  " + "  ".join(texts + seconds), highlight=False)

    def results(self, when: str, figures: Mapping[str, float]) -> None:
        """Print the pass rates of an evaluation, e.g. "after step 3", as a note."""
        rates = {name.removeprefix("eval/"): value for name, value in figures.items() if "/pass@" in name}
        shown = ", ".join(f"{name} {value:.3f}" for name, value in rates.items())
        self.note(f"evaluation {when}: {shown}")

    def note(self, text: str) -> None:
        """Print a line above the bar, without interpreting brackets as markup."""
        if self._enabled:
            self._console.out(printable(text), highlight=False)
