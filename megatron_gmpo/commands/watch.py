"""Show a running or finished job, from the files in its run folder.

Usage::

    megatron-gmpo watch RUN_DIR [--once]
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
import tomllib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape as escaped
from rich.progress_bar import ProgressBar
from rich.table import Column, Table

from ..command_line import Options, Positional, parse_options
from ..errors import Exit, InputError, printable

REFRESH_S = 2.0
SILENT_S = 60.0
"""Age of a heartbeat after which its rank is shown in red."""
TAIL_BYTES = 2**20
"""Number of bytes that are read from the end of a JSON-lines file."""
TREND_STEPS = 30
"""Number of steps in a sparkline and in the estimate of the time left."""
TRIED_AGAIN = {Exit.REQUEUE, Exit.FAILED, Exit.HUNG, Exit.BAD_NODE}
"""Exit codes after which a Slurm job may make another attempt. The view then stays open."""

SHOWN = {
    "reward/mean": ("reward", ".3f"),
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


@dataclass(frozen=True)
class Snapshot:
    """The contents of a run folder's files at one time.

    A file may be missing or end with an incomplete line.

    Attributes:
        num_steps: number of steps of the whole run; None if config.toml does not exist.
        steps: last lines of metrics.jsonl.
        events: last lines of events.jsonl.
        restarts: last lines of restarts.jsonl.
        heartbeats: heartbeat of each rank, in rank order.
        outcome: outcome of the last attempt; None while it runs.
        errors: rank -> last line of its traceback.
        stacks: ranks that dumped their stacks after a hang.
    """

    run_dir: Path
    num_steps: int | None
    steps: list[dict[str, Any]]
    events: list[dict[str, Any]]
    restarts: list[dict[str, Any]]
    heartbeats: list[dict[str, Any]]
    outcome: dict[str, Any] | None
    errors: dict[str, str]
    stacks: list[str]

    @property
    def done(self) -> int:
        """Return the number of completed steps."""
        return self.steps[-1]["step"] if self.steps else 0

    @property
    def finished(self) -> bool:
        """Return whether the job has ended and will not make another attempt."""
        return self.outcome is not None and not (self.restarts and self.outcome.get("code") in TRIED_AGAIN)

    @property
    def seconds_left(self) -> float | None:
        """Return the estimated time left, from the median of the last steps; None before the first step."""
        spent = [
            line["time/step"]
            for line in self.steps[-TREND_STEPS:]
            if isinstance(line.get("time/step"), int | float)
        ]
        if not spent or self.num_steps is None:
            return None
        return statistics.median(spent) * (self.num_steps - self.done)


def read(run_dir: Path) -> Snapshot:
    """Read the files of a run folder.

    Raises:
        InputError: the folder does not exist.
    """
    if not run_dir.is_dir():
        raise InputError(f"run folder {run_dir} does not exist: give the run_dir of a config")
    heartbeats = [beat for file in sorted((run_dir / "heartbeats").glob("*.json")) if (beat := _json(file))]
    errors = {
        file.stem: text.splitlines()[-1]
        for file in sorted((run_dir / "errors").glob("*.txt"))
        if (text := _text(file).strip())
    }
    return Snapshot(
        run_dir=run_dir,
        num_steps=_num_steps(run_dir / "config.toml"),
        steps=[line for line in _json_lines(run_dir / "metrics.jsonl") if "step" in line],
        events=_json_lines(run_dir / "events.jsonl"),
        restarts=_json_lines(run_dir / "restarts.jsonl"),
        heartbeats=sorted(heartbeats, key=lambda beat: beat.get("rank", 0)),
        outcome=_json(run_dir / "outcome.json"),
        errors=errors,
        # a rank creates its file at its start and writes to it after a hang
        stacks=[file.stem for file in sorted((run_dir / "stacks").glob("*.txt")) if file.stat().st_size],
    )


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


def _text(file: Path) -> str:
    try:
        with file.open("rb") as opened:
            opened.seek(max(0, os.fstat(opened.fileno()).st_size - TAIL_BYTES))
            return opened.read().decode(errors="replace").strip()
    except OSError:  # missing, or being replaced
        return ""


def _json(file: Path) -> dict[str, Any] | None:
    return _object(_text(file))


def _json_lines(file: Path) -> list[dict[str, Any]]:
    return [found for line in _text(file).split("\n") if (found := _object(line)) is not None]


def _object(text: str) -> dict[str, Any] | None:
    try:
        found = json.loads(text)
    except ValueError:  # incomplete, or cut at the start of the tail
        return None
    return found if isinstance(found, dict) else None


def _num_steps(file: Path) -> int | None:
    try:
        return tomllib.loads(_text(file)).get("train", {}).get("num_steps")
    except tomllib.TOMLDecodeError:
        return None
