"""All ranks stop together, whichever rank received the signal, and every rank names a bad node."""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_gmpo.config import SupervisionConfig
from megatron_gmpo.errors import NodeError
from megatron_gmpo.supervision import node_check, signals, stop

from ..support.ranks import RankPool

pytestmark = pytest.mark.distributed


def votes_after_signals(received: list[signal.Signals | None]) -> str:
    signals.received = received[dist.get_rank()]
    try:
        return stop.StopVote(margin_s=0).reason()
    finally:
        signals.received = None


@pytest.mark.parametrize(
    ("received", "reason"),
    [
        ([None, None, None], ""),
        ([None, None, signal.SIGUSR1], "SIGUSR1"),
        ([signal.SIGUSR1, signal.SIGTERM, None], "SIGTERM"),
    ],
)
def test_a_signal_to_one_rank_stops_all(
    ranks: RankPool, received: list[signal.Signals | None], reason: str
) -> None:
    assert ranks.run(3, votes_after_signals, received) == [reason] * 3


def votes_towards_a_deadline(*, saving: bool) -> list[str]:
    clock: Any = SimpleNamespace(now=0.0, time=lambda: clock.now, monotonic=lambda: clock.now)
    module: Any = stop
    module.time, real = clock, module.time
    if dist.get_rank() == 0:
        os.environ["SLURM_JOB_END_TIME"] = "100"
    reasons: list[str] = []
    try:
        vote = stop.StopVote(margin_s=5)
        # Steps take 12, 30, 7 and 1 s and a save takes 8 s. A stop needs 43 s: the longest step, a save and
        # the margin. While a save is in progress, it needs 51 s: that save is completed first.
        for now, save in [
            (0, 0),
            (20, 8),
            (50, 0),
            (57, 0),
            (58, 0),
        ]:
            clock.now = now
            if save:
                vote.saved(save)
                vote.paused(save)
            reasons.append(vote.reason(saving=saving))
    finally:
        module.time = real
        os.environ.pop("SLURM_JOB_END_TIME", None)
    return reasons


def test_the_first_rank_stops_all_before_the_longest_step_and_save_no_longer_fit(ranks: RankPool) -> None:
    limit = "the job's time limit"
    votes = partial(votes_towards_a_deadline, saving=False)
    assert ranks.run(2, votes) == [["", "", "", "", limit]] * 2
    votes = partial(votes_towards_a_deadline, saving=True)
    assert ranks.run(2, votes) == [["", "", limit, limit, limit]] * 2


def problem_of_node(bad: int, wanted_gb: float, run_dir: Path) -> str:
    os.environ["SLURMD_NODENAME"] = f"node{dist.get_rank()}"
    cfg = SupervisionConfig(min_free_memory_gb=wanted_gb if dist.get_rank() == bad else 0, min_free_disk_gb=0)
    try:
        node_check.check_nodes(cfg, run_dir, torch.device("cpu"))
    except NodeError as error:
        return str(error)
    finally:
        del os.environ["SLURMD_NODENAME"]
    return ""


def test_every_rank_names_the_bad_node(ranks: RankPool, tmp_path: Path) -> None:
    assert ranks.run(3, problem_of_node, 1, 0.0, tmp_path) == [""] * 3
    first, *others = ranks.run(3, problem_of_node, 1, 1e6, tmp_path)
    assert first.startswith("node node1: ")
    assert first.endswith(" GB of memory are available, supervision.min_free_memory_gb = 1e+06")
    assert others == [first] * 2


def problem_of_folder(parent: Path) -> str:
    module: Any = node_check
    module._TOKEN_TIMEOUT_S, usual = 1.0, module._TOKEN_TIMEOUT_S
    try:
        return problem_of_node(-1, 0.0, parent / str(dist.get_rank()))
    finally:
        module._TOKEN_TIMEOUT_S = usual


def test_a_folder_that_is_not_shared_is_noticed(ranks: RankPool, tmp_path: Path) -> None:
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
    first, second = ranks.run(2, problem_of_folder, tmp_path)
    assert first == second
    assert first.startswith(
        f"node node1: run_dir = '{tmp_path}/1' does not show the file that rank 0 wrote there"
    )
