"""No process of a test outlives a pytest that is killed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from ..support.commands import ROOT
from ..support.sglang_servers import wait_for

pytestmark = pytest.mark.distributed


def test_no_process_outlives_a_killed_pytest(tmp_path: Path) -> None:
    spinning, log = tmp_path / "spinning", tmp_path / "log"
    spinning.mkdir()
    command = [
        sys.executable,
        "-m",
        "pytest",
        "tests/support/endless.py",
        f"--basetemp={tmp_path / 'nested'}",
    ]
    with log.open("w") as output:
        run = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | {"SPINNING": str(spinning)}, stdout=output, stderr=output
        )
    wait_for(lambda: run.poll() is not None or len(list(spinning.iterdir())) == 6, timeout_s=600)
    assert run.poll() is None, log.read_text()
    processes = psutil.Process(run.pid).children(recursive=True)
    assert {int(file.name) for file in spinning.iterdir()} <= {process.pid for process in processes}
    run.kill()
    run.wait()
    _, alive = psutil.wait_procs(processes, timeout=30)
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []
