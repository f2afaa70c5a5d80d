"""Faults injected into real runs: what the user sees, with which exit code, and what is kept.

docs/supervision.md has the table of all faults and their tests.
"""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_gmpo.errors import Exit

from ..support.commands import error_lines, options, outcome, run_module, start_module, tiny_run, wait_until
from ..support.forks import Fork
from ..support.small_disk import unwritable

pytestmark = pytest.mark.distributed

TRAIN = "megatron_gmpo.train"
_TIMEOUT_S = 240


@pytest.fixture(scope="module")
def argv(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return a run of two small steps."""
    return tiny_run(
        tiny_model("qwen3_moe", num_layers=2),
        tmp_path_factory.mktemp("problems"),
        rollout__prompts_per_step=6,
        train__minibatches_per_step=2,
        train__num_steps=2,
    )


def wait_until_held(run_dir: Path, process: Fork) -> None:
    """Wait until the rewards of a step wait for the file HOLD to disappear; without it they take 1 s."""

    def held() -> bool:
        beat = json.loads((run_dir / "heartbeats" / "rank_00000.json").read_text())
        return beat["phase"] == "rollout" and beat["time"] - beat["since"] >= 4

    wait_until(held, process, "the wait for HOLD")


# --- the user's reward --------------------------------------------------------------------------------------

REWARDS = {  # function -> (exit code, what the line says of it)
    "huge": (Exit.BAD_INPUT, "returned 1000000"),
    "exits": (Exit.FAILED, "raised SystemExit: 0"),
    "closes_stdout": (Exit.BAD_INPUT, "closed stdout"),
    "closes_the_descriptor_of_stdout": (Exit.BAD_INPUT, "closed stdout"),
}


@pytest.mark.parametrize("function", REWARDS)
def test_a_bad_reward_ends_the_run_with_the_prompt_s_id(
    function: str, argv: list[str], tmp_path: Path
) -> None:
    code, says = REWARDS[function]
    name = f"tests.support.rewards:{function}"
    done = run_module(TRAIN, *argv, *options(run_dir=tmp_path, reward__name=name))
    assert done.returncode == code, done.stderr
    (line,) = error_lines(done.stderr)
    assert done.stderr.splitlines()[-1] == line
    assert line.startswith(f"error: reward.name = '{name}' {says}")
    assert " for train/" in line
    assert "Traceback" not in done.stderr
    end = outcome(tmp_path)
    assert (end["code"], f"error: {end['reason']}", end["step"]) == (code, line, 0)


def test_a_reward_that_raises_on_one_rank_ends_all_with_its_line(argv: list[str], tmp_path: Path) -> None:
    raising = options(run_dir=tmp_path, reward__name="tests.support.rewards:raises_on_rank_1")
    done = run_module(TRAIN, *argv, *raising, ranks=2)
    (line,) = error_lines(done.stderr)  # of rank 0, which received the error of rank 1
    assert "rewards:raises_on_rank_1' raised ValueError: no verdict for train/" in line
    assert "support/rewards.py:" in line
    assert "[rank" not in done.stderr  # the prefix that torchrun adds to a rank's traceback
    end = outcome(tmp_path)
    assert (end["code"], f"error: {end['reason']}") == (Exit.FAILED, line)
    assert 'raise ValueError("no' in (tmp_path / "errors" / "rank_00001.txt").read_text()


# --- SIGINT -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [None, 2])
def test_sigint_ends_a_run_at_once_with_one_line(ranks: int | None, argv: list[str], tmp_path: Path) -> None:
    """The reward sleeps for ten minutes, which the end does not wait for."""
    run_dir, asleep = tmp_path / "run", tmp_path / "asleep"
    sleeping = options(run_dir=run_dir, reward__name="tests.support.rewards:sleeps")
    with start_module(TRAIN, *argv, *sleeping, ranks=ranks, ASLEEP=str(asleep)) as process:
        wait_until(asleep.exists, process, "the first reward")
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.wait() == (1 if ranks else Exit.INTERRUPTED)  # torchrun ends with 1
    (line,) = error_lines(said)
    assert "interrupted by SIGINT in phase rollout of step 1; the steps after the last checkpoint are" in line
    assert "[rank" not in said
    assert ranks or said.splitlines()[-1] == line
    end = outcome(run_dir)
    assert (end["code"], f"error: {end['reason']}") == (Exit.INTERRUPTED, line)


# --- the run folder -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [TRAIN, "megatron_gmpo.evaluate"])
@pytest.mark.parametrize("kind", ["file", "below a file", "dangling link"])
def test_a_run_dir_that_is_no_folder_is_refused(
    kind: str, module: str, argv: list[str], tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    run_dir = {"file": file, "below a file": file / "a" / "b", "dangling link": tmp_path / "link"}[kind]
    blamed = tmp_path / "link" if kind == "dangling link" else file
    data = argv[argv.index("--data.path") + 1]
    done = run_module(module, *argv, *options(run_dir=run_dir, eval__sets__a__path=data))
    assert done.returncode == Exit.BAD_INPUT, done.stderr
    assert error_lines(done.stderr) == [
        f"error: run_dir = '{run_dir}': {blamed} is not a folder: choose another run_dir"
    ]
    assert "Traceback" not in done.stderr
    assert file.read_text() == "precious"
    assert not (tmp_path / "gone").exists()


def test_a_run_dir_without_permission_is_refused(argv: list[str], tmp_path: Path) -> None:
    with unwritable(tmp_path / "folder") as folder:
        done = run_module(TRAIN, *argv, *options(run_dir=folder / "run"))
    assert done.returncode == Exit.BAD_INPUT, done.stderr
    (line,) = error_lines(done.stderr)
    assert line.endswith(f"{folder} cannot be written: choose another run_dir")


@pytest.mark.parametrize("step", ["in a step", "between two steps"])
def test_a_run_folder_that_disappears_ends_the_run(step: str, argv: list[str], tmp_path: Path) -> None:
    run_dir, hold = tmp_path / "run", tmp_path / "hold"
    if step == "in a step":
        reward, env = "removes_the_run_folder", {"REMOVED": str(run_dir)}
        done = run_module(
            TRAIN, *argv, *options(run_dir=run_dir, reward__name=f"tests.support.rewards:{reward}"), **env
        )
        code, said = done.returncode, done.stderr
    else:
        waiting = options(
            run_dir=run_dir,
            reward__name="tests.support.rewards:unhurried_share_of_digits",
            train__num_steps=10_000,
            checkpoint__save_interval=1,
            supervision__heartbeat_interval_s=0.2,
        )
        with start_module(TRAIN, *argv, *waiting, HOLD=str(hold)) as process:
            latest = run_dir / "checkpoints" / "latest_checkpointed_iteration.txt"
            wait_until(latest.exists, process, "the first checkpoint")
            hold.touch()
            wait_until_held(run_dir, process)
            shutil.rmtree(run_dir)
            run_dir.mkdir()  # another folder with its name
            hold.unlink()
            _, said = process.communicate(timeout=_TIMEOUT_S)
            code = process.wait()
    assert code == Exit.BAD_INPUT, said
    (line,) = error_lines(said)
    assert line == f"error: run_dir = '{run_dir}' was removed while the run used it: start the run again"
    assert said.splitlines()[-1] == line
    assert "Traceback" not in said
