"""The records of an attempt, the lock of a run folder, and the end time of a job."""

from __future__ import annotations

import argparse
import io
import json
import math
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from megatron_gmpo.config import Config
from megatron_gmpo.errors import CollectiveError, Exit, InputError, StopRequest
from megatron_gmpo.platform import start_process_group
from megatron_gmpo.supervision import attempt, signals, torchrun
from megatron_gmpo.supervision.attempt import Attempt
from megatron_gmpo.supervision.heartbeat import Heartbeat
from megatron_gmpo.supervision.lock import RunLock
from megatron_gmpo.supervision.records import Outcome, node_name, rank_file, read_outcome, write_outcome
from megatron_gmpo.supervision.stop import job_end_time

from ..support.small_disk import fill, small_disk

SEEN = Outcome(Exit.FAILED, "another rank was lost", 3, 0, "node1", 1.0, consequence=True)
CAUSE = Outcome(Exit.FAILED, "ValueError: x", 3, 1, "node2", 2.0)


def test_a_cause_replaces_a_consequence_and_nothing_else(tmp_path: Path) -> None:
    assert read_outcome(tmp_path) is None
    assert write_outcome(tmp_path, SEEN)
    assert not write_outcome(tmp_path, replace(SEEN, rank=2))
    assert write_outcome(tmp_path, CAUSE)
    assert not write_outcome(tmp_path, SEEN)
    assert not write_outcome(tmp_path, replace(CAUSE, rank=2))
    assert read_outcome(tmp_path) == CAUSE
    assert sorted(path.name for path in tmp_path.iterdir()) == ["outcome.json"]


RESET = "[../gloo/transport/tcp/pair.cc:538] Read error [10.0.0.7]:1: Connection reset by peer"


@pytest.mark.parametrize("recorded", ["in time", "never"])
def test_a_rank_that_lost_another_reports_the_kill_and_not_the_reset(
    recorded: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ranks are on nodes of their own. torchrun on the other node records the kill a little later."""
    for name, value in {"RANK": "0", "LOCAL_WORLD_SIZE": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(attempt, "_CAUSE_S", 20.0 if recorded == "in time" else 0.3)
    kill = Outcome(Exit.FAILED, "rank 1 on node2 was killed by SIGKILL", 3, 1, "node2", 2.0)
    cfg = Config.model_validate({"run_dir": str(tmp_path), "supervision": {"node_check": False}})
    later = threading.Timer(0.5, write_outcome, (tmp_path, kill))

    def lose_the_other() -> None:
        with Attempt(cfg) as one:
            one.start(torch.device("cpu"), 0, "")
            if recorded == "in time":
                later.start()
            raise RuntimeError(RESET)

    with pytest.raises(CollectiveError) as error:
        lose_the_other()
    outcome = read_outcome(tmp_path)
    assert outcome
    assert outcome.reason == str(error.value)
    if recorded == "in time":
        assert outcome == kill
    else:
        assert outcome.consequence
        assert "a collective with other ranks failed (RuntimeError: Read error" in outcome.reason


def test_one_of_the_ranks_that_end_together_writes(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        written = list(pool.map(lambda rank: write_outcome(tmp_path, replace(CAUSE, rank=rank)), range(64)))
    assert sum(written) == 1
    assert read_outcome(tmp_path) == replace(CAUSE, rank=written.index(True))


def test_a_run_folder_has_one_holder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURMD_NODENAME", "node3")
    first = RunLock(tmp_path)
    first.sign()
    monkeypatch.setenv("SLURM_JOB_ID", "18")
    with pytest.raises(
        InputError,
        match=rf"is in use by process {os.getpid()} of job 17 on node3 since 20\d\d-.*: "
        r"wait for its end, or ",
    ):
        RunLock(tmp_path)
    first.release()
    RunLock(tmp_path).release()


def test_a_requeued_job_waits_for_its_last_attempt_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    last = RunLock(tmp_path)
    last.sign()
    released = threading.Timer(0.5, last.release)
    released.start()
    RunLock(tmp_path).release()
    assert not released.is_alive()


def test_a_fork_does_not_hold_the_lock(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    fork = multiprocessing.get_context("fork")
    is_up = fork.Event()
    child = fork.Process(target=lambda: (is_up.set(), time.sleep(60)))
    child.start()
    try:
        assert is_up.wait(60)
        lock._file.close()  # like the end of this process, this closes the file without unlocking it
        RunLock(tmp_path).release()
    finally:
        child.kill()
        child.join()


def test_the_end_of_the_job_comes_from_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert job_end_time() == math.inf  # there is no job
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert job_end_time() == math.inf  # squeue does not exist
    squeue = tmp_path / "squeue"
    for answer, end in (
        ("2026-11-21T17:00:00", datetime(2026, 11, 21, 17).timestamp()),
        ("N/A", math.inf),
        ("", math.inf),
    ):
        squeue.write_text(f'#!/bin/sh\n[ "$*" = "--noheader --job 17 --format %e" ] && echo {answer}\n')
        squeue.chmod(0o755)
        assert job_end_time() == end
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1795280401")
    assert job_end_time() == 1795280401.0


def ends_with_a_child(told: Connection) -> None:
    # outlives the test unless its parent ends it
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
    child.start()
    told.send(child.pid)
    signals.exit_with_children(Exit.HUNG)


def test_a_rank_that_ends_at_once_ends_its_writers_first() -> None:
    """os._exit alone would leave them: multiprocessing ends its children in an exit handler."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    rank = multiprocessing.get_context("fork").Process(target=ends_with_a_child, args=(theirs,))
    rank.start()
    child = ours.recv()
    rank.join(60)
    assert rank.exitcode == Exit.HUNG
    deadline = time.monotonic() + 60
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the child outlives its rank"
        time.sleep(0.01)  # a killed process does not end at once


@pytest.mark.parametrize("folder", ["errors", "stacks"])
def test_a_crash_is_recorded_although_its_traceback_cannot_be_written(folder: str, tmp_path: Path) -> None:
    cfg = Config.model_validate({"run_dir": str(tmp_path), "supervision": {"node_check": False}})

    def crash(disk: Path) -> None:
        with Attempt(cfg) as one:
            one.start(torch.device("cpu"), 0, "")
            fill(disk)
            assert one._heartbeat
            one._heartbeat.dump_stacks()
            raise ZeroDivisionError("division by zero")

    with small_disk(tmp_path / folder, "64k") as disk, pytest.raises(ZeroDivisionError):
        crash(disk)
    found = read_outcome(tmp_path)
    assert found
    assert found.code == Exit.FAILED
    assert found.reason.endswith("in phase start of step 1: ZeroDivisionError: division by zero")


def test_each_fault_of_the_docs_names_tests_that_exist() -> None:
    root = Path(__file__).parents[2]
    faults = (root / "docs/supervision.md").read_text().partition("\n## Faults\n")[2].partition("\n## ")[0]
    rows = [line for line in faults.splitlines() if line.startswith("| ") and "---" not in line]
    rows = [row for row in rows if not row.startswith("| fault |")]
    tests = "".join(file.read_text() for file in (root / "tests").rglob("test_*.py"))
    defined = set(re.findall(r"^def (test_\w+)\(", tests, re.MULTILINE))
    assert len(rows) > 20
    for row in rows:
        named = set(re.findall(r"`(test_\w+)`", row))
        assert named, row
        assert named <= defined, row


# --- torchrun ---


def failure_of(exitcode: int, line: str, folder: Path) -> ProcessFailure:
    """Return what torchrun knows of a rank with this exit code and, if any, this line in its error file."""
    file = folder / "error.json"
    if line:
        file.write_text(json.dumps({"message": {"message": line, "extraInfo": {"timestamp": 1}}}))
    return ProcessFailure(local_rank=1, pid=7, exitcode=exitcode, error_file=str(file))


@pytest.mark.parametrize(
    ("exitcode", "line", "code", "last"),
    [
        (2, "error: bad", Exit.BAD_INPUT, None),  # the rank has printed its line
        (1, "error: crashed", Exit.FAILED, None),
        (Exit.REQUEUE, "", Exit.FAILED, None),
        (Exit.INTERRUPTED, "", Exit.FAILED, None),
        (3, "", Exit.FAILED, r"error: rank 1 on \S+ ended with exit code 3; its output is above\n"),
        (-9, "", Exit.FAILED, r"error: rank 1 on \S+ was killed by SIGKILL, as the kernel's .* dmesg .*\n"),
        (-11, "", Exit.FAILED, r"error: rank 1 on \S+ was killed by SIGSEGV\n"),
    ],
)
def test_our_torchrun_explains_what_no_rank_has_explained(
    exitcode: int,
    line: str,
    code: Exit,
    last: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(options: argparse.Namespace) -> None:
        raise ChildFailedError("train", {1: failure_of(exitcode, line, tmp_path)})

    monkeypatch.setattr(torchrun.run, "run", fail)
    options = ["--nproc-per-node", "2", "-m", "megatron_gmpo.train", "--run_dir", str(tmp_path)]
    with pytest.raises(SystemExit) as exit_:
        torchrun.main(options)
    assert exit_.value.code == code
    said = capsys.readouterr().err
    assert re.fullmatch(last or "", said)
    outcome = read_outcome(tmp_path)
    if exitcode < 0:
        assert outcome
        assert said == f"error: {outcome.reason}\n"
        assert (outcome.rank, outcome.code) == (1, Exit.FAILED)
    else:
        assert outcome is None


def test_a_rank_whose_process_is_gone_is_named(tmp_path: Path) -> None:
    (tmp_path / "heartbeats").mkdir()
    (tmp_path / "stacks").mkdir()
    gone = subprocess.Popen(["true"])
    os.waitid(os.P_PID, gone.pid, os.WEXITED | os.WNOWAIT)  # a zombie, as before torchrun has reaped it
    for rank, pid, phase, node in (
        (1, gone.pid, "train", node_name()),
        (2, gone.pid, "end", node_name()),  # has ended regularly
        (3, gone.pid, "train", "other"),  # this node cannot know
        (4, os.getpid(), "train", node_name()),
    ):
        beat = {"rank": rank, "pid": pid, "phase": phase, "node": node}
        rank_file(tmp_path, "heartbeats", rank, ".json").write_text(json.dumps(beat))
    heartbeat = Heartbeat(tmp_path, 0, 60.0, 600.0, lambda reason: None)
    zombie = heartbeat.lost_ranks()
    gone.wait()
    assert zombie == heartbeat.lost_ranks()
    assert re.fullmatch(
        rf"rank 1 \(process {gone.pid}\) on \S+ ended without a message, .* dmesg\); ", zombie
    )
    heartbeat.stop()


def test_a_request_to_stop_says_what_it_waits_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(signals, "received", signal.SIGTERM)  # during the imports
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "45")
    cfg = Config.model_validate({"run_dir": str(tmp_path), "supervision": {"node_check": False}})
    start_process_group(torch.device("cpu"), 60)

    def stop() -> None:
        with Attempt(cfg) as one:
            one.start(torch.device("cpu"), 0, "")
            assert capsys.readouterr().err == (
                "SIGTERM in phase start of step 1: saving and ending before the next step; "
                "a step takes an unknown time; torchrun kills the ranks 45 s after the signal "
                "(TORCH_ELASTIC_SHUTDOWN_TIMEOUT)\n"
            )
            one._vote._steps.extend([2.0, 12.4])
            one.wrote_checkpoint(3.2)
            monkeypatch.delenv("TORCHELASTIC_RUN_ID")
            signals.on_request(signal.SIGUSR1)
            assert capsys.readouterr().err == (
                "SIGUSR1 in phase start of step 1: saving and ending before the next step; "
                "a step takes up to 12 s and a save 3 s\n"
            )
            with monkeypatch.context() as patch:
                full: Any = io.FileIO("/dev/full", "w")
                patch.setattr(sys, "stderr", io.TextIOWrapper(full, write_through=True))
                signals.on_request(signal.SIGUSR1)  # an error would end the thread that waits for signals
            assert one.stops(0)

    with pytest.raises(StopRequest):
        stop()
    dist.destroy_process_group()


def test_a_rank_that_torchrun_ends_does_not_promise_to_save() -> None:
    """torchrun sends SIGTERM when another rank has failed; here it has fewer children than ranks."""
    code = (
        "import os, signal, time; from megatron_gmpo.supervision import signals; "
        "signals.on_request = lambda number: os.write(1, b'saving'); "
        "signals.before_exit = lambda reason: os.write(1, reason.encode()); "
        "signals.listen(); os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)"
    )
    env = os.environ | {"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "1000"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
    assert done.stdout == "ended by torchrun, because another rank of this node has ended", done.stderr
    assert done.returncode == 1


def test_torchrun_that_ignores_a_signal_sets_no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """launch.sh starts torchrun so; the child of this shell has such a parent."""
    code = "import signal; from megatron_gmpo.supervision.signals import torchrun_limit_s as limit; "
    code += "print(limit(signal.SIGTERM), limit(signal.SIGINT))"
    shell = f"trap '' TERM; {sys.executable} -c '{code}'; true"
    env = os.environ | {"TORCHELASTIC_RUN_ID": "x", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "7"}
    done = subprocess.run(["bash", "-c", shell], env=env, capture_output=True, text=True, timeout=60)
    assert done.stdout == "None 7.0\n", done.stderr
