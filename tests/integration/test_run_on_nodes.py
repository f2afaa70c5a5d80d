"""Runs on one, two and four emulated nodes: resumed, and replayed, on another number of nodes than before.

The run replays the routing of its rollouts (R3). Its two replicas have two ranks each, and on two nodes each
replica has a rank on both, so that every sequence goes to both.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ..support.commands import json_lines, options, run_module, tiny_run

pytestmark = pytest.mark.distributed

NODES = {1: "aaaa", 2: "abab", 4: "abcd"}
LAYOUT = {"parallel__tensor_model_parallel_size": 2, "parallel__expert_model_parallel_size": 2}


def figures(run_dir: Path) -> list[dict[str, Any]]:
    """Return the lines of the metrics, without times."""
    return [
        {name: value for name, value in line.items() if not name.startswith(("time/", "throughput/"))}
        for line in json_lines(run_dir / "metrics.jsonl")
    ]


@pytest.fixture(scope="module")
def argv(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return tiny_run(
        tiny_model("qwen3_moe", num_layers=2),
        tmp_path_factory.mktemp("problems"),
        algorithm__clip="adaptive",
        algorithm__moe_routing_replay="rollout",
        rollout__routed_experts="true",
        train__minibatches_per_step=2,
        train__max_tokens_per_microbatch=64,
        optimizer__lr=1e-3,
        optimizer__lr_schedule="constant",
        log__tokens_per_step=4,
    )


@pytest.fixture(scope="module")
def train(argv: list[str]) -> Callable[..., list[dict[str, Any]]]:
    """Return ``train(number of nodes, run_dir, **changes)``, which returns the run's figures."""

    def on(nodes: int, run_dir: Path, **changes: Any) -> list[dict[str, Any]]:
        command = [*argv, *options(run_dir=run_dir, **LAYOUT | changes)]
        done = run_module("tests.support.on_nodes", NODES[nodes], *command, ranks=4)
        assert done.returncode == 0, done.stderr
        return figures(run_dir)

    return on


@pytest.fixture(scope="module")
def of_two_nodes(
    train: Callable[..., list[dict[str, Any]]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Return the folder of two steps on two nodes, saved in the background, with their rollouts."""
    run_dir = tmp_path_factory.mktemp("run") / "two_nodes"
    saved = {"rollout__save_path": run_dir / "rollouts", "checkpoint__async_save": "true"}
    assert len(train(2, run_dir, train__num_steps=2, checkpoint__save_interval=1, **saved)) == 2
    return run_dir


def test_a_run_of_two_nodes_goes_on_with_one_and_with_four(
    train: Callable[..., list[dict[str, Any]]], of_two_nodes: Path, tmp_path: Path
) -> None:
    """It equals a run of one node to the last bit, because who computes what depends on the ranks alone."""
    unbroken = train(1, tmp_path / "unbroken", train__num_steps=3)
    assert [line["step"] for line in unbroken] == [1, 2, 3]
    assert all(line["grad_norm"] > 0 for line in unbroken)
    for nodes in (1, 4):
        run_dir = tmp_path / f"on_{nodes}"
        shutil.copytree(of_two_nodes, run_dir)
        assert train(nodes, run_dir, train__num_steps=3) == unbroken
        for folder in ("tokens", "transcripts.jsonl"):
            expected, found = (each / folder for each in (tmp_path / "unbroken", run_dir))
            files = sorted(expected.iterdir()) if expected.is_dir() else [expected]
            for file in files:
                assert (found / file.name if found.is_dir() else found).read_bytes() == file.read_bytes()


def test_rollouts_of_two_nodes_are_replayed_on_four_and_by_one_process(
    argv: list[str], train: Callable[..., list[dict[str, Any]]], of_two_nodes: Path, tmp_path: Path
) -> None:
    replay = {
        "rollout__replay_path": of_two_nodes / "rollouts",
        "train__num_steps": 2,
        "checkpoint__save_final": "false",
    }
    four = train(4, tmp_path / "four", **replay)
    done = run_module("megatron_gmpo.train", *argv, *options(run_dir=tmp_path / "one", **replay))
    assert done.returncode == 0, done.stderr
    for found, rel in ((four, 1e-6), (figures(tmp_path / "one"), 1e-4)):
        for line, expected in zip(found, figures(of_two_nodes), strict=True):
            assert line["moe/routing_differs"] == pytest.approx(expected["moe/routing_differs"], abs=0.01)
            for name in ("loss", "grad_norm", "policy/log_ratio_max", "policy/entropy", "reward/mean"):
                # the loss is a sum of terms near 1 and -1
                assert line[name] == pytest.approx(expected[name], rel=rel, abs=1e-7), name
