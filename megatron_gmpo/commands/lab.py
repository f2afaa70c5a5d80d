"""Run a study, a grid of training runs over seeds, and write its report.

This is an alias of ``python -m megatron_gmpo.lab``.
"""

from __future__ import annotations

from ..lab.__main__ import main

__all__ = ["main"]
