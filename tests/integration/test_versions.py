"""A run resumes from a checkpoint of the older megatron-core under the newer one, bit for bit."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_gmpo.testing.arithmetic import write_addition_problems

from ..support.commands import CONFIG, ROOT, command_line, json_lines, options, run_module

pytestmark = [pytest.mark.distributed, pytest.mark.versions]

OLDER = ROOT / ".venv/bin/python"
"""Interpreter of the environment with megatron-core 0.16.1 (``make install``)."""


def older_megatron() -> str:
    """Return why the test cannot run here, or an empty string."""
    if sys.version_info < (3, 12):
        return "it resumes under the newer megatron-core: run make PYTHON=python3.12 test-versions"
    if not OLDER.exists():
        return f"{OLDER.relative_to(ROOT)} with megatron-core 0.16.1 does not exist: run make install"
    return ""


@pytest.mark.skipif(bool(older_megatron()), reason=older_megatron())
def test_a_checkpoint_of_the_older_megatron_resumes_bit_for_bit(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    write_addition_problems(tmp_path)
    settings = options(
        model__path=tiny_model("qwen3_moe", num_layers=2),
        data__path=tmp_path / "train.jsonl",
        data__max_prompts=40,
        eval__sets__heldout__path=tmp_path / "heldout.jsonl",
        eval__sets__heldout__max_prompts=8,
        reward__name="tests.support.rewards:share_of_digits",
        rollout__prompts_per_step=6,
        rollout__samples_per_prompt=4,
        train__minibatches_per_step=3,
        train__max_tokens_per_microbatch=64,
        optimizer__lr=1e-3,
        optimizer__lr_schedule="constant",
        eval__before="false",
        log__tensorboard="false",
        parallel__expert_model_parallel_size=2,
    )

    def run_older(num_steps: int, run_dir: Path) -> None:
        argv = [CONFIG, *settings, *options(run_dir=run_dir, train__num_steps=num_steps)]
        command = [str(OLDER), *command_line("megatron_gmpo.train", *argv, ranks=2)[1:]]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr

    older, newer = tmp_path / "older", tmp_path / "newer"
    run_older(2, older)
    shutil.copytree(older, newer)
    run_older(4, older)
    argv = [CONFIG, *settings, *options(run_dir=newer, train__num_steps=4)]
    done = run_module("megatron_gmpo.train", *argv, ranks=2)
    assert done.returncode == 0, done.stderr

    def figures(run_dir: Path) -> list[dict[str, float]]:
        measured = ("time/", "throughput/")
        lines = json_lines(run_dir / "metrics.jsonl")
        return [{k: v for k, v in line.items() if not k.startswith(measured)} for line in lines]

    assert [line["step"] for line in figures(newer)] == [1, 2, 3, 4]
    assert figures(newer) == figures(older)
