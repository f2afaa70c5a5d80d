"""Runs a study and reports on it: python -m megatron_gmpo.lab STUDY.toml"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from ..config import exit_with_one_line
from ..errors import InputError
from .report import write_report
from .study import RUNS, Prepare, load_study
from .trials import check_folders, run_trials, unfinished

console = Console(stderr=True)


def main(
    study: Annotated[Path, tyro.conf.Positional],
    /,
    cores: int = os.cpu_count() or 1,
    seeds: tuple[int, ...] = (),
    only: tuple[str, ...] = (),
    report: bool = False,
    out: Path | None = None,
) -> None:
    """Runs what a study's trials lack, then writes its report: report.html, PNGs, numbers.json.

    Args:
        study: TOML file of the study.
        cores: Cores to use; each process of a trial takes one.
        seeds: Run these seeds of the study only.
        only: Run these arms of the study only.
        report: Run nothing; report on what has run so far.
        out: Folder of the report, runs/studies/STUDY/report by default.
    """
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        plan = load_study(study)
        trials = plan.choose(only, seeds)
        check_folders(plan.trials)
        waiting = [] if report else unfinished(trials)
        if waiting:
            at_once = cores // plan.file.processes
            if at_once < 1:
                raise InputError(
                    f"--cores {cores} is less than the study's processes = {plan.file.processes}: give as many"
                )
            console.print(
                f"{plan.name}: {len(waiting)} of {len(trials)} trials to run, {at_once} at a time",
                highlight=False,
            )
            _prepare(plan.file.prepare)
            records = run_trials(
                waiting,
                processes=plan.file.processes,
                at_once=at_once,
                timeout_s=plan.file.timeout_s,
                console=console,
            )
            ends = Counter(record.outcome for record in records)
            console.print(", ".join(f"{count} {outcome}" for outcome, count in ends.items()), highlight=False)
        print(write_report(plan, f"python -m megatron_gmpo.lab {study}", out or RUNS / plan.name / "report"))
    except InputError as error:
        exit_with_one_line(error)
    except KeyboardInterrupt:
        exit_with_one_line(InputError("interrupted; the same command goes on"), code=130)


def _prepare(prepare: Prepare) -> None:
    if prepare.command and not Path(prepare.output or ".nothing").exists():
        command = [sys.executable, "-m", *prepare.command]
        if code := subprocess.run(
            command, stdin=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"}
        ).returncode:
            raise InputError(
                f"prepare.command {shlex.join(prepare.command)!r} ended with code {code}: mend it, its output is above"
            )


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    tyro.cli(main, use_underscores=True)
