"""Show a running or finished job, from the files in its run folder.

Usage::

    megatron-gmpo watch RUN_DIR [--once]
"""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape as escaped
from rich.progress_bar import ProgressBar
from rich.table import Column, Table

from ..command_line import Options, Positional, parse_options
from ..errors import Exit, printable
from ..view.snapshot import TREND_STEPS, Snapshot, read

REFRESH_S = 2.0
SILENT_S = 60.0
"""Age of a heartbeat after which its rank is shown in red."""

SHOWN = {
    "reward/mean": ("reward", ".3f"),
    "episode/success": ("successful episodes", ".0%"),
    "eval": ("", ""),  # one row per benchmark
    "loss": ("loss", ".4g"),
    "grad_norm": ("gradient norm", ".3g"),
    "policy/entropy": ("entropy", ".3f"),
    "response_length/mean": ("response length", ",.0f"),
    "throughput/tokens_per_second": ("tokens per second", ",.0f"),
    "rollout/logprob_diff_mean": ("log probability mismatch", ".2g"),
    "rollout/server_restarts": ("server restarts", ".0f"),
}
"""Figure -> (label, format)."""
PIPE_WIDTH = 1000
"""Number of columns if the output is not a terminal, so that no line is broken."""
TICKS = "▁▂▃▄▅▆▇█"


class Watch(Options):
    """Show the progress of a run and the state of its ranks.

    The view has step, reward, throughput, time left, mismatch and restarts of the run, and the phase and last
    error of each rank.
    """

    run_dir: Annotated[Path, Positional]
    """Run folder, the run_dir of a training config."""
    once: bool = False
    """Print the view once instead of refreshing it until the job ends."""


def main(argv: list[str]) -> None:
    options = parse_options(Watch, argv, "megatron-gmpo watch")
    console = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH)
    snapshot = read(options.run_dir)
    if options.once:
        console.print(render(snapshot, time.time()))
        return
    with (
        suppress(KeyboardInterrupt),
        Live(render(snapshot, time.time()), console=console, auto_refresh=False) as live,
    ):
        while not snapshot.finished:
            time.sleep(REFRESH_S)
            snapshot = read(options.run_dir)
            live.update(render(snapshot, time.time()), refresh=True)


def render(snapshot: Snapshot, now: float) -> RenderableType:
    """Return the whole view. Ages are relative to the Unix time ``now``."""
    parts: list[RenderableType] = [f"[bold]{escape(str(snapshot.run_dir))}[/bold]", _progress(snapshot, now)]
    if snapshot.outcome is not None:
        parts.append(_outcome(snapshot.outcome))
    if snapshot.steps:
        parts.append(_figures(snapshot))
    if snapshot.heartbeats:
        parts.append(_ranks(snapshot, now))
    parts += [f"[red]{escape(rank)}: {escape(line)}[/red]" for rank, line in snapshot.errors.items()]
    parts += [
        f"[red]{escape(rank)} dumped its stacks to stacks/{escape(rank)}.txt[/red]"
        for rank in snapshot.stacks
    ]
    if snapshot.events:
        parts.append(_events(snapshot, now))
    return Group(*parts)


def _progress(snapshot: Snapshot, now: float) -> RenderableType:
    done, total = snapshot.done, snapshot.num_steps
    line = Table.grid(padding=(0, 2))
    left = snapshot.seconds_left
    eta = f"eta {_duration(left)}" if left else ""
    line.add_row(
        f"step {done}/{total if total is not None else '?'}",
        ProgressBar(total or 1, done, width=30),
        "" if snapshot.outcome else eta,
        "" if snapshot.outcome else _liveness(snapshot, now),
        f"{_count(len(snapshot.restarts) - 1, 'restart')}" if len(snapshot.restarts) > 1 else "",
    )
    return line


def _outcome(outcome: dict[str, Any]) -> str:
    code, reason = outcome.get("code"), escape(str(outcome.get("reason", "")))
    shown = escape(str(code))
    colour = "green" if code == Exit.DONE else "yellow" if code == Exit.REQUEUE else "red"
    return f"[{colour}]exit {shown}: {reason}[/{colour}]"


def _liveness(snapshot: Snapshot, now: float) -> str:
    if not snapshot.heartbeats:
        return ""
    age = now - max(beat.get("time", 0.0) for beat in snapshot.heartbeats)
    return "[green]running[/green]" if age <= SILENT_S else f"[red]silent for {_duration(age)}[/red]"


def _figures(snapshot: Snapshot) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2))
    for name, (label, form) in SHOWN.items():
        if name == "eval":
            for key in sorted(
                {
                    key
                    for line in snapshot.steps
                    for key in line
                    if key.startswith("eval/") and "/pass@" in key
                }
            ):
                _add_figure(table, snapshot, key, escape(key.removeprefix("eval/")), ".3f")
        else:
            _add_figure(table, snapshot, name, label, form)
    return table


def _add_figure(table: Table, snapshot: Snapshot, name: str, label: str, form: str) -> None:
    values = [line[name] for line in snapshot.steps if isinstance(line.get(name), int | float)]
    if values:
        table.add_row(label, format(values[-1], form), f"[cyan]{_trend(values[-TREND_STEPS:])}[/cyan]")


def _ranks(snapshot: Snapshot, now: float) -> Table:
    names = ("rank", "node", "step", "phase", "for", "heartbeat")
    columns = [Column(name, overflow="fold", no_wrap=name != "node") for name in names]
    table = Table(*columns, box=None, header_style="dim", padding=(0, 2))
    for beat in snapshot.heartbeats:
        age = now - beat.get("time", now)
        silent = age > SILENT_S and not snapshot.outcome
        table.add_row(
            escape(str(beat.get("rank", "?"))),
            escape(str(beat.get("node", "?"))),
            escape(str(beat.get("step", "?"))),
            escape(str(beat.get("phase", "?"))),
            _duration(beat.get("time", now) - beat.get("since", now)),
            f"{_duration(age)} ago",
            style="red" if silent else None,
        )
    return table


def _events(snapshot: Snapshot, now: float) -> Table:
    details = Column(overflow="fold")
    table = Table("", "", details, box=None, show_header=False, padding=(0, 2), style="dim")
    for event in snapshot.events[-5:]:
        details = " ".join(f"{key}={value}" for key, value in event.items() if key not in ("time", "event"))
        table.add_row(
            f"{_duration(now - event.get('time', now))} ago",
            escape(str(event.get("event", "?"))),
            escape(details),
        )
    return table


def escape(text: str) -> str:
    """Return ``text`` without control characters and markup."""
    return escaped(printable(text))


def _trend(values: list[float]) -> str:
    low, high = min(values), max(values)
    return "".join(TICKS[int((value - low) / ((high - low) or 1) * (len(TICKS) - 1))] for value in values)


def _duration(seconds: float) -> str:
    minutes, whole = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours} h {minutes:02} min" if hours else f"{minutes} min {whole:02} s" if minutes else f"{whole} s"
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("s" if number != 1 else "")
