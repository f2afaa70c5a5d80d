"""``launch.py`` for a server whose scheduler and detokenizer are forks of its first process, so that SGLang is imported once, not thrice."""

from __future__ import annotations

import multiprocessing
import runpy
import sys
from pathlib import Path
from typing import Any

LAUNCHER = Path(__file__).parents[2] / "megatron_gmpo/rollout/sglang/launch.py"


def launch(*_: Any, **__: Any) -> None:
    from sglang.launch_server import run_server
    from sglang.srt.managers import detokenizer_manager, scheduler  # noqa: F401
    from sglang.srt.server_args import prepare_server_args

    multiprocessing.set_start_method("fork")
    multiprocessing.set_start_method = lambda *_, **__: None
    run_server(prepare_server_args(sys.argv[1:]))


if __name__ == "__main__":
    watch = runpy.run_path(str(LAUNCHER))["main"]
    runpy.run_module = launch  # pyright: ignore[reportAttributeAccessIssue]
    watch()
