"""Jobs on a real Slurm cluster of two emulated nodes.

They train, are interrupted in every way, continue, and report why they end.
"""

from __future__ import annotations

import json
import re
import stat
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_gmpo.supervision.slurm_attempts import AttemptRecord, checkpoint_step, read_attempts
from megatron_gmpo.testing.arithmetic import write_addition_problems

from ..support.commands import json_lines, options
from ..support.sglang_servers import PYTHON, needs_sglang
from ..support.slurm_cluster import SlurmCluster, needs_slurm

pytestmark = [
    needs_slurm,
    pytest.mark.slurm,
    pytest.mark.slow,
    pytest.mark.distributed,
    pytest.mark.timeout(1800),
]

ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")
STEPS = 16
_LIMIT_S = 900.0


@dataclass
class Job:
    """Submitted job with its main log and its run folder."""

    cluster: SlurmCluster
    id: int
    log: Path
    run_dir: Path

    def wait(self, *states: str) -> dict[str, str]:
        return self._or_log(lambda: self.cluster.wait(self.id, states, _LIMIT_S))

    def end(self) -> tuple[int, str]:
        """Wait for the job to end; return exit code and main log."""
        job = self.wait(*ENDED)
        return int(job["ExitCode"].split(":")[0]), self.log.read_text()

    def wait_for_progress(self) -> None:
        """Wait until the running attempt has saved a checkpoint."""

        def progress() -> bool:
            assert self.cluster.state(self.id) not in ENDED, "the job has ended"
            last = self.attempts[-1:]
            return any(
                attempt.code is None and checkpoint_step(self.run_dir) > attempt.checkpoint_step
                for attempt in last
            )

        self._or_log(lambda: self.cluster.until(progress, _LIMIT_S))

    def wait_for_attempt(self, number: int) -> None:
        self._or_log(lambda: self.cluster.until(lambda: len(self.attempts) >= number, _LIMIT_S))

    def wait_for_log(self, words: str, times: int) -> None:
        """Wait until ``times`` lines of the main log begin with ``words`` after their time stamp."""
        line = re.compile(rf"^\[[^]]*] {words}", re.MULTILINE)
        self._or_log(
            lambda: self.cluster.until(lambda: len(line.findall(self.log.read_text())) >= times, _LIMIT_S)
        )

    @property
    def attempts(self) -> list[AttemptRecord]:
        return read_attempts(self.run_dir)

    def _or_log(self, wait: Callable[[], Any]) -> Any:
        try:
            return wait()
        except Exception:
            for file in (self.log, *sorted((self.run_dir / "logs").glob("*")), self.run_dir / "outcome.json"):
                print(
                    f"--- {file.name}\n"
                    f"{file.read_text(errors='replace')[-6000:] if file.exists() else 'is not there'}"
                )
            print(self.cluster.run("squeue", "--all", check=False))
            raise


Submit = Callable[..., Job]


@pytest.fixture(scope="module")
def jobs(
    tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[SlurmCluster], Submit]:
    """Return ``submit(name, script, *arguments, sbatch=[...])`` for a cluster.

    ``submit`` runs a script of examples/moe, or a command line, on a tiny random model.
    """
    folder = tmp_path_factory.mktemp("jobs")
    write_addition_problems(folder)
    small = options(
        model__path=tiny_model("qwen3_moe", num_layers=2),
        data__path=folder / "train.jsonl",
        data__max_prompts=40,
        eval__sets="{}",
        reward__name="tests.support.rewards:unhurried_share_of_digits",
        rollout__prompts_per_step=4,
        rollout__samples_per_prompt=4,
        train__num_steps=STEPS,
        train__minibatches_per_step=2,
        checkpoint__save_interval=1,
        optimizer__lr=1e-3,
        log__tensorboard="false",
        supervision__stop_margin_s=30,
    )

    def jobs_on(cluster: SlurmCluster) -> Submit:
        def submit(
            name: str, script: str, *arguments: object, sbatch: tuple[str, ...] = (), **chosen: object
        ) -> Job:
            run_dir, log = folder / name, folder / f"{name}.out"
            what = [script] if script.endswith(".sbatch") else ["--wrap", f"exec {script}"]
            argv = [*small, *options(run_dir=run_dir), *arguments] if script.endswith(".sbatch") else []
            answer = cluster.run(
                "sbatch",
                "--parsable",
                f"--output={log}",
                *sbatch,
                *what,
                *argv,
                env={"PYTHON": sys.executable, **chosen},
            )
            return Job(cluster, int(answer.splitlines()[-1]), log, run_dir)

        return submit

    return jobs_on


@pytest.fixture(scope="module")
def submit(
    jobs: Callable[[SlurmCluster], Submit], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Submit]:
    cluster = SlurmCluster(tmp_path_factory.mktemp("slurm") / "c")
    yield jobs(cluster)
    cluster.stop()


@pytest.fixture(scope="module")
def disturbed(
    jobs: Callable[[SlurmCluster], Submit], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Future[Job]]:
    """Run a job that is interrupted in every way, on a separate cluster in parallel with the other tests.

    The job mostly waits for Slurm.
    """
    folder = tmp_path_factory.mktemp("slurm")
    cluster = SlurmCluster(folder / "c")
    with ThreadPoolExecutor(1) as executor:
        yield executor.submit(disturb, jobs(cluster), folder / "hold")
        cluster.stop()


@pytest.fixture(scope="module")
def undisturbed(submit: Submit, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Return a finished run on two nodes; a second submission to its run folder was refused while it ran."""
    hold = tmp_path_factory.mktemp("slurm") / "hold"
    job = submit("undisturbed", "examples/moe/tiny.sbatch", HOLD=str(hold))
    job.wait_for_progress()
    hold.touch()
    second = submit("undisturbed", "examples/moe/tiny.sbatch", sbatch=(f"--output={job.log}.second",))
    second.log = Path(f"{job.log}.second")
    code, log = second.end()
    hold.unlink()
    assert code == 2
    assert re.search(
        rf"error: run_dir = .* is in use by process \d+ of job {job.id} on node1 since .*: wait for its end",
        log,
    ), log
    assert len(_errors(log)) == 1
    code, log = job.end()
    assert code == 0, log
    return job


def disturb(submit: Submit, hold: Path) -> Job:
    job = submit("disturbed", "examples/moe/tiny.sbatch", sbatch=("--signal=B:USR1@179",), HOLD=str(hold))
    cluster = job.cluster

    job.wait_for_progress()
    cluster.run("scancel", "--signal=USR1", "--batch", job.id)
    job.wait_for_attempt(2)

    job.wait_for_progress()
    hold.touch()
    minutes = int(cluster.job(job.id)["RunTime"].split(":")[1])
    cluster.run("scontrol", "update", f"JobId={job.id}", f"TimeLimit={minutes + 3}")
    job.wait_for_log("SIGUSR1", times=2)  # Slurm checks time limits twice a minute
    hold.unlink()
    job.wait("PENDING")
    cluster.run("scontrol", "update", f"JobId={job.id}", "TimeLimit=30")
    job.wait_for_attempt(3)

    job.wait_for_progress()
    (victim,) = [
        process
        for process in cluster.processes("node2")
        if process.environ().get("RANK") == "1" and _is_rank(process)
    ]
    victim.kill()
    job.wait_for_attempt(4)

    job.wait_for_progress()
    hold.touch()
    important = submit("important", "sleep 2", sbatch=("--partition=high", "--nodes=2", "--exclusive"))
    job.wait_for_log("SIGUSR1", times=3)
    hold.unlink()
    assert important.end()[0] == 0
    job.wait_for_attempt(5)

    job.wait_for_progress()
    cluster.run("scontrol", "update", "NodeName=node2", "State=down", "Reason=test")
    job.wait("PENDING")
    # The node may already have returned by itself.
    cluster.run("scontrol", "update", "NodeName=node2", "State=resume", check=False)
    job.wait_for_attempt(6)

    job.wait_for_progress()
    cluster.kill_node("node1")  # the node that runs the batch script
    cluster.start_node("node1")
    job.wait_for_attempt(7)
    job.wait(*ENDED)
    return job


def test_trains_on_two_nodes(disturbed: Future[Job], undisturbed: Job) -> None:
    log = undisturbed.log.read_text()
    assert "2 nodes with 1 ranks each" in log
    assert f"done: {STEPS} steps are saved" in log
    assert [line["step"] for line in json_lines(undisturbed.run_dir / "metrics.jsonl")] == list(
        range(1, STEPS + 1)
    )
    beats = [
        json.loads(file.read_text()) for file in sorted((undisturbed.run_dir / "heartbeats").glob("*.json"))
    ]
    # Ranks follow the order of the nodes.
    assert [(beat["rank"], beat["node"]) for beat in beats] == [
        (0, "node1"),
        (1, "node2"),
    ]
    (attempt,) = undisturbed.attempts
    assert (attempt.attempt, attempt.checkpoint_step, attempt.code) == (1, 0, 0)


def test_a_cancelled_job_saves_and_does_not_come_back(submit: Submit) -> None:
    job = submit("cancelled", "examples/moe/tiny.sbatch", *options(train__num_steps=60))
    job.wait_for_progress()
    job.cluster.run("scancel", job.id)
    assert job.wait(*ENDED)["JobState"] == "CANCELLED"
    job.cluster.until(lambda: not job.cluster.processes(job=job.id), 60)  # the batch script too
    assert job.cluster.state(job.id) == "CANCELLED"
    (attempt,) = job.attempts
    assert attempt.code == 85
    assert checkpoint_step(job.run_dir) == len(json_lines(job.run_dir / "metrics.jsonl"))


def test_a_job_without_time_for_a_step_ends(submit: Submit) -> None:
    """Ranks stop before the job's end time; the job ends after two attempts without progress.

    The end time comes from Slurm.
    """
    job = submit(
        "short", "examples/moe/tiny.sbatch", *options(supervision__stop_margin_s=1800), sbatch=("--time=30",)
    )
    code, log = job.end()
    assert code == 1, log
    (error,) = _errors(log)
    assert re.search(
        r"error: two attempts in a row have left no checkpoint after step 0; "
        r".* stopped by the job's time limit",
        error,
    ), error
    assert [attempt.code for attempt in job.attempts] == [85, 85]


def test_a_job_that_gets_nowhere_ends(submit: Submit) -> None:
    """Each node of the job fails the node check: the job retries without the first node and then ends."""
    unfit = options(
        supervision__node_check="true",
        supervision__min_free_memory_gb=1e9,
        parallel__expert_model_parallel_size=1,
    )
    job = submit("nowhere", "examples/moe/tiny.sbatch", *unfit, sbatch=("--nodes=1",))
    code, log = job.end()
    assert code == 87
    (error,) = _errors(log)
    assert re.search(
        r"error: two attempts in a row have left no checkpoint after step 0; "
        r"the last attempt: .*node2.* memory",
        error,
    ), error
    assert [attempt.code for attempt in job.attempts] == [87, 87]
    assert "node1" in job.attempts[0].reason
    assert job.cluster.job(job.id)["ExcNodeList"] == "node1"


CASES: dict[str, tuple[str, list[str], int, str]] = {
    "full disk": (
        "examples/moe/tiny.sbatch",
        options(supervision__min_free_disk_gb=1e9),
        2,
        r"run_dir = .* GB of disk space left, and supervision\.min_free_disk_gb = 1e\+09: "
        r"make room, or choose another run_dir",
    ),
    "missing config": (
        "examples/moe/launch.sh nowhere.toml",
        [],
        2,
        r"config file nowhere\.toml does not exist",
    ),
    "bad setting": (
        "examples/moe/tiny.sbatch",
        options(train__num_stepps=3),
        2,
        r"unknown config key 'train\.num_stepps': did you mean",
    ),
    "unreachable server": (
        "examples/moe/tiny.sbatch",
        options(rollout__engine="sglang", rollout__server_urls='["http://127.0.0.1:9"]'),
        2,
        r"rollout\.server_urls: 'http://127\.0\.0\.1:9' cannot be reached",
    ),
    "unfit node, and no other": (
        "examples/moe/tiny.sbatch",
        options(supervision__min_free_memory_gb=1e9),
        87,
        r"partition main has fewer than 2 nodes without node\d",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_ends_with_one_clear_line(name: str, submit: Submit) -> None:
    script, arguments, expected, line = CASES[name]
    job = submit(name.replace(" ", "_"), script, *arguments)
    code, log = job.end()
    assert code == expected, log
    (error,) = _errors(log)
    assert re.search(line, error), error


def test_sbatch_refuses_a_wrong_partition(submit: Submit) -> None:
    with pytest.raises(RuntimeError, match=r"error: .*invalid partition specified: nowhere"):
        submit("partition", "examples/moe/tiny.sbatch", sbatch=("--partition=nowhere",))


@needs_sglang
@pytest.mark.parametrize("place", ["other component", "other node"])
def test_trainers_and_sglang_servers_apart(place: str, submit: Submit, tmp_path: Path) -> None:
    hold = tmp_path / "hold"
    sglang = options(
        train__num_steps=3,
        sglang__python=PYTHON,
        sglang__start_timeout_s=600,
        rollout__engine="sglang",
        weight_sync__route="distributed",
    )
    if place == "other component":
        job = submit("het", "examples/moe/tiny_het.sbatch", *sglang, HOLD=str(hold))
    else:
        job = submit("nodes", "examples/moe/tiny.sbatch", *sglang, ROLLOUT_NODES="1", RANKS_PER_NODE="2")
    if interrupted := place == "other component":
        job.wait_for_progress()
        hold.touch()
        job.cluster.run("scancel", "--signal=USR1", "--batch", job.id)
        job.wait_for_log("SIGUSR1", times=1)
        hold.unlink()
        job.wait_for_attempt(2)  # the new attempt has other servers and keys
    code, log = job.end()
    assert code == 0, log
    assert [attempt.code for attempt in job.attempts] == ([85, 0] if interrupted else [0])
    assert "1 nodes with 2 ranks each" in log
    (server,) = json.loads((job.run_dir / "servers.json").read_text())
    beat = json.loads((job.run_dir / "heartbeats" / "rank_00000.json").read_text())
    assert {server["node"], beat["node"]} == {"node1", "node2"}
    figures = json_lines(job.run_dir / "metrics.jsonl")
    assert [line["step"] for line in figures] == [1, 2, 3]
    # The servers have the policy's weights.
    assert all(line["rollout/logprob_diff_mean"] < 0.02 for line in figures)
    keys = job.run_dir / "server_keys.json"
    assert stat.S_IMODE(keys.stat().st_mode) == 0o600
    logs = [file.read_text(errors="replace") for file in (job.log, *job.run_dir.rglob("*.log"))]
    assert len(logs) >= 4  # job, trainer, the step of the servers, the server
    assert not [key for key in json.loads(keys.read_text()).values() if any(key in text for text in logs)]


def test_whatever_interrupts_a_run_it_ends_like_an_undisturbed_one(
    undisturbed: Job, disturbed: Future[Job]
) -> None:
    job = disturbed.result()
    code, log = job.end()
    assert code == 0, log
    codes = [attempt.code for attempt in job.attempts]
    assert codes[:4] == [85, 85, 1, 85]
    assert codes[4] in (85, None)  # the ranks stopped on request, or Slurm killed them first
    assert codes[5] in (1, None)  # the ranks of the other node may have reported the loss
    assert codes[6:] == [0]
    reasons = [attempt.reason for attempt in job.attempts]
    assert "SIGUSR1" in reasons[0]
    assert "rank 1 on node2 was killed by SIGKILL" in reasons[2]
    steps = [attempt.checkpoint_step for attempt in job.attempts]
    assert steps == sorted(set(steps))  # each attempt continued from a newer checkpoint
    expected, found = (
        [_untimed(line) for line in json_lines(each.run_dir / "metrics.jsonl")] for each in (undisturbed, job)
    )
    assert found == expected


def _is_rank(process: psutil.Process) -> bool:
    return process.cmdline()[1:4] == ["-u", "-m", "megatron_gmpo.train"]


def _errors(log: str) -> list[str]:
    return [
        line for line in log.splitlines() if "error: " in line and not line.startswith(("slurmstepd", "srun"))
    ]


def _untimed(line: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if not name.startswith(("time/", "throughput/"))}
