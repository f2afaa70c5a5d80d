"""A study on its command line is interrupted, continued and reported; one of its arms stops with an error."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_gmpo.testing.arithmetic import write_addition_problems

from ..support.commands import ROOT, error_lines

STUDY = """
title = "Two losses & a mistake"
base = "{base}"
seeds = [0]
baseline = "grpo"

[overrides]
model.path = "{model}"
data.path = "{problems}/train.jsonl"
eval.sets.heldout.path = "{problems}/heldout.jsonl"
eval.sets.heldout.max_prompts = 4
train.num_steps = 30
train.minibatches_per_step = 2
rollout.prompts_per_step = 2
rollout.samples_per_prompt = 2
log.tensorboard = false
checkpoint.save_final = false

[arms.grpo]
algorithm.loss = "grpo"

[arms.gmpo]
algorithm.loss = "gmpo"

[arms.broken]
optimizer.lr = 1e30
optimizer.weight_decay = 1e30
"""
TIMEOUT_S = 240


def lab(folder: Path, *argv: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "megatron_gmpo.lab", "study.toml", "--cores", "2", *argv]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def steps(runs: Path, arm: str) -> int:
    path = runs / arm / "seed_0/metrics.jsonl"
    return path.read_text().count('"loss"') if path.exists() else 0


@pytest.mark.slow
def test_a_study_goes_on_where_it_was_interrupted(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    write_addition_problems(tmp_path / "problems")
    model = tiny_model("qwen3_moe", num_layers=1)
    names = {"base": ROOT / "examples/moe/tiny_cpu.toml", "model": model, "problems": tmp_path / "problems"}
    (tmp_path / "study.toml").write_text(STUDY.format(**names))
    runs = tmp_path / "runs/studies/study"

    first = lab(tmp_path)
    deadline = time.monotonic() + TIMEOUT_S
    while min(steps(runs, "grpo"), steps(runs, "gmpo")) < 1:
        assert first.poll() is None, first.communicate()[1]
        assert time.monotonic() < deadline, "the first two trials took no step"
        time.sleep(0.1)  # wait until both run
    first.send_signal(signal.SIGTERM)
    _, errors = first.communicate(timeout=TIMEOUT_S)
    assert first.returncode == 130
    assert error_lines(errors) == ["error: interrupted; the same command continues"]

    second = lab(tmp_path, "--only", "grpo", "broken")
    second.communicate(timeout=TIMEOUT_S)
    finished = (runs / "grpo/seed_0/trial.json").read_bytes()
    third = lab(tmp_path)
    page, errors = third.communicate(timeout=TIMEOUT_S)
    assert third.returncode == 0, errors
    # Neither the finished nor the broken trial runs again.
    assert (runs / "grpo/seed_0/trial.json").read_bytes() == finished
    assert "study: 1 of 3 trials to run" in errors
    for arm in ("grpo", "gmpo"):  # the interruption saved both
        assert "resume" in [
            json.loads(line)["event"]
            for line in (runs / arm / "seed_0/events.jsonl").read_text().splitlines()
        ]

    report = tmp_path / page.strip()
    html = report.read_text()
    assert "Two losses &amp; a mistake" in html
    assert 'src="http' not in html
    numbers = json.loads((report.parent / "numbers.json").read_text())
    assert {trial["arm"]: trial["outcome"] for trial in numbers["trials"]} == {
        "grpo": "finished",
        "gmpo": "finished",
        "broken": "stopped",
    }
    assert "step 1:" in next(trial["reason"] for trial in numbers["trials"] if trial["arm"] == "broken")
    for arm in ("grpo", "gmpo"):
        logged = [json.loads(line) for line in (runs / arm / "seed_0/metrics.jsonl").read_text().splitlines()]
        rewards = [record["reward/mean"] for record in logged if record["step"]]
        assert len(rewards) == 30
        assert numbers["curves"]["reward/mean"][arm]["mean"] == pytest.approx(rewards, rel=1e-3)
    assert (report.parent / "reward.png").stat().st_size > 1000

    fourth = lab(tmp_path, "--report", "--only", "gmpoo")
    _, errors = fourth.communicate(timeout=TIMEOUT_S)
    assert fourth.returncode == 2
    assert error_lines(errors) == ["error: --only gmpoo: the study has no such arm, did you mean 'gmpo'?"]
