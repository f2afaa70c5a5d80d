"""Run a study and write its report: ``python -m megatron_gmpo.lab STUDY.toml``."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Annotated

from ..command_line import (
    Options,
    Positional,
    exit_with_one_line,
    one_line_errors,
    parse_options,
)
from ..config import Positive
from ..errors import Exit, InputError


class Lab(Options):
    """Run the trials of a study that have not finished, then write its report.

    The report consists of report.html, PNG files and numbers.json.
    """

    study: Annotated[Path, Positional]
    """TOML file of the study."""
    cores: Positive = os.cpu_count() or 1
    """Number of CPU cores to use; each process of a trial uses one."""
    seeds: tuple[int, ...] = ()
    """Run only these seeds of the study."""
    only: tuple[str, ...] = ()
    """Run only these arms of the study."""
    report: bool = False
    """Run no trials; report on the existing results."""
    out: Path | None = None
    """Folder of the report; by default runs/studies/STUDY/report."""


def main(argv: list[str]) -> None:
    """Run the trials of a study that have not finished and write its report.

    Raises:
        InputError: see ``load_study``, ``check_folders``, ``run_trials`` and ``write_report``.
    """
    options = parse_options(Lab, argv, "megatron-gmpo lab")
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        _run(options)
    except KeyboardInterrupt:
        exit_with_one_line(InputError("interrupted; the same command continues"), code=Exit.INTERRUPTED)


def _run(options: Lab) -> None:
    from rich.console import Console

    from .report import write_report
    from .study import RUNS, load_study
    from .trials import check_folders, run_trials, unfinished

    console = Console(stderr=True)
    study = load_study(options.study)
    trials = study.choose(options.only, options.seeds)
    check_folders(study.trials)
    waiting = [] if options.report else unfinished(trials)
    if waiting:
        processes = study.file.processes
        at_once = options.cores // processes
        if at_once < 1:
            raise InputError(
                f"--cores {options.cores} is less than the study's processes = {processes}: give at least "
                f"{processes}"
            )
        line = f"{study.name}: {len(waiting)} of {len(trials)} trials to run, {at_once} at a time"
        console.out(line, highlight=False)
        _prepare(study.file.prepare.command, study.file.prepare.output)
        records = run_trials(
            waiting,
            processes=processes,
            at_once=at_once,
            timeout_s=study.file.timeout_s,
            console=console,
        )
        ends = Counter(record.outcome for record in records)
        console.out(", ".join(f"{count} {outcome}" for outcome, count in ends.items()), highlight=False)
    out = options.out or RUNS / study.name / "report"
    print(write_report(study, f"python -m megatron_gmpo.lab {options.study}", out))


def _prepare(command: tuple[str, ...], output: str) -> None:
    """Run ``python -m command...`` unless the file ``output`` exists."""
    if not command or (output and Path(output).exists()):
        return
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    code = subprocess.run([sys.executable, "-m", *command], stdin=subprocess.DEVNULL, env=env).returncode
    if code:
        raise InputError(
            f"prepare.command {shlex.join(command)!r} ended with code {code}: its output is above, correct "
            f"the command"
        )


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
