"""Run a demo with a small model and few steps."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_gmpo.commands import demo
from megatron_gmpo.testing.demo import TASKS


def demo_result(
    name: str,
    made: Path,
    words: list[str],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> dict[str, Any]:
    """Return the last line of ``megatron-gmpo demo --task name``, which runs in ``folder``.

    Args:
        made: folder with the model and the data, which are not made again.
        words: further options of the training command.
    """
    task = TASKS[name]
    small = replace(
        task,
        config=str(Path(task.config).resolve()),
        make=lambda: pytest.fail("the model is made"),
        done=made / "warm_up.json",
        options=tuple(words),
    )
    # the demo of the README takes minutes; the command and its training processes are the real ones
    monkeypatch.setitem(TASKS, name, small)
    monkeypatch.setenv("PYTHONPATH", str(Path.cwd()))
    monkeypatch.chdir(folder)
    demo.main(["--task", name])
    return json.loads(capfd.readouterr().out.splitlines()[-1])
