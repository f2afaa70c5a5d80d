"""The Triton kernels of log probabilities equal float64, in Triton's interpreter on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TRITON = ROOT / ".venv-triton"


@pytest.mark.slow
@pytest.mark.skipif(not (TRITON / "triton").is_dir(), reason="Triton is not installed: run make triton")
def test_kernels_in_the_interpreter() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.triton_interpreter"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(TRITON), "TRITON_INTERPRET": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-4000:]
