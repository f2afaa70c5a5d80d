"""Write the report on a study.

It consists of report.html, a self-contained page, its pictures as PNG files, and numbers.json.
"""

from __future__ import annotations

import base64
import json
import math
import shlex
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from ..errors import InputError
from .figures import PANELS, draw, panel_curves
from .results import TAIL, Result, Row, compare, read_results
from .statistics import Estimate
from .study import Study, Trial, flatten
from .trials import Record

_VERDICTS = {1: "higher", -1: "lower", 0: "not distinguishable"}


def write_report(study: Study, command: str, out: Path) -> Path:
    """Write the report on the trials so far and return the path of the page.

    Args:
        command: command that ran the study, which the page shows.
        out: folder to write.

    Raises:
        InputError: no trial has logged a step.
    """
    results = read_results(study)
    if not any(results.values()):
        raise InputError(
            f"study {study.name} has nothing to report: run python -m megatron_gmpo.lab without --report "
            f"first"
        )
    out.mkdir(parents=True, exist_ok=True)
    arms = {arm: [run.series for run in runs.values()] for arm, runs in results.items()}
    labels = {arm.name: arm.label for arm in study.arms}
    drawn: list[tuple[str, str]] = []
    curves: dict[str, dict[str, Any]] = {}
    for panel in PANELS:
        if of_panel := panel_curves(panel, arms):
            draw(panel, of_panel, labels, out / panel.file)
            drawn.append((panel.title, panel.file))
            curves |= {
                metric: {arm: _lists(vars(c)) for arm, c in of_arms.items()}
                for metric, of_arms in of_panel.items()
            }
    rows = compare(study, results)
    ends = [(trial, results[trial.arm.name].get(trial.seed)) for trial in study.trials]
    records = [run.record for _, run in ends if run and run.record]
    about = _about(study, command, records)
    numbers = {
        "about": about | {"reported": datetime.now(UTC).isoformat(timespec="seconds")},
        "arms": {arm.name: {"label": arm.label, "overrides": _plain(arm.overrides)} for arm in study.arms},
        "trials": [_trial(trial, run) for trial, run in ends],
        "table": [_row(row) for row in rows],
        "curves": curves,
    }
    (out / "numbers.json").write_text(json.dumps(numbers, allow_nan=False, separators=(",", ":")))

    environment = Environment(
        loader=PackageLoader(__package__ or ""), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"figure": _figure, "interval": _interval}
    page = environment.get_template("report.html").render(
        about=about,
        arms=study.arms,
        measures=_by_measure(rows),
        verdicts=_VERDICTS,
        tail=TAIL,
        pictures=[(title, base64.b64encode((out / file).read_bytes()).decode()) for title, file in drawn],
        base_text=study.base.read_text(),
        commands=[_command(trial, study.file.processes) for trial in study.trials[: len(study.arms)]],
        trials=numbers["trials"],
    )
    (out / "report.html").write_text(page)
    return out / "report.html"


def _about(study: Study, command: str, records: list[Record]) -> dict[str, Any]:
    return {
        "title": study.file.title,
        "question": study.file.question,
        "command": command,
        "baseline": study.file.baseline,
        "base_config": study.base.as_posix(),
        "overrides": _plain(flatten(study.file.overrides)),
        "seeds": study.file.seeds,
        "processes": study.file.processes,
        "ran": _span(records),
        "machine": sorted({record.machine for record in records}),
        "versions": sorted(
            {f"{name} {version}" for record in records for name, version in record.versions.items()}
        ),
    }


def _trial(trial: Trial, run: Result | None) -> dict[str, Any]:
    record = run.record if run else None
    return {
        "arm": trial.arm.name,
        "seed": trial.seed,
        "steps": int(max((at[-1] for at, _ in run.series.values()), default=0)) if run else 0,
        "outcome": record.outcome if record else "not ended",
        "reason": record.reason if record else "",
        "seconds": record.seconds if record else None,
    }


def _row(row: Row) -> dict[str, Any]:
    return {
        "measure": row.measure.title,
        "metric": row.measure.metric,
        "kind": row.measure.kind,
        "arm": row.arm.name,
        "value": _estimate(row.value),
        "difference": _estimate(row.difference),
        "verdict": _VERDICTS[row.difference.sign] if row.difference else None,
    }


def _by_measure(rows: Iterable[Row]) -> dict[str, list[Row]]:
    grouped: dict[str, list[Row]] = {}
    for row in rows:
        grouped.setdefault(row.measure.title, []).append(row)
    return grouped


def _estimate(x: Estimate | None) -> dict[str, Any] | None:
    return None if x is None else {"mean": _rounded(x.mean), "half": _rounded(x.half), "n": x.n}


def _lists(arrays: dict[str, np.ndarray]) -> dict[str, list[float | None]]:
    return {name: [_rounded(float(value)) for value in values] for name, values in arrays.items()}


def _plain(overrides: dict[str, Any]) -> dict[str, Any]:
    """Replace infinities and NaN by text, because JSON does not support them."""
    return {
        key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in overrides.items()
    }


def _rounded(value: float) -> float | None:
    return float(f"{value:.4g}") if math.isfinite(value) else None


def _figure(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def _interval(x: Estimate) -> str:
    """Format an estimate, e.g. ``0.48 ± 0.02``; a single value has no interval."""
    return f"{_figure(x.mean)} ± {_figure(x.half)}" if x.n > 1 else _figure(x.mean)


def _span(records: list[Record]) -> str:
    if not records:
        return "no trial has ended yet"
    first, last = min(record.started for record in records), max(record.started for record in records)
    total = sum(record.seconds for record in records)
    each = total / len(records)
    return f"trials started {first} to {last} (UTC), {total / 60:.0f} minutes in total, {each:.0f} s each"


def _command(trial: Trial, processes: int) -> str:
    launch = f"torchrun --standalone --nproc-per-node {processes}" if processes > 1 else "python"
    return f"{launch} -m megatron_gmpo.train {shlex.join(trial.argv)}"
