"""Whole runs that collapse, and whole runs with all stability features."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from megatron_gmpo.weights.run_checkpoint import update_state

from ..support.commands import error_lines, json_lines, options, run_module, start_module, wait_until
from .test_train import EP2, argv

pytestmark = pytest.mark.distributed

__all__ = ["argv"]  # fixture

WATCHED = {
    "collapse__window": 2,
    "collapse__patience": 1,
    "collapse__entropy_share": 0.4,
    "checkpoint__save_interval": 1,
    "checkpoint__keep_last": 4,
    "eval__sets": "{}",
}
ABSURD = {"train__num_steps": 8, "optimizer__lr": 0.3, "optimizer__adam_eps": 1e-3}
"""With these settings all numbers stay finite, but the policy soon gives the same answer to every prompt."""


@pytest.fixture(scope="module")
def four_steps(argv: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run four healthy steps and return the run folder."""
    run_dir = tmp_path_factory.mktemp("run") / "four_steps"
    done = run_module(
        "megatron_gmpo.train", *argv, *options(run_dir=run_dir, train__num_steps=4, **WATCHED, **EP2), ranks=2
    )
    assert done.returncode == 0, done.stderr
    assert events(run_dir) == [("checkpoint", step) for step in (1, 2, 3, 4)]
    return run_dir


def events(run_dir: Path) -> list[tuple[str, int]]:
    return [(event["event"], event["step"]) for event in json_lines(run_dir / "events.jsonl")]


@pytest.fixture
def run_dir(four_steps: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(four_steps, tmp_path / "run"))


def test_a_collapsed_run_stops(argv: list[str], run_dir: Path) -> None:
    done = run_module(
        "megatron_gmpo.train", *argv, *options(run_dir=run_dir, collapse__action="stop", **WATCHED, **ABSURD)
    )
    assert done.returncode == 3
    (line,) = error_lines(done.stderr)
    assert line.startswith("error: step 6: the policy collapsed: policy/entropy 0.")
    assert "the newest checkpoint from before the collapse is" in line
    assert "iter_0000004" in line  # the checkpoint of step 5 was written before the collapse was detected
    assert "Traceback" not in done.stderr
    event = json_lines(run_dir / "events.jsonl")[-1]
    assert (event["event"], event["step"], event["began"], event["action"]) == ("collapse", 6, 6, "stop")
    assert event["reason"] in line


@pytest.mark.parametrize("background", [False, True], ids=["", "with a save in progress"])
def test_a_collapsed_run_goes_back_and_on(
    argv: list[str], run_dir: Path, tmp_path: Path, background: bool
) -> None:
    """On two ranks, the run goes back to step 4 with a smaller learning rate; then it is resumed.

    In the background, the checkpoint of step 5 is written after the collapse of step 6 was found.
    """
    chosen = options(
        run_dir=run_dir,
        collapse__action="rollback",
        collapse__rollback_lr_scale=1e-3,
        **WATCHED,
        **ABSURD,
        **EP2,
    )
    first = json_lines(run_dir / "metrics.jsonl")
    story = [("resume", 4), ("checkpoint", 5), ("collapse", 6), ("rollback", 4)]
    if background:
        command = [*argv, *chosen, *options(checkpoint__async_save="true")]
        go = tmp_path / "go"
        with start_module("tests.support.held_saves", *command, ranks=2, WRITE_AFTER=str(go)) as run:
            wait_until(lambda: ("collapse", 6) in events(run_dir), run, "the collapse")
            assert ("checkpoint", 5) not in events(run_dir)
            go.touch()
            _, said = run.communicate(timeout=200)
        assert run.returncode == 0, said
        story[1:3] = reversed(story[1:3])
    else:
        done = run_module("megatron_gmpo.train", *argv, *chosen, ranks=2)
        assert done.returncode == 0, done.stderr
        said = done.stderr
    assert "step 6: the policy collapsed" in said
    assert [*events(run_dir)[4:8]] == story
    assert events(run_dir)[7:] == [("rollback", 4), *(("checkpoint", step) for step in (5, 6, 7, 8))]
    figures = json_lines(run_dir / "metrics.jsonl")
    assert [line["step"] for line in figures] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert figures[:4] == first
    assert all(line["learning_rate"] == pytest.approx(0.3e-3) for line in figures[4:])
    assert all(line["policy/entropy"] > 2 for line in figures)
    checkpoints = sorted(path.name for path in (run_dir / "checkpoints").glob("iter_*"))
    assert checkpoints == [f"iter_000000{step}" for step in (5, 6, 7, 8)]
    state = json.loads((run_dir / "checkpoints" / "iter_0000008" / "state.json").read_text())
    assert state["collapse"]["rollbacks"] == 1
    # The two discarded steps used up their prompts: ten steps drew six of 40 each.
    assert 40 * state["prompts"]["epoch"] + state["prompts"]["position"] == 60

    resumed = run_module("megatron_gmpo.train", *argv, *chosen, "--train.num_steps", 9, ranks=2)
    assert resumed.returncode == 0, resumed.stderr
    assert json_lines(run_dir / "metrics.jsonl")[-1]["learning_rate"] == pytest.approx(0.3e-3)


def test_a_run_that_keeps_collapsing_stops(argv: list[str], run_dir: Path) -> None:
    chosen = options(
        run_dir=run_dir, collapse__action="rollback", collapse__rollback_lr_scale=1, collapse__max_rollbacks=1
    )
    done = run_module("megatron_gmpo.train", *argv, *chosen, *options(**WATCHED, **ABSURD))
    assert done.returncode == 3
    (line,) = error_lines(done.stderr)
    assert line.endswith("rollbacks so far: 1")
    assert [event for event, _ in events(run_dir)].count("rollback") == 1


def test_frozen_routers_are_not_thawed(argv: list[str], run_dir: Path) -> None:
    checkpoint = run_dir / "checkpoints" / "iter_0000004"
    update_state(checkpoint, {"config": {"train": {"freeze_router": True}}})
    done = run_module("megatron_gmpo.train", *argv, *options(run_dir=run_dir, train__num_steps=5, **WATCHED))
    assert done.returncode == 2
    (line,) = error_lines(done.stderr)
    assert line.startswith("error: train.freeze_router = false, but")


STEP_FIGURES = [
    *(f"moe/{name}" for name in ("load_max", "load_max_layer", "load_cv", "dead_experts", "router_entropy")),
    *(f"moe/layer_01/{name}" for name in ("load_max", "load_cv", "dead_experts", "router_entropy")),
    *(f"moe/routing_{name}" for name in ("differs", "differs_tokens", "drift", "drift_tokens")),
    *(f"policy/log_ratio_{name}" for name in ("min", "q001", "q01", "q99", "q999", "max")),
    *(f"policy/{kind}_ratio_{end}" for kind in ("token", "sequence") for end in ("min", "max")),
    *(
        f"policy/{name}"
        for name in ("entropy", "kl_old", "kl_ref", "clip_fraction_low", "clip_fraction_high")
    ),
    *("policy/ratio_effective_sample_size", "rollout/effective_sample_size", "grad_norm"),
    *("policy/router_shift", "policy/router_shift_floored", "moe/load_balancing_loss", "moe/z_loss"),
]


@pytest.mark.parametrize("replay", ["none", "policy"])
def test_rspo_with_every_figure(argv: list[str], tmp_path: Path, replay: str) -> None:
    chosen = options(
        run_dir=tmp_path,
        algorithm__loss="rspo",
        algorithm__moe_routing_replay=replay,
        algorithm__kl_coef=0.01,
        rollout__routed_experts="true",
        megatron__moe_per_layer_logging="true",
        megatron__moe_aux_loss_coeff=1e-3,
        megatron__moe_z_loss_coeff=1e-4,
        train__num_steps=3,
        checkpoint__save_final="false",
        eval__sets="{}",
        **EP2,
    )
    done = run_module("megatron_gmpo.train", *argv, *chosen, ranks=2)
    assert done.returncode == 0, done.stderr
    figures = json_lines(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in figures] == [1, 2, 3]
    for line in figures:
        assert [name for name in STEP_FIGURES if line.get(name) is None] == []
        assert 0.8 < line["policy/router_shift"] < 1  # it is 1 in the first of three updates
        assert (
            line["policy/token_ratio_min"]
            <= line["policy/sequence_ratio_min"]
            <= line["policy/sequence_ratio_max"]
        )
        assert (line["moe/routing_drift"] > 0) or line["step"] > 1
