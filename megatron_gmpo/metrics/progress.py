"""Show progress: a bar with figures on a terminal, one line per step in other outputs."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from statistics import fmean

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

SHOWN = {  # metric -> (label, format); no loss, because it is 0 at ratio 1 whatever the policy does
    "reward/mean": ("reward", ".3f"),
    "episode/success": ("success", ".0%"),
    "policy/entropy": ("entropy", ".3f"),
    "grad_norm": ("grad", ".3g"),
    "rollout/truncated_fraction": ("truncated", ".0%"),
    "policy/kl_ref": ("kl", ".2g"),
    "policy/kl_old": ("kl old", ".2g"),
    "throughput/tokens_per_second": ("tok/s", ",.0f"),
    "train/saved": ("saved", ".0%"),
}

_RECENT = 20
"""Number of steps from whose mean duration the time left is estimated."""
_LINE_S = 30.0
"""Seconds between two lines about a part, such as an evaluation, without a terminal."""


class Progress:
    """Show the progress of a run on rank 0; other ranks print nothing.

    Usage: ``with Progress(num_steps, done=step) as progress: ... progress.update(step, figures)``.

    Args:
        total: number of steps of the run; 0 for a command without steps.
        done: number of completed steps of a resumed run.
        enabled: False prints nothing.
        console: output console, stderr by default.
    """

    def __init__(
        self, total: int = 0, *, done: int = 0, enabled: bool = True, console: Console | None = None
    ) -> None:
        self._total = total
        self._console = console or Console(stderr=True)
        self._enabled = enabled and rank() == 0
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self._bar: RichProgress | None = None
        if self._enabled and self._console.is_terminal:
            self._bar = RichProgress(
                TextColumn("[bold]{task.description}"),
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
            if total:
                self._task = self._bar.add_task("step", total=total, completed=done, figures="")

    def __enter__(self) -> Progress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, step: int, figures: Mapping[str, float]) -> None:
        """Show that ``step`` steps are completed, with the figures of the last step and its evaluation."""
        texts = [
            f"{label} {figures[name]:{form}}" for name, (label, form) in SHOWN.items() if name in figures
        ]
        texts += [
            f"{name.removeprefix('eval/')} {value:.3f}"
            for name, value in figures.items()
            if name.startswith("eval/") and name.endswith("/pass@1")
        ]
        if self._bar:
            self._bar.update(self._task, completed=step, figures=" ".join(f"[cyan]{t}[/cyan]" for t in texts))
        elif self._enabled:
            if seconds := figures.get("time/step"):
                self._recent.append(seconds)
                left = duration(fmean(self._recent) * (self._total - step))
                texts += [f"{seconds:.2f} s", f"{left} left"]
            self._console.out(f"step {step}/{self._total}  " + "  ".join(texts), highlight=False)
        if any("/pass@" in name for name in figures):
            self.results(f"after step {step}", figures)

    @contextmanager
    def part(self, what: str, total: int) -> Iterator[Callable[[float], None]]:
        """Show the progress of a part of the work while the block runs, e.g. an evaluation.

        A terminal gets a second bar, other outputs a line every 30 seconds.

        Args:
            total: number of the part's pieces, such as responses.

        Yields:
            A function that receives the share of the pieces that are done. Any thread may call it.
        """
        started = said = time.monotonic()
        task = self._bar.add_task(what, total=total, figures="") if self._bar else None

        def report(share: float) -> None:
            nonlocal said
            now = time.monotonic()
            if self._bar and task is not None:
                self._bar.update(task, completed=int(share * total))
            elif self._enabled and 0 < share < 1 and now - said >= _LINE_S:
                said, spent = now, now - started
                left = duration(spent * (1 / share - 1))
                done = f"{what}: {int(share * total)}/{total}, {duration(spent)}, {left} left"
                self._console.out(done, highlight=False)

        try:
            yield report
        finally:
            if self._bar and task is not None:
                self._bar.remove_task(task)

    def results(self, when: str, figures: Mapping[str, float]) -> None:
        """Print the rates of an evaluation, e.g. "after step 3", with their intervals, as a note."""
        rates = {
            name.removeprefix("eval/"): value
            for name, value in figures.items()
            if "/pass@" in name or name.endswith("/success")
        }
        shown = ", ".join(f"{name} {value:.3f}{_interval(name, figures)}" for name, value in rates.items())
        self.note(f"evaluation {when}: {shown}")

    def note(self, text: str) -> None:
        """Print a line above the bar, without interpreting brackets as markup."""
        if self._enabled:
            self._console.out(printable(text), highlight=False)


SILENT = Progress(enabled=False)
"""Prints nothing."""


def duration(seconds: float) -> str:
    """Return e.g. ``0:03:20``."""
    return str(timedelta(seconds=round(seconds)))


def _interval(name: str, figures: Mapping[str, float]) -> str:
    """Return e.g. `` [0.210, 0.300]`` for the 95 % interval of ``SET/pass@k`` or ``SET/success``."""
    of_set, _, rate = name.rpartition("/")
    ends = [figures.get(f"eval/{of_set}/{end}@{rate.removeprefix('pass@')}") for end in ("ci_low", "ci_high")]
    return "" if None in ends else f" [{ends[0]:.3f}, {ends[1]:.3f}]"
