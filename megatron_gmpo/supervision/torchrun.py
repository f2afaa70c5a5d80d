"""Run torchrun so that an error is the last line, and name a rank that was killed.

    python -m megatron_gmpo.supervision.torchrun TORCHRUN_OPTIONS -m megatron_gmpo.train CONFIG.toml ...

torchrun ends with a traceback of its own and a report of many lines. Here the line of the rank that failed
stays the last one. A rank that receives SIGKILL, for example from the out-of-memory killer, cannot print a
line or record its end, and the other ranks only detect that it is gone. A rank that ends with ``BAD_INPUT``
because the disk is full may have left no outcome either; the exit code, which is passed on, then tells that
another attempt is useless.
"""

from __future__ import annotations

import json
import logging
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from ..command_line import load_config
from ..errors import Exit, RunError, printable
from .records import Outcome, node_name, rank_file, write_outcome

_EXPLAINED = (Exit.REQUEUE, Exit.INTERRUPTED)
"""Exit codes with which a rank has printed a line, but written no report for torchrun."""


def main(argv: list[str] | None = None) -> None:
    """Run torchrun with these options, or with those of the command line."""
    argv = sys.argv[1:] if argv is None else argv
    # its lines about the end of ranks, which would follow the line of the rank that failed
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    try:
        run.run(run.parse_args(argv))  # unlike run.main, it logs nothing about error files
    except SignalException as stop:
        sys.exit(128 + stop.sigval)  # the ranks have said how they ended
    except ChildFailedError as error:
        killed = [(rank, failure) for rank, failure in error.failures.items() if failure.exitcode < 0]
        for rank, failure in killed[:1]:
            _name_killed(argv, rank, signal.Signals(-failure.exitcode))
        rank, first = error.get_first_failure()
        if not killed and not _explained(first):
            line = f"rank {rank} on {node_name()} ended with exit code {first.exitcode}; its output is above"
            print(f"error: {line}", file=sys.stderr, flush=True)
        sys.exit(Exit.BAD_INPUT if first.exitcode == Exit.BAD_INPUT else Exit.FAILED)


def _explained(failure: ProcessFailure) -> bool:
    """Return whether the rank has printed why it ended; it then writes a report for torchrun too."""
    return isinstance(failure.message, dict) or failure.exitcode in _EXPLAINED


def _name_killed(argv: list[str], rank: int, number: signal.Signals) -> None:
    """Print that a rank was killed, as the last line, and record it in the run folder."""
    hint = ""
    if number is signal.SIGKILL:
        hint = ", as the kernel's out-of-memory killer does when host memory runs out: see dmesg on the node"
    reason = f"rank {rank} on {node_name()} was killed by {number.name}{hint}"
    if run_dir := _run_dir(argv):
        beat = rank_file(run_dir, "heartbeats", rank, ".json")
        step = json.loads(beat.read_text())["step"] if beat.is_file() else 0
        with suppress(OSError):  # the line below must follow
            write_outcome(run_dir, Outcome(Exit.FAILED, reason, step, rank, node_name(), time.time()))
    print(f"error: {printable(reason)}", file=sys.stderr, flush=True)


def _run_dir(argv: list[str]) -> Path | None:
    """Return the folder of the run that these options train, None if they start another command."""
    options = run.parse_args(argv)
    module, words = options.training_script, list(options.training_script_args)
    if module == "megatron_gmpo" and words[:1] == ["train"]:
        module, words = "megatron_gmpo.train", words[1:]
    with suppress(RunError):
        return Path(load_config(words).run_dir) if module == "megatron_gmpo.train" else None
    return None


if __name__ == "__main__":
    main()
