"""The attempts of a Slurm job at one run, for examples/moe/launch.sh: whether another may be made, and what became of the last.

    RUN_DIR=$(python -m tools.attempt begin CONFIG.toml --section.key value ...)
    python -m tools.attempt end RUN_DIR STATUS_OF_SRUN

RUN_DIR/restarts.jsonl has a line for each. A new sbatch of the same run counts anew. Nothing here imports torch, which may
take half a minute from a busy file system: a job whose time is up does not have that.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from megatron_gmpo import files
from megatron_gmpo.config import exit_with_one_line, load_config
from megatron_gmpo.errors import Exit, InputError, RunError
from megatron_gmpo.supervision.lock import RunLock
from megatron_gmpo.supervision.records import OUTCOME, append_event, read_outcome

RESTARTS = "restarts.jsonl"
CRASHES = {Exit.FAILED, Exit.HUNG, Exit.BAD_NODE}
"""After these another attempt may go better; each counts for MAX_CRASHES."""


@dataclass(frozen=True)
class AttemptRecord:
    """
    Attributes:
        attempt: number within the job, from 1.
        job: Slurm's id, which stays when a job is requeued.
        start: Unix time in seconds.
        checkpoint_step: steps in the newest checkpoint at that time, 0 without one.
        code: an ``Exit``; None while it runs, and for ever where Slurm ended it before anybody could say why.
        reason: one line.
    """

    attempt: int
    job: str
    start: float
    checkpoint_step: int
    code: int | None = None
    reason: str = ""


def begin(argv: list[str]) -> None:
    """Checks config, lock and limits, enters the attempt, draws the keys of rollout servers, and prints the run folder.

    Raises:
        InputError: see ``load_config`` and ``RunLock``.
        RunError: there were attempts enough.
    """
    cfg = load_config(argv)
    run_dir = Path(cfg.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    RunLock(run_dir).release()
    job, step = os.environ["SLURM_JOB_ID"], checkpoint_step(run_dir)
    attempts = read_attempts(run_dir)
    if attempts and attempts[-1].code is None and attempts[-1].job != job and _is_running(attempts[-1].job):
        raise InputError(
            f"run_dir = {cfg.run_dir!r} is in use by job {attempts[-1].job}: wait for its end, or choose another run_dir"
        )
    if attempts and attempts[-1].code is None:  # Slurm requeued it: a preemption, a node that failed
        attempts[-1] = _concluded(run_dir, attempts[-1], "ended by Slurm: a preemption or a failed node")
    ours = [attempt for attempt in attempts if attempt.job == job]
    if reason := why_no_more(ours, step):
        _write_attempts(run_dir, attempts)
        raise RunError(reason)
    _write_attempts(run_dir, [*attempts, AttemptRecord(len(ours) + 1, job, time.time(), step)])
    if ours:
        append_event(run_dir, "restart", attempt=len(ours) + 1, step=step, reason=ours[-1].reason)
    for name in (OUTCOME, "servers.json"):  # what comes from now on is of this attempt
        (run_dir / name).unlink(missing_ok=True)
    if cfg.rollout.engine == "sglang":
        _write_keys(run_dir / "server_keys.json")
    print(run_dir)


def end(run_dir: Path, status: int) -> Exit:
    """Enters how the attempt ended, and says on stderr what is next; a node that must not be used again goes to stdout.

    Args:
        status: srun's exit code: 0, or ``Exit.REQUEUE`` of an attempt that was stopped before its trainers were started. Any other says
            nothing: torchrun exits with 1 whatever its ranks exit with.

    Returns:
        ``Exit.REQUEUE`` when the job is to be started again, else what it is to exit with.
    """
    attempts = read_attempts(run_dir)
    this = max(index for index, attempt in enumerate(attempts) if attempt.job == os.environ["SLURM_JOB_ID"])
    last = attempts[this]
    silent = f"the trainers ended with exit code {status} and without a reason: see {run_dir / 'logs'}"
    last = _concluded(run_dir, last, "" if status == Exit.DONE else silent)
    if last.code is None:
        last = replace(last, code=status if status in (Exit.DONE, Exit.REQUEUE) else Exit.FAILED)
    attempts[this] = last
    _write_attempts(run_dir, attempts)
    assert last.code is not None
    code, step = Exit(last.code), checkpoint_step(run_dir)
    ours = [attempt for attempt in attempts if attempt.job == last.job]
    if code == Exit.DONE:
        _say(f"done: {step} steps are saved")
    elif code != Exit.REQUEUE and code not in CRASHES:
        _say(f"error: {last.reason}")
    elif reason := why_no_more(ours, step):
        _say(f"error: {reason}")
        return Exit.FAILED if code == Exit.REQUEUE else code
    else:
        crashes = sum(attempt.code in CRASHES for attempt in ours)
        _say(f"attempt {last.attempt}: {last.reason}")
        restarts = f"restart {len(ours)} of {_limit('MAX_RESTARTS')}, {crashes} of {_limit('MAX_CRASHES')} after a crash"
        _say(f"it may be tried again from step {step}: {restarts}")
        outcome = read_outcome(run_dir)
        if code == Exit.BAD_NODE and outcome:
            print(outcome.node)
        return Exit.REQUEUE
    return code


def why_no_more(attempts: Sequence[AttemptRecord], step: int) -> str:
    """Why a job with these attempts behind it must not make another, or nothing.

    Args:
        step: of the newest checkpoint.
    """
    if not attempts:
        return ""
    last = f"; the last attempt: {attempts[-1].reason}"
    restarts, crashes = _limit("MAX_RESTARTS"), _limit("MAX_CRASHES")
    came_to_an_end = [
        attempt for attempt in attempts if attempt.code is not None
    ]  # a preemption or a lost node says nothing of the run
    if len(came_to_an_end) > 1 and came_to_an_end[-2].checkpoint_step == step:
        return f"two attempts in a row have left no checkpoint after step {step}{last}"
    if len(attempts) > restarts:
        return f"the job has been started again {restarts} times, MAX_RESTARTS{last}"
    if attempts[-1].code in CRASHES and sum(attempt.code in CRASHES for attempt in attempts) > crashes:
        return f"the job has been started again after {crashes} crashes, MAX_CRASHES{last}"
    return ""


def checkpoint_step(run_dir: Path) -> int:
    """Steps in the newest checkpoint, 0 without one."""
    try:
        return int((run_dir / "checkpoints" / "latest_checkpointed_iteration.txt").read_text())
    except FileNotFoundError:
        return 0


def read_attempts(run_dir: Path) -> list[AttemptRecord]:
    """All attempts at a run, of all jobs, oldest first."""
    try:
        lines = (run_dir / RESTARTS).read_text().splitlines()
    except FileNotFoundError:
        return []
    return [AttemptRecord(**json.loads(line)) for line in lines]


def _concluded(run_dir: Path, attempt: AttemptRecord, otherwise: str) -> AttemptRecord:
    """With what ``outcome.json`` says, or else a reason and no code."""
    outcome = read_outcome(run_dir)
    if outcome is None:
        return replace(attempt, reason=otherwise)
    return replace(attempt, code=outcome.code, reason=outcome.reason)


def _is_running(job: str) -> bool:
    try:
        asked = subprocess.run(
            ["squeue", "--noheader", "--job", job, "--format", "%T"],
            capture_output=True,
            text=True,
            timeout=30,
        )
    except (
        OSError,
        subprocess.TimeoutExpired,
    ):  # no squeue here, a controller that does not answer: the lock has to do
        return False
    return "RUNNING" in asked.stdout


def _write_attempts(run_dir: Path, attempts: list[AttemptRecord]) -> None:
    files.write(run_dir / RESTARTS, "".join(json.dumps(asdict(attempt)) + "\n" for attempt in attempts))


def _write_keys(path: Path) -> None:
    """Keys that only this user reads, for servers and trainers of this attempt."""
    path.unlink(missing_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        json.dump({"api_key": secrets.token_hex(16), "admin_key": secrets.token_hex(16)}, file)


def _limit(name: str) -> int:
    try:
        return int(os.environ[name])
    except ValueError:
        raise InputError(f"{name} = {os.environ[name]!r} is not a number: give one, e.g. 3") from None


def _say(line: str) -> None:
    print(time.strftime("[%Y-%m-%d %H:%M:%S]"), line, file=sys.stderr, flush=True)


def main() -> None:
    command, *argv = sys.argv[1:]
    try:
        if command == "begin":
            begin(argv)
        else:
            sys.exit(end(Path(argv[0]), int(argv[1])))
    except RunError as error:
        exit_with_one_line(error, error.exit)


if __name__ == "__main__":
    main()
