"""Begin or end one attempt of a Slurm job at a run.

examples/moe/launch.sh calls it on the first node:

    RUN_DIR=$(python -m megatron_gmpo slurm_attempt begin CONFIG.toml --section.key value ...)
    python -m megatron_gmpo slurm_attempt end RUN_DIR STATUS_OF_SRUN

``begin`` prints the run folder. ``end`` exits with ``Exit.REQUEUE`` if the job is to be requeued. It then
prints the node that must not be used again, if any. This module does not import torch: the import can take
half a minute from a busy file system, and a job at its time limit has less time left.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from ..command_line import Options, Positional, load_config, parse_options
from ..errors import InputError
from ..supervision.slurm_attempts import begin, end

USAGE = "megatron-gmpo slurm_attempt begin CONFIG.toml ... | end RUN_DIR STATUS"


class End(Options):
    """Record how an attempt ended."""

    run_dir: Annotated[Path, Positional]
    """Run folder, as ``begin`` printed it."""
    status: Annotated[int, Positional]
    """Exit code of srun."""


def main(argv: list[str]) -> None:
    action, *rest = argv or ["--help"]
    if action == "begin":
        print(begin(load_config(rest, "megatron-gmpo slurm_attempt begin")))
    elif action == "end":
        options = parse_options(End, rest, "megatron-gmpo slurm_attempt end")
        code, excluded = end(options.run_dir, options.status)
        if excluded:
            print(excluded)
        sys.exit(code)
    elif action in ("-h", "--help"):
        print(f"usage: {USAGE}\n\n{__doc__}")
    else:
        raise InputError(f"unknown action {action!r}: write {USAGE}")
