"""After an attempt, a Slurm job restarts or ends with a reason."""

from __future__ import annotations

import json
import stat
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_gmpo.commands import slurm_attempt
from megatron_gmpo.errors import Exit, InputError, RunError, disk_full
from megatron_gmpo.supervision.records import LATEST, OUTCOME, Outcome
from megatron_gmpo.supervision.slurm_attempts import read_attempts

from ..support.small_disk import fill, small_disk


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, value in (("SLURM_JOB_ID", "7"), ("MAX_RESTARTS", "4"), ("MAX_CRASHES", "2")):
        monkeypatch.setenv(name, value)
    return tmp_path / "run"


@pytest.fixture
def one(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[Exit, str, str]]:
    """Return ``one(code, reason, saved=step)``, which runs one attempt.

    It returns exit code, stdout and stderr of ``end``.
    """

    def one(
        code: int | None,
        reason: str = "why",
        *,
        saved: int | None = None,
        node: str = "node1",
        status: int = 1,
    ) -> tuple[Exit, str, str]:
        begin(run_dir)
        if saved is not None:
            save(run_dir, saved)
        if code is not None:
            (run_dir / OUTCOME).write_text(
                json.dumps(Outcome(code, reason, 0, 0, node, time.time()).__dict__)
            )
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            slurm_attempt.main(["end", str(run_dir), str(status)])
        printed = capsys.readouterr()
        return Exit(int(ended.value.code or 0)), printed.out, printed.err

    return one


def begin(run_dir: Path, *options: str) -> None:
    slurm_attempt.main(["begin", "--run_dir", str(run_dir), *options])


def save(run_dir: Path, step: int) -> None:
    (run_dir / "checkpoints").mkdir(exist_ok=True)
    (run_dir / "checkpoints" / "latest_checkpointed_iteration.txt").write_text(str(step))


One = Callable[..., tuple[Exit, str, str]]


def test_a_job_that_makes_progress_is_requeued_until_it_is_done(one: One, run_dir: Path) -> None:
    assert one(85, "stopped by SIGUSR1", saved=3)[0] == 85
    code, out, err = one(1, "rank 1 on node2: boom", saved=5)
    assert (code, out) == (85, "")
    assert "attempt 2: rank 1 on node2: boom\n" in err
    assert err.endswith("it may be tried again from step 5: restart 2 of 4, 1 of 2 after a crash\n")
    code, out, err = one(0, "all steps are done", saved=9, status=0)
    assert (code, out) == (0, "")
    assert err.endswith("done: 9 steps are saved\n")
    assert [(a.attempt, a.job, a.checkpoint_step, a.code) for a in read_attempts(run_dir)] == [
        (1, "7", 0, 85),
        (2, "7", 3, 1),
        (3, "7", 5, 0),
    ]
    restarts = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    assert [(event["event"], event["attempt"], event["step"]) for event in restarts] == [
        ("restart", 2, 3),
        ("restart", 3, 5),
    ]


@pytest.mark.parametrize("code", [Exit.BAD_INPUT, Exit.COLLAPSED])
def test_a_failure_that_a_restart_cannot_fix_ends_the_job(code: Exit, one: One) -> None:
    result, _, err = one(code, "choose another", saved=3)
    assert result == code
    assert err.endswith("error: choose another\n")


def test_two_attempts_without_a_newer_checkpoint_are_enough(one: One, run_dir: Path) -> None:
    assert one(85, saved=3)[0] == 85
    assert one(85, saved=3)[0] == 85
    code, _, err = one(85, "stopped by SIGUSR1", saved=3)
    assert code == Exit.FAILED
    assert (
        "error: two attempts in a row have left no checkpoint after step 3; "
        "the last attempt: stopped by SIGUSR1\n" in err
    )
    # Slurm could have requeued the job.
    with pytest.raises(RunError, match=r"^two attempts in a row have left no checkpoint after step 3; "):
        begin(run_dir)


def test_preemptions_do_not_count_as_attempts_without_progress(one: One, run_dir: Path) -> None:
    for _ in range(2):
        begin(run_dir)  # Slurm ended it before it recorded a reason
    assert one(1)[0] == 85
    begin(run_dir)
    code, _, err = one(1)
    assert code == 1
    assert "two attempts in a row have left no checkpoint after step 0" in err


def test_crashes_and_restarts_have_limits(one: One) -> None:
    assert [one(code, saved=step)[0] for step, code in enumerate((1, 86), start=1)] == [85, 85]
    code, _, err = one(1, saved=3)
    assert code == 1
    assert (
        "error: the job has been started again after 2 crashes, MAX_CRASHES; the last attempt: why\n" in err
    )


def test_restarts_have_a_limit(one: One) -> None:
    assert [one(85, saved=step)[0] for step in range(1, 6)] == [85, 85, 85, 85, 1]


def test_a_new_job_counts_from_zero(one: One, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(2):
        last = one(1)[0]
    assert last == 1
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    assert one(1)[0] == 85
    assert [(a.attempt, a.job) for a in read_attempts(run_dir)] == [(1, "7"), (2, "7"), (1, "8")]


def test_a_bad_node_is_named_to_the_launcher(one: One) -> None:
    assert one(87, "node node5: no GPU", node="node5")[:2] == (85, "node5\n")
    assert one(87, "node node6: no GPU", node="node6")[:2] == (87, "")


def test_an_attempt_without_an_outcome(one: One, run_dir: Path) -> None:
    begin(run_dir)  # the node was lost
    code, _, err = one(None, status=143)
    assert code == 85
    assert (
        f"attempt 2: the trainers ended with exit code 143 and without a reason: see {run_dir / 'logs'}"
        in err
    )
    first, second = read_attempts(run_dir)
    assert (first.code, first.reason) == (None, "ended by Slurm: a preemption or a failed node")
    assert second.code == 1


def test_the_outcome_of_an_earlier_attempt_is_not_this_ones(one: One, run_dir: Path) -> None:
    assert one(2, "old")[0] == 2
    assert one(None, status=85, saved=1)[0] == 85


def test_a_run_folder_of_a_running_job_is_refused(
    one: One, run_dir: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    begin(run_dir)
    squeue = tmp_path / "squeue"
    squeue.write_text('#!/bin/sh\n[ "$*" = "--noheader --job 7 --format %T" ] && echo RUNNING\n')
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    with pytest.raises(InputError, match="is in use by job 7"):
        begin(run_dir)
    squeue.write_text("#!/bin/sh\n")
    begin(run_dir)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with pytest.raises(SystemExit):
        slurm_attempt.main(["end", str(run_dir), "0"])
    # Each job records its own attempt.
    assert [(a.job, a.code) for a in read_attempts(run_dir)] == [
        ("7", 0),
        ("8", None),
    ]


def test_keys_are_drawn_for_each_attempt_and_private(run_dir: Path) -> None:
    keys = []
    for _ in range(2):
        begin(run_dir, "--rollout.engine", "sglang")
        file = run_dir / "server_keys.json"
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        keys.append(json.loads(file.read_text()))
    assert len({*keys[0].values(), *keys[1].values()}) == 4


def test_bad_limits_and_configs_are_refused(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"config file nowhere\.toml does not exist"):
        slurm_attempt.main(["begin", "nowhere.toml"])
    monkeypatch.setenv("MAX_CRASHES", "many")
    begin(run_dir)
    with pytest.raises(InputError, match="MAX_CRASHES = 'many' is not a number"):
        begin(run_dir)


def test_a_full_disk_is_no_reason_to_try_again(one: One, run_dir: Path) -> None:
    """Trainers that cannot write an outcome end with code 2, and a job that cannot write its records ends."""
    code, out, err = one(None, status=Exit.BAD_INPUT)
    assert (code, out) == (Exit.BAD_INPUT, "")
    assert err.splitlines()[-1].endswith(
        f"error: the trainers ended with exit code 2 and without a reason: see {run_dir / 'logs'}"
    )
    with small_disk(run_dir, "64k"):
        begin(run_dir)
        fill(run_dir)
        for argv in (["end", str(run_dir), "1"], ["begin", "--run_dir", str(run_dir)]):
            with pytest.raises(OSError, match="No space left") as full:
                slurm_attempt.main(argv)
            assert str(disk_full(full.value)).startswith(f"the file system {run_dir} is full")


@pytest.mark.parametrize("content", ["", "release", "iter_0000002"])
def test_a_pointer_that_names_no_step_counts_as_none(content: str, one: One, run_dir: Path) -> None:
    begin(run_dir)
    (run_dir / "checkpoints").mkdir()
    (run_dir / "checkpoints" / LATEST).write_text(content)
    assert one(Exit.BAD_INPUT)[0] == Exit.BAD_INPUT
