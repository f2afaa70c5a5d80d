"""Run torchrun, record which rank was killed, and pass on exit code 2. ``RUN_DIR`` is the run folder.

    RUN_DIR=... python -m megatron_gmpo.supervision.torchrun TORCHRUN_OPTIONS

A rank that receives SIGKILL, for example from the out-of-memory killer, cannot record its end. The other
ranks only detect that it is gone. A rank that ends with ``BAD_INPUT`` because the disk is full may have left
no outcome either; the exit code then tells that another attempt is useless.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from ..errors import Exit, printable
from .records import Outcome, node_name, rank_file, write_outcome


def main() -> None:
    """Run torchrun with the options of the command line."""
    try:
        run.main(sys.argv[1:])
    except ChildFailedError as error:
        killed = [(rank, failure) for rank, failure in error.failures.items() if failure.exitcode < 0]
        for rank, failure in killed[:1]:
            _record(Path(os.environ["RUN_DIR"]), rank, signal.Signals(-failure.exitcode))
        _, first = error.get_first_failure()
        sys.exit(Exit.BAD_INPUT if first.exitcode == Exit.BAD_INPUT else Exit.FAILED)


def _record(run_dir: Path, rank: int, number: signal.Signals) -> None:
    beat = rank_file(run_dir, "heartbeats", rank, ".json")
    step = json.loads(beat.read_text())["step"] if beat.is_file() else 0
    guess = ", which the kernel also sends when memory runs out" if number is signal.SIGKILL else ""
    reason = f"rank {rank} on {node_name()} was killed by {number.name}{guess}"
    with suppress(OSError):  # the line below must follow
        write_outcome(run_dir, Outcome(Exit.FAILED, reason, step, rank, node_name(), time.time()))
    print(f"error: {printable(reason)}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
