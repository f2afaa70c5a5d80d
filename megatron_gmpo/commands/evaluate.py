"""Measure pass@1 and pass@k of a checkpoint on benchmarks.

This is an alias of ``python -m megatron_gmpo.evaluate``.
"""

from __future__ import annotations

from . import run_module


def main(argv: list[str]) -> None:
    run_module("megatron_gmpo.evaluate", argv)
