"""A test that never ends, with processes of every kind that tests start. pytest collects it only by its name.

Each rank writes a file with its process id as its name into the folder ``SPINNING``. As a module this is a rank.
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
