"""Run the train command on many argument lists in one process.

Run: python -m tests.support.refusals < CASES.json

A case is ``{"argv": [...], "env": {...}}``; the answer on stdout is a JSON list of objects with
``code``, ``stdout`` and ``stderr``. The environment has no rendezvous address, so that a case that is not
refused before the process group starts ends with a different error.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import traceback
from typing import Any

from megatron_gmpo.run import start_command
from megatron_gmpo.train import main


def refuse(argv: list[str], env: dict[str, str]) -> dict[str, Any]:
    code: Any = 0
    sys.argv[1:] = argv
    os.environ.update({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"} | env)
    with (
        contextlib.redirect_stdout(io.StringIO()) as stdout,
        contextlib.redirect_stderr(io.StringIO()) as stderr,
    ):
        try:
            start_command(main)
        except SystemExit as stop:
            code = stop.code
        except Exception:
            code = 1
            traceback.print_exc()
    return {"code": code, "stdout": stdout.getvalue(), "stderr": stderr.getvalue()}


if __name__ == "__main__":
    print(json.dumps([refuse(**case) for case in json.load(sys.stdin)]))
