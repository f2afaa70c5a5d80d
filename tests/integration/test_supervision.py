"""Runs that are stopped, hang, crash or are refused leave correct records and lose no work."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_gmpo.errors import Exit

from ..support.commands import (
    OUR_TORCHRUN,
    error_lines,
    json_lines,
    options,
    outcome,
    run_module,
    start_module,
    tiny_run,
    wait_until,
)
from ..support.forks import TORCHRUN, Fork

pytestmark = pytest.mark.distributed

TRAIN = "megatron_gmpo.train"
STEPS = 12
_TIMEOUT_S = 240
QUICK = {
    "supervision__heartbeat_interval_s": 0.5,
    "supervision__hang_timeout_s": 20,
    "train__num_steps": STEPS,
}


@pytest.fixture(scope="module")
def argv(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return a run of small steps whose hangs are found soon."""
    return tiny_run(
        tiny_model("qwen3_moe", num_layers=2),
        tmp_path_factory.mktemp("problems"),
        rollout__prompts_per_step=6,
        train__minibatches_per_step=2,
        optimizer__lr=1e-3,
        **QUICK,
    )


def started(argv: list[str], **env: str) -> Fork:
    """Start two ranks under torchrun; the end of the context kills all processes."""
    return start_module(TRAIN, *argv, ranks=2, **env)


def wait_for_step(run_dir: Path, step: int, process: Fork) -> None:
    file = run_dir / "metrics.jsonl"
    reached = lambda: file.exists() and len(file.read_text().splitlines()) >= step  # noqa: E731
    wait_until(reached, process, f"step {step}")


def heartbeat(run_dir: Path, rank: int) -> dict[str, Any]:
    return json.loads((run_dir / "heartbeats" / f"rank_{rank:05d}.json").read_text())


def events(run_dir: Path) -> list[str]:
    return [line["event"] for line in json_lines(run_dir / "events.jsonl")]


def figures(run_dir: Path) -> list[dict[str, Any]]:
    lines = json_lines(run_dir / "metrics.jsonl")
    return [
        {name: value for name, value in line.items() if not name.startswith(("time/", "throughput/"))}
        for line in lines
    ]


def newest_checkpoint(run_dir: Path) -> int:
    return int((run_dir / "checkpoints" / "latest_checkpointed_iteration.txt").read_text())


def test_a_run_stopped_three_times_equals_an_undisturbed_one(argv: list[str], tmp_path: Path) -> None:
    stopped, undisturbed = tmp_path / "stopped", tmp_path / "undisturbed"
    done = run_module(TRAIN, *argv, *options(run_dir=undisturbed), ranks=2)
    assert done.returncode == 0, done.stderr
    assert outcome(undisturbed)["code"] == Exit.DONE
    assert heartbeat(undisturbed, 1)["phase"] == "end"

    command = [*argv, *options(run_dir=stopped)]
    reached = 0
    for number in (signal.SIGUSR1, signal.SIGTERM):
        with started(command) as torchrun:
            wait_for_step(stopped, reached + 2, torchrun)
            torchrun.send_signal(number)
            _, said = torchrun.communicate(timeout=_TIMEOUT_S)
        end = outcome(stopped)
        assert (end["code"], end["rank"]) == (Exit.REQUEUE, 0), said
        assert reached < end["step"] < STEPS
        assert newest_checkpoint(stopped) == len(figures(stopped)) == end["step"]
        (line,) = [line for line in said.splitlines() if line.startswith(f"{number.name} in phase")]
        assert re.search(
            rf"of step {end['step']}: saving and ending before the next step; a step takes up to \d+ s", line
        )
        assert line.endswith(
            "torchrun kills the ranks 30 s after the signal (TORCH_ELASTIC_SHUTDOWN_TIMEOUT)"
        )
        (line,) = [line for line in said.splitlines() if "start the same command to go on" in line]
        assert line == end["reason"]
        assert f"stopped by {number.name} after {end['step']} of {STEPS} steps" in line
        assert events(stopped)[-3:] == ["stop_requested", "checkpoint", "saved_for_requeue"]
        reached = end["step"]

    # a job without time for another step stops immediately and saves no new checkpoint
    over = run_module(TRAIN, *command, ranks=2, SLURM_JOB_END_TIME=str(int(time.time())))
    assert over.returncode != 0, over.stderr
    assert outcome(stopped)["reason"].startswith(
        f"stopped by the job's time limit after {reached} of {STEPS} steps"
    )
    assert events(stopped)[-3:] == ["resume", "stop_requested", "saved_for_requeue"]

    done = run_module(TRAIN, *command, ranks=2)
    assert done.returncode == 0, done.stderr
    assert outcome(stopped)["code"] == Exit.DONE
    assert figures(stopped) == figures(undisturbed)
    assert [line["step"] for line in figures(stopped)] == list(range(1, STEPS + 1))


def test_a_reward_that_never_returns_is_named(argv: list[str], tmp_path: Path) -> None:
    hanging = options(run_dir=tmp_path, reward__name="tests.support.rewards:sleeps_on_rank_1")
    done = run_module(TRAIN, *argv, *hanging, ranks=2, TORCH_ELASTIC_SHUTDOWN_TIMEOUT="10")
    assert done.returncode != 0
    end = outcome(tmp_path)
    assert (end["code"], end["rank"]) == (Exit.HUNG, 1), done.stderr
    assert "rank 1" in end["reason"]
    assert "in phase rollout of step 1" in end["reason"]
    assert error_lines(done.stderr) == [f"error: {end['reason']}"]
    assert "in sleeps_on_rank_1" in (tmp_path / "stacks" / "rank_00001.txt").read_text()
    # The other rank shows where it waited: in its traceback, or in its stacks if SIGTERM from torchrun came
    # first.
    assert any(
        "in score" in (tmp_path / folder / "rank_00000.txt").read_text() for folder in ("errors", "stacks")
    )
    assert events(tmp_path)[-1] == "hang"


def test_a_stopped_rank_is_named_by_the_others(argv: list[str], tmp_path: Path) -> None:
    """A second run on the same folder is refused while the first is active."""
    with started(
        [*argv, *options(run_dir=tmp_path, train__num_steps=10_000)], TORCH_ELASTIC_SHUTDOWN_TIMEOUT="3"
    ) as torchrun:
        wait_for_step(tmp_path, 1, torchrun)
        second = run_module(TRAIN, *argv, *options(run_dir=tmp_path))
        os.kill(heartbeat(tmp_path, 1)["pid"], signal.SIGSTOP)
        _, said = torchrun.communicate(timeout=_TIMEOUT_S)
    assert second.returncode == Exit.BAD_INPUT
    (line,) = error_lines(second.stderr)
    holder = json_lines(tmp_path / "run.lock")[0]
    assert (
        f"is in use by process {holder['pid']} on {holder['node']} since {holder['start']}: wait for its end"
        in line
    )
    end = outcome(tmp_path)
    assert (end["code"], end["rank"]) == (Exit.HUNG, 0), said
    assert "rank 1 on " in end["reason"]
    assert "has given no heartbeat for" in end["reason"]
    assert (tmp_path / "stacks" / "rank_00000.txt").read_text()


def test_a_collective_that_times_out_names_the_place(argv: list[str], tmp_path: Path) -> None:
    hanging = options(
        run_dir=tmp_path,
        reward__name="tests.support.rewards:sleeps_on_rank_1",
        distributed_timeout_s=15,
        supervision__hang_timeout_s=600,
    )
    done = run_module(TRAIN, *argv, *hanging, ranks=2, TORCH_ELASTIC_SHUTDOWN_TIMEOUT="10")
    end = outcome(tmp_path)
    assert (end["code"], end["rank"]) == (Exit.HUNG, 0), done.stderr
    (line,) = error_lines(done.stderr)
    assert "in phase rollout of step 1: a collective with other ranks failed" in line
    assert "Timed out waiting" in line
    assert "[rank" not in done.stderr  # the prefix that torchrun adds to a rank's traceback
    assert "in score" in (tmp_path / "errors" / "rank_00000.txt").read_text()
    assert (
        "in sleeps_on_rank_1" in (tmp_path / "stacks" / "rank_00001.txt").read_text()
    )  # torchrun ended this rank


def test_a_crash_is_recorded_by_the_rank_that_crashed(argv: list[str], tmp_path: Path) -> None:
    crashing = options(run_dir=tmp_path, algorithm__loss="tests.support.losses:crashes_on_rank_1")
    done = run_module(TRAIN, *argv, *crashing, ranks=2)
    assert done.returncode != 0
    end = outcome(tmp_path)
    assert (end["code"], end["rank"]) == (Exit.FAILED, 1), done.stderr
    assert end["reason"].endswith("in phase train of step 1: ZeroDivisionError: division by zero")
    assert "crashes_on_rank_1" in (tmp_path / "errors" / "rank_00001.txt").read_text()


@pytest.mark.parametrize("launcher", [TORCHRUN, OUR_TORCHRUN])
def test_a_rank_that_is_killed_is_named(launcher: str, argv: list[str], tmp_path: Path) -> None:
    endless = options(run_dir=tmp_path, train__num_steps=10_000)
    with start_module(
        TRAIN, *argv, *endless, ranks=2, launcher=launcher, TORCH_ELASTIC_SHUTDOWN_TIMEOUT="600"
    ) as torchrun:
        wait_for_step(tmp_path, 1, torchrun)
        killed = heartbeat(tmp_path, 0)["pid"]
        os.kill(killed, signal.SIGKILL)
        _, said = torchrun.communicate(timeout=_TIMEOUT_S)
    end, node = outcome(tmp_path), heartbeat(tmp_path, 0)["node"]
    assert end["code"] == Exit.FAILED, said
    seen = (
        f"error: rank 0 (process {killed}) on {node} ended without a message, as after a kill by the kernel"
    )
    lines = [line for line in error_lines(said) if line.startswith(seen)]
    assert len(lines) == 1, said
    (line,) = lines
    if launcher == TORCHRUN:
        assert f"error: {end['reason']}" == line
        assert "another rank of this node has ended" in line or "a collective with other ranks failed" in line
    else:
        assert end["reason"].startswith(
            f"rank 0 on {node} was killed by SIGKILL, as the kernel's out-of-memory"
        )
        assert said.splitlines()[-1] == f"error: {end['reason']}"


def test_a_bad_node_is_named(argv: list[str], tmp_path: Path) -> None:
    wanting = options(run_dir=tmp_path, supervision__node_check="true", supervision__min_free_memory_gb=1e9)
    done = run_module(TRAIN, *argv, *wanting, ranks=2)
    assert done.returncode != 0
    end = outcome(tmp_path)
    assert end["code"] == Exit.BAD_NODE
    assert error_lines(done.stderr) == [f"error: {end['reason']}"]
    node = heartbeat(tmp_path, 0)["node"]
    assert end["reason"].startswith(f"node {node}: ")
    assert end["reason"].endswith(" GB of memory are available, supervision.min_free_memory_gb = 1e+09")
    assert not (tmp_path / "metrics.jsonl").exists()


def test_bad_input_leaves_an_outcome_where_there_was_a_run(argv: list[str], tmp_path: Path) -> None:
    (tmp_path / "outcome.json").write_text('{"code": 85}')
    done = run_module(TRAIN, *argv, *options(run_dir=tmp_path, algorithm__loss="gmp"))
    assert done.returncode == Exit.BAD_INPUT
    assert outcome(tmp_path)["code"] == Exit.BAD_INPUT
    assert error_lines(done.stderr) == [f"error: {outcome(tmp_path)['reason']}"]
