"""A loss and an advantage in a file outside the repository, through the real command."""

from __future__ import annotations

from pathlib import Path

import pytest

from ..support.commands import json_lines, options, run_module
from ..support.losses import documented_losses
from .test_train import argv

pytestmark = pytest.mark.distributed

__all__ = ["argv"]  # fixture

ADVANTAGE = """

def centered(rewards):
    return rewards - rewards.median()
"""


def test_the_documented_loss_trains_in_two_layouts(argv: list[str], tmp_path: Path) -> None:
    """Metrics of a run with context parallelism equal those of one rank with the same responses."""
    (tmp_path / "outside.py").write_text(documented_losses()[0] + ADVANTAGE)
    chosen = options(
        algorithm__loss="outside:harmonic",
        algorithm__advantage="outside:centered",
        train__num_steps=2,
        eval__before="false",
        checkpoint__save_final="false",
    )
    rollouts = tmp_path / "rollouts"
    cp2 = options(run_dir=tmp_path / "cp2", rollout__save_path=rollouts, parallel__context_parallel_size=2)
    alone = options(run_dir=tmp_path / "alone", rollout__replay_path=rollouts)
    for layout, ranks in ((cp2, 2), (alone, None)):
        done = run_module(
            "megatron_gmpo.train", *argv, *chosen, *layout, ranks=ranks, PYTHONPATH=str(tmp_path)
        )
        assert done.returncode == 0, done.stderr
        assert (
            "loss outside:harmonic, clip_low 0.2, clip_high 0.2 (default of outside:harmonic)" in done.stderr
        )
    pairs = list(
        zip(
            json_lines(tmp_path / "cp2/metrics.jsonl"),
            json_lines(tmp_path / "alone/metrics.jsonl"),
            strict=True,
        )
    )
    assert [(one["step"], two["step"]) for one, two in pairs] == [(1, 1), (2, 2)]
    for one, two in pairs:
        for name in ("loss", "grad_norm", "policy/log_ratio_max", "policy/clip_fraction_high"):
            assert one[name] == pytest.approx(two[name], rel=1e-4, abs=1e-6), name
        assert one["grad_norm"] > 0
