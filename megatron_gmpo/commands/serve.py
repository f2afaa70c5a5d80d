"""Start the SGLang servers of one rollout node of a Slurm job.

This is an alias of ``python -m megatron_gmpo.rollout.sglang.serve``. examples/moe/launch.sh starts it.
"""

from __future__ import annotations

from ..command_line import load_config
from . import run_module


def main(argv: list[str]) -> None:
    load_config(argv, "megatron-gmpo serve")  # refuses bad options before the imports, which take seconds
    run_module("megatron_gmpo.rollout.sglang.serve", argv)
