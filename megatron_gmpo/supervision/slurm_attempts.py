"""Record the attempts of a Slurm job at one run, and decide whether the job may make another attempt.

restarts.jsonl in the run folder has one line per attempt. Limits count the attempts of one job. A new job for
the same run starts from zero. This module does not import torch, see ``commands/slurm_attempt.py``.
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

from .. import files
from ..config import Config
from ..errors import Exit, InputError, RunError, printable
from .lock import RunLock
from .records import OUTCOME, append_event, newest_step, read_outcome

RESTARTS = "restarts.jsonl"
CRASHES = {Exit.FAILED, Exit.HUNG, Exit.BAD_NODE}
"""Exit codes after which another attempt may succeed; each counts for MAX_CRASHES."""


@dataclass(frozen=True)
class AttemptRecord:
    """One line of restarts.jsonl.

    Attributes:
        attempt: number within the job, from 1.
        job: Slurm's job id, which does not change at a requeue.
        start: Unix time in seconds.
        checkpoint_step: steps in the newest checkpoint at ``start``; 0 without one.
        code: an ``Exit``; None while the attempt runs, or if Slurm ended it before it could record a reason.
        reason: the reason in one line.
    """

    attempt: int
    job: str
    start: float
    checkpoint_step: int
    code: int | None = None
    reason: str = ""


def begin(cfg: Config) -> Path:
    """Begin an attempt and return the run folder.

    Check the lock and the limits, record the attempt, and draw the keys of rollout servers.

    Raises:
        InputError: another job uses the run folder, see ``RunLock``.
        RunError: the job has reached its limit of attempts.
    """
    run_dir = Path(cfg.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    RunLock(run_dir).release()
    job, step = os.environ["SLURM_JOB_ID"], checkpoint_step(run_dir)
    attempts = read_attempts(run_dir)
    if attempts and attempts[-1].code is None and attempts[-1].job != job and _is_running(attempts[-1].job):
        raise InputError(
            f"run_dir = {cfg.run_dir!r} is in use by job {attempts[-1].job}: wait for its end, or choose "
            f"another run_dir"
        )
    if attempts and attempts[-1].code is None:  # Slurm requeued the job after a preemption or a failed node
        attempts[-1] = _concluded(run_dir, attempts[-1], "ended by Slurm: a preemption or a failed node")
    ours = [attempt for attempt in attempts if attempt.job == job]
    if reason := why_no_more(ours, step):
        _write_attempts(run_dir, attempts)
        raise RunError(reason)
    _write_attempts(run_dir, [*attempts, AttemptRecord(len(ours) + 1, job, time.time(), step)])
    if ours:
        append_event(run_dir, "restart", attempt=len(ours) + 1, step=step, reason=ours[-1].reason)
    for name in (OUTCOME, "servers.json"):  # from the last attempt
        (run_dir / name).unlink(missing_ok=True)
    if cfg.rollout.engine == "sglang":
        _write_keys(run_dir / "server_keys.json")
    return run_dir


def end(run_dir: Path, status: int) -> tuple[Exit, str]:
    """Record the end of the attempt, and print on stderr whether another attempt follows.

    Args:
        status: srun's exit code. It is 0 after success, ``Exit.REQUEUE`` if the attempt was stopped before
            its trainers were started, and ``Exit.BAD_INPUT`` after bad input or on a full disk. torchrun
            exits with 1 after any other failure.

    Returns:
        The job's exit code, which is ``Exit.REQUEUE`` if the job must be started again, and the name of a
        node that must not be used again, or "".
    """
    attempts = read_attempts(run_dir)
    this = max(index for index, attempt in enumerate(attempts) if attempt.job == os.environ["SLURM_JOB_ID"])
    last = attempts[this]
    silent = f"the trainers ended with exit code {status} and without a reason: see {run_dir / 'logs'}"
    last = _concluded(run_dir, last, "" if status == Exit.DONE else silent)
    if last.code is None:
        known = status in (Exit.DONE, Exit.REQUEUE, Exit.BAD_INPUT)
        last = replace(last, code=status if known else Exit.FAILED)
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
        code = Exit.FAILED if code == Exit.REQUEUE else code
    else:
        crashes = sum(attempt.code in CRASHES for attempt in ours)
        limits = f"{_limit('MAX_RESTARTS')}, {crashes} of {_limit('MAX_CRASHES')}"
        _say(f"attempt {last.attempt}: {last.reason}")
        _say(f"it may be tried again from step {step}: restart {len(ours)} of {limits} after a crash")
        outcome = read_outcome(run_dir)
        return Exit.REQUEUE, outcome.node if code == Exit.BAD_NODE and outcome else ""
    return code, ""


def why_no_more(attempts: Sequence[AttemptRecord], step: int) -> str:
    """Return the reason why a job with these attempts must not make another attempt, or "".

    Args:
        step: steps in the newest checkpoint.
    """
    if not attempts:
        return ""
    last = f"; the last attempt: {attempts[-1].reason}"
    restarts, crashes = _limit("MAX_RESTARTS"), _limit("MAX_CRASHES")
    # an attempt without a code ended by a preemption or a lost node, not by an error of the run
    ended = [attempt for attempt in attempts if attempt.code is not None]
    if len(ended) > 1 and ended[-2].checkpoint_step == step:
        return f"two attempts in a row have left no checkpoint after step {step}{last}"
    if len(attempts) > restarts:
        return f"the job has been started again {restarts} times, MAX_RESTARTS{last}"
    if attempts[-1].code in CRASHES and sum(attempt.code in CRASHES for attempt in attempts) > crashes:
        return f"the job has been started again after {crashes} crashes, MAX_CRASHES{last}"
    return ""


def checkpoint_step(run_dir: Path) -> int:
    """Return the completed steps in the newest checkpoint, 0 without a checkpoint.

    A file that does not state a step counts as 0. The trainers refuse it, or go on from another checkpoint.
    """
    try:
        return newest_step(run_dir / "checkpoints") or 0
    except InputError:
        return 0


def read_attempts(run_dir: Path) -> list[AttemptRecord]:
    """Return all attempts at a run, from all jobs, oldest first."""
    try:
        lines = (run_dir / RESTARTS).read_text().splitlines()
    except FileNotFoundError:
        return []
    return [AttemptRecord(**json.loads(line)) for line in lines]


def _concluded(run_dir: Path, attempt: AttemptRecord, default_reason: str) -> AttemptRecord:
    """Return the attempt with code and reason of ``outcome.json``.

    Without that file, the code is None and the reason is ``default_reason``.
    """
    outcome = read_outcome(run_dir)
    if outcome is None:
        return replace(attempt, reason=default_reason)
    return replace(attempt, code=outcome.code, reason=outcome.reason)


def _is_running(job: str) -> bool:
    try:
        queue = subprocess.run(
            ["squeue", "--noheader", "--job", job, "--format", "%T"],
            capture_output=True,
            text=True,
            timeout=30,
        )
    except (OSError, subprocess.TimeoutExpired):
        # squeue is missing, or the controller does not answer: rely on the lock
        return False
    return "RUNNING" in queue.stdout


def _write_attempts(run_dir: Path, attempts: list[AttemptRecord]) -> None:
    files.write(run_dir / RESTARTS, "".join(json.dumps(asdict(attempt)) + "\n" for attempt in attempts))


def _write_keys(path: Path) -> None:
    """Write the keys of this attempt's servers to a file that only this user can read."""
    path.unlink(missing_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        json.dump({"api_key": secrets.token_hex(16), "admin_key": secrets.token_hex(16)}, file)


def _limit(name: str) -> int:
    try:
        return int(os.environ[name])
    except ValueError:
        raise InputError(f"{name} = {os.environ[name]!r} is not a number: give one, e.g. 3") from None


def _say(line: str) -> None:
    print(time.strftime("[%Y-%m-%d %H:%M:%S]"), printable(line), file=sys.stderr, flush=True)
