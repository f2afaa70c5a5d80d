"""A test that never ends and starts every kind of process that tests start.

pytest collects this file only if its name is given. Run as a module, it is one rank. Each rank creates a
file in the folder ``SPINNING``, named after its process id.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from .commands import command_line, start_module
from .forks import ROOT
from .ranks import RankPool
from .sglang_servers import PYTHON, local_servers

MODULE = "tests.support.endless"


def spin() -> None:
    Path(os.environ["SPINNING"], str(os.getpid())).touch()
    while True:
        pass


def test_that_never_ends(ranks: RankPool, tmp_path: Path) -> None:
    start_module(MODULE, ranks=2)
    subprocess.Popen(command_line(MODULE, ranks=2), cwd=ROOT, start_new_session=True)
    with local_servers("no model", tmp_path) as servers:
        if PYTHON.exists():
            servers.start()
        ranks.run(2, spin)


if __name__ == "__main__":
    spin()
