"""Repeatedly kill a run with SIGKILL while it saves in a loop.

Run: python -m tests.support.saver MODEL RUN_DIR SEED [background]

Each life of the run is a fork of this process, which has imported everything. A life loads the latest
checkpoint, checks that weights and moments belong to its step, and then saves one step after another. All
weights and moments of a step are equal to the step. The command prints one line per life. With
``background``, a life changes all weights and moments while a save is written.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from subprocess import Popen
from typing import Any

import psutil
import torch

from megatron_gmpo.platform import prepare_megatron, start_process_group
from megatron_gmpo.policy.optimizer_state import optimizer_slots
from megatron_gmpo.policy.policy import Policy
from megatron_gmpo.weights import torch_dist_writer

from ..distributed.test_layouts import config
from . import cases
from .run_states import newest, records

SAVES_BEFORE_DEATH = 2
RANDOM_MOMENTS = {False: 3, True: 20}
"""Lives that are killed at a random moment, by whether they save in the background."""


def live(
    model: Path,
    run_dir: Path,
    report: Callable[[str], Any],
    place: tuple[Any, str, int] | None,
    *,
    background: bool,
) -> None:
    """Load, check, and save until killed.

    With a ``place``, the process kills itself there, during the save after those that it has reported.
    """
    start_process_group(cases.CPU, 60)
    with cases.opened(config(model, {}, max_tokens=64)) as policy:
        for state in states(policy):
            state.zero_()
        first = 0
        if checkpoint := newest(run_dir):
            first = policy.load(checkpoint).step
            assert all(bool((state == first).all()) for state in states(policy)), (
                f"torn checkpoint of step {first}"
            )
        report(f"loaded {first}")
        for step in range(first + 1, first + 1000):
            for state in states(policy):
                state.fill_(step)
            if place and step > first + SAVES_BEFORE_DEATH:
                die_at(*place)
                place = None
            save = policy.start_save(run_dir, step, records(), keep_last=2, background=background)
            if background:
                for state in states(policy):
                    state.fill_(-step)
                save.ended(wait=True)
            save.finish()
            report(f"saved {step}")


def die_at(owner: Any, name: str, call: int) -> None:
    """Kill this process when it calls a function for the ``call``-th time."""
    original, calls = getattr(owner, name), iter(range(1, call + 1))

    def deadly(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, deadly)


def is_alive(group: int) -> bool:
    """Return whether a process of the group has not ended."""
    found = psutil.process_iter(["status"])
    return any(each.info["status"] != psutil.STATUS_ZOMBIE and _group_of(each.pid) == group for each in found)


def _group_of(pid: int) -> int:
    with suppress(ProcessLookupError):
        return os.getpgid(pid)
    return 0


def states(policy: Policy) -> list[torch.Tensor]:
    slots = list(optimizer_slots(policy.model.optimizer))
    return [slot.parameter.data for slot in slots] + [
        tensor for slot in slots for tensor in slot.tensors.values()
    ]


def main(model: Path, run_dir: Path, seed: int, *, background: bool) -> None:
    prepare_megatron(cases.CPU)
    torch.set_num_threads(1)
    choose = random.Random(seed)
    places: list[tuple[Any, str, int] | None] = [
        (torch_dist_writer, "_write_item", 9),  # some of the tensors are written, or in memory
        (Path, "rename", 1),  # torch writes the metadata of the new checkpoint
        (Path, "rename", 2),  # the state is the last file
        (Path, "rename", 3),  # the new checkpoint is complete but does not have its name
        (Path, "rename", 4),  # it has its name but is not recorded as the latest
        (shutil, "rmtree", 1),  # it is the latest; the oldest is being removed
    ]
    if background:
        places += [
            (Popen, "__init__", 1),  # everything is in memory, and no process writes it yet
            (Popen, "wait", 1),  # the process writes
            (Popen, "communicate", 1),  # it has written everything
        ]
    places += [None] * RANDOM_MOMENTS[background]
    for place in [*places, None]:
        told = run_dir.with_name("told")
        told.write_text("")

        def report(line: str, told: Path = told) -> None:
            with told.open("a") as file:
                print(line, file=file, flush=True)

        pid = os.fork()
        if pid == 0:
            os.setsid()
            try:
                live(model, run_dir, report, place, background=background)
            except BaseException:
                traceback.print_exc()
            os._exit(1)
        deadline = time.monotonic() + 200
        dead = None
        while dead is None and time.monotonic() < deadline:
            if place is None and told.read_text().count("saved") >= SAVES_BEFORE_DEATH:
                time.sleep(choose.uniform(0, 0.5))
                os.kill(pid, signal.SIGKILL)
            found, status = os.waitpid(pid, os.WNOHANG)
            dead = status if found else None
            time.sleep(0.005)
        while is_alive(pid) and time.monotonic() < deadline:
            time.sleep(0.005)
        assert not is_alive(pid), "checkpoint writers outlive their rank"
        assert dead == signal.SIGKILL, f"{place}: status {dead}"
        print(" ".join(told.read_text().split()), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), background="background" in sys.argv)
