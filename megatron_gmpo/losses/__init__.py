"""Policy losses: pure functions of ``LossTokens``, and the names that your own loss imports (docs/losses.md).

The functions ``gmpo`` and ``rspo`` hide the submodules with the same names. Code inside the package imports
from the submodules: ``from .gmpo import gmpo``.
"""

from ..batch.columns import Column
from ..metrics.figures import Metric
from .gmpo import gmpo
from .ppo_family import cispo, dapo, dr_grpo, grpo, gspo
from .registry import DefaultClip, Loss, NewColumn
from .rspo import rspo
from .tokens import (
    LossOutput,
    LossTokens,
    clip_events,
    clip_one_sided,
    exp,
    extremes,
    k3,
    log_interval,
    means,
)

__all__ = [
    "Column",
    "DefaultClip",
    "Loss",
    "LossOutput",
    "LossTokens",
    "Metric",
    "NewColumn",
    "cispo",
    "clip_events",
    "clip_one_sided",
    "dapo",
    "dr_grpo",
    "exp",
    "extremes",
    "gmpo",
    "grpo",
    "gspo",
    "k3",
    "log_interval",
    "means",
    "rspo",
]
