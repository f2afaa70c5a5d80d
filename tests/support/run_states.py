"""The state of a run that a checkpoint holds, for tests without a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_gmpo.config import CollapseConfig
from megatron_gmpo.metrics.collapse import CollapseDetector
from megatron_gmpo.weights.run_checkpoint import choose_whole, find_candidates


def records(**changes: Any) -> dict[str, Any]:
    """Return what ``TrainingState`` adds to a policy's checkpoint, for a run that replays rollouts."""
    collapse = CollapseDetector(CollapseConfig()).state_dict()
    return {"prompts": None, "clip": None, "collapse": collapse, "config": {"train": {}}} | changes


def run_state(step: int, **changes: Any) -> dict[str, Any]:
    """Return the content of a state.json, without the checksum."""
    return {"step": step, "world_size": 1, "updates": step, "model": {}, "files": {}} | records(**changes)


def newest(folder: Path) -> Path | None:
    """Return the newest checkpoint, as a resume finds it before the process group starts."""
    return choose_whole(find_candidates(folder))[0]
