"""Train a policy with GMPO; under torchrun one process per rank.

This is an alias of ``python -m megatron_gmpo.train``.
"""

from __future__ import annotations

from . import run_module


def main(argv: list[str]) -> None:
    run_module("megatron_gmpo.train", argv)
