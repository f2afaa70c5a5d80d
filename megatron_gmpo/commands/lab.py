"""Run a study, a grid of training runs over seeds, and write its report.

The same as ``python -m megatron_gmpo.lab``.
"""

from __future__ import annotations

from ..lab.__main__ import main

__all__ = ["main"]
