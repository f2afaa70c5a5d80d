"""Train, and kill a rank with SIGKILL: ``python -m tests.support.killed RANK PHASE STEP CONFIG.toml ...``.

The rank dies when it enters the phase in the step after STEP completed steps. In the phase ``checkpoint`` it
dies after some of its tensors are written. In the phase ``start`` it dies while weights load: those of the
model if STEP is 0, else those of a checkpoint.
"""

from __future__ import annotations

if __name__ == "__main__":
    from megatron_gmpo.supervision.signals import listen

    listen()

import os
import signal
import sys
from typing import Any

from megatron_gmpo import train
from megatron_gmpo.policy import policy
from megatron_gmpo.run import start_command
from megatron_gmpo.supervision.attempt import Attempt
from megatron_gmpo.weights import torch_dist_writer


def main(rank: str, phase: str, step: int) -> None:
    enter, write = Attempt.enter, torch_dist_writer._write_item
    chosen = os.environ.get("RANK", "0") == rank

    def die(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def write_and_die(*args: Any) -> Any:
        patched._write_item = die
        return write(*args)

    def enter_or_die(attempt: Attempt, entered: str) -> None:
        enter(attempt, entered)
        assert attempt._heartbeat
        if (entered, attempt._heartbeat.step) == (phase, step) and chosen:
            if phase != "checkpoint" or rank != "0":  # rank 0 writes the tensors
                die()
            patched._write_item = write_and_die

    patched: Any = torch_dist_writer
    patched_attempt: Any = Attempt
    patched_attempt.enter = enter_or_die
    if phase == "start" and chosen:
        setattr(policy, "load_training_state" if step else "load_hf", die)
    start_command(train.main)


if __name__ == "__main__":
    rank, phase, step = sys.argv[1:4]
    del sys.argv[1:4]
    main(rank, phase, int(step))
