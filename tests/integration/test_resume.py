"""A run that resumes with changed settings: no counter refers to the settings with which the run started."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from ..support.commands import json_lines, options, run_module, start_module, tiny_run, wait_until

pytestmark = pytest.mark.distributed

LR, MIN_LR = 1e-3, 1e-4
SAVED, SEQUENCES = 2, 8


@pytest.fixture(scope="module")
def argv(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return tiny_run(
        tiny_model("qwen3_moe", num_layers=2),
        tmp_path_factory.mktemp("problems"),
        eval__before="false",
        rollout__samples_per_prompt=2,
        algorithm__clip="adaptive",
        optimizer__lr=LR,
        optimizer__min_lr=MIN_LR,
        optimizer__lr_warmup_steps=3,
        train__num_steps=4,
        train__minibatches_per_step=4,
        checkpoint__save_interval=SAVED,
    )


@pytest.fixture(scope="module")
def unbroken(argv: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run of four steps, with a checkpoint after the second."""
    run_dir = tmp_path_factory.mktemp("run") / "unbroken"
    done = run_module("megatron_gmpo.train", *argv, *options(run_dir=run_dir))
    assert done.returncode == 0, done.stderr
    return run_dir


def copy_as_saved(unbroken: Path, run_dir: Path) -> None:
    """Copy the folder of a run of four steps, with the second step's checkpoint as the last one."""
    shutil.copytree(unbroken, run_dir)
    shutil.rmtree(run_dir / "checkpoints" / "iter_0000004")
    (run_dir / "checkpoints" / "latest_checkpointed_iteration.txt").write_text(str(SAVED))


@pytest.fixture
def resumed(argv: list[str], unbroken: Path, tmp_path: Path) -> Callable[..., Path]:
    """Return a function that resumes the run after its second step, and returns its folder."""

    def resume(*, earlier_version: bool = False, **changed: object) -> Path:
        run_dir = tmp_path / "resumed"
        copy_as_saved(unbroken, run_dir)
        if earlier_version:
            file = run_dir / "checkpoints" / "iter_0000002" / "state.json"
            state = json.loads(file.read_text())
            state["scheduler"] = {"num_steps": state.pop("updates")}
            state["clip"] = {side: state["clip"][side] for side in ("low", "high")}
            del state["collapse"]["window"], state["prompts"]["shuffle"], state["prompts"]["fingerprint"]
            del state["files"], state["checksum"]
            file.write_text(json.dumps(state))
        done = run_module("megatron_gmpo.train", *argv, *options(run_dir=run_dir, **changed))
        assert done.returncode == 0, done.stderr
        return run_dir

    return resume


def learning_rate(step: int, *, minibatches: int, num_steps: int, warmup: int) -> float:
    """Return the mean over the updates of a step of the linear schedule that docs/running.md describes."""
    total = num_steps * minibatches
    found = []
    for update in range(1, min(minibatches, SEQUENCES) + 1):
        position = (step - 1) * minibatches + update
        if position <= warmup:
            found.append(LR * position / warmup)
        else:
            left = 1 - (position - warmup) / (total + 1 - warmup)
            found.append(MIN_LR + (LR - MIN_LR) * left)
    return fmean(found)


SCHEDULE = {"minibatches": 4, "num_steps": 4, "warmup": 3}
CHANGES: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "nothing": ({}, {}),
    "the version of the program": ({"earlier_version": True}, {}),
    "fewer minibatches": ({"train__minibatches_per_step": 2}, {"minibatches": 2}),
    "more minibatches": ({"train__minibatches_per_step": 8}, {"minibatches": 8}),
    "more minibatches than sequences": ({"train__minibatches_per_step": 16}, {"minibatches": 16}),
    "more steps": ({"train__num_steps": 7}, {"num_steps": 7}),
    "a longer warmup": ({"optimizer__lr_warmup_steps": 11}, {"warmup": 11}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_learning_rate_is_that_of_a_run_with_these_settings(
    change: str, resumed: Callable[..., Path], unbroken: Path
) -> None:
    changed, schedule = CHANGES[change]
    run_dir = resumed(**changed)
    lines = json_lines(run_dir / "metrics.jsonl")
    known = json_lines(unbroken / "metrics.jsonl")
    assert lines[:SAVED] == known[:SAVED]
    assert [line["step"] for line in lines] == list(range(1, 1 + schedule.get("num_steps", 4)))
    for line in lines:
        settings = SCHEDULE if line["step"] <= SAVED else SCHEDULE | schedule
        assert line["learning_rate"] == pytest.approx(learning_rate(line["step"], **settings), rel=1e-6)
    if not schedule:
        assert [line["loss"] for line in lines] == [line["loss"] for line in known]
    # Adam's bias correction counts the updates that were made
    (newest,) = (run_dir / "checkpoints").glob(f"iter_{lines[-1]['step']:07d}")
    updates = json.loads((newest / "state.json").read_text())["updates"]
    made = min(schedule.get("minibatches", 4), SEQUENCES)
    assert updates == SAVED * 4 + (len(lines) - SAVED) * made


def test_prompts_and_clip_go_on_where_they_were(resumed: Callable[..., Path], unbroken: Path) -> None:
    run_dir = resumed(rollout__prompts_per_step=2, algorithm__clip_high=0.3, seed=7)

    def prompts(folder: Path) -> list[tuple[int, str]]:
        return [(line["step"], line["prompt_id"]) for line in json_lines(folder / "transcripts.jsonl")]

    known = [name for _, name in prompts(unbroken)]
    assert len(set(known)) == 4 * 4
    assert prompts(run_dir) == list(zip([1] * 4 + [2] * 4 + [3] * 2 + [4] * 2, known[:12], strict=True))
    before, after = (json_lines(folder / "metrics.jsonl")[SAVED] for folder in (unbroken, run_dir))
    assert before["policy/clip_low"] != 0.2  # it has adapted, and goes on from there
    assert after["policy/clip_low"] == before["policy/clip_low"]
    assert before["policy/clip_high"] != 0.2
    assert after["policy/clip_high"] == 0.3  # the config asks for another clip


def test_it_equals_an_unbroken_run_bit_for_bit(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """Both leave out sequences without advantage and a pass for the first old log probabilities."""
    argv = tiny_run(
        tiny_model("qwen3", num_layers=2),
        tmp_path,
        eval__before="false",
        rollout__samples_per_prompt=2,
        rollout__max_new_tokens=2,  # few different rewards
        optimizer__lr=LR,
        train__num_steps=4,
        train__minibatches_per_step=2,
        checkpoint__save_interval=SAVED,
    )
    unbroken, resumed = tmp_path / "unbroken", tmp_path / "resumed"
    for run_dir in (unbroken, resumed):
        if run_dir == resumed:
            copy_as_saved(unbroken, resumed)
        done = run_module("megatron_gmpo.train", *argv, *options(run_dir=run_dir))
        assert done.returncode == 0, done.stderr
    known, lines = (
        [{k: v for k, v in line.items() if not k.startswith(("time/", "throughput/"))} for line in read]
        for read in (json_lines(folder / "metrics.jsonl") for folder in (unbroken, resumed))
    )
    assert lines == known
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(0 < line["train/computed_tokens"] < 1 for line in lines[SAVED:])
    for file in (unbroken / "checkpoints" / "iter_0000004").glob("*.distcp"):  # weights and moments
        assert (resumed / "checkpoints" / "iter_0000004" / file.name).read_bytes() == file.read_bytes()


def test_a_run_killed_within_an_episode_plays_it_again(text_model: Path, tmp_path: Path) -> None:
    """The trainer is killed in step 2, while environments work. All steps equal the unbroken run's."""
    go, problems = tmp_path / "go", tmp_path / "problems.jsonl"
    rows = [{"problem": f"task {i}", "answer": "hold" if i == 2 else "go"} for i in range(6)]
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = tiny_run(
        text_model,
        tmp_path / "sums",
        data__path=problems,
        data__shuffle="false",
        rollout__environment="tests.support.games:Echo",
        rollout__environment_args__hold=go,
        rollout__max_new_tokens=6,
        rollout__max_episode_tokens=500,
        rollout__prompts_per_step=2,
        rollout__samples_per_prompt=2,
        reward__name="environment",
        train__num_steps=3,
        checkpoint__save_interval=1,
        log__transcripts_per_step=2,
    )
    go.touch()
    unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"
    done = run_module("megatron_gmpo.train", *argv, *options(run_dir=unbroken))
    assert done.returncode == 0, done.stderr
    go.unlink()
    with start_module("megatron_gmpo.train", *argv, *options(run_dir=killed)) as process:
        wait_until(lambda: len(list(tmp_path.glob("go.*"))) == 2, process, "the second turn of step 2")
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert [line["step"] for line in json_lines(killed / "metrics.jsonl")] == [1]
    go.touch()
    done = run_module("megatron_gmpo.train", *argv, *options(run_dir=killed))
    assert done.returncode == 0, done.stderr
    known, lines = (
        [
            {
                k: v
                for k, v in line.items()
                if not k.startswith(("time/", "throughput/")) and "seconds" not in k
            }
            for line in json_lines(folder / "metrics.jsonl")
        ]
        for folder in (unbroken, killed)
    )
    assert lines == known
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert [line["rollout/failed_groups"] for line in lines] == [0, 0, 0]
    # the policy computes whole episodes, and the engine each turn anew
    assert all(line["rollout/logprob_diff_max"] < 1e-4 for line in lines)
    known, lines = (json_lines(folder / "transcripts.jsonl") for folder in (unbroken, killed))
    assert [line["prompt_id"] for line in lines] == [line["prompt_id"] for line in known]
    assert [[s["text"] for s in line["samples"]] for line in lines] == [
        [s["text"] for s in line["samples"]] for line in known
    ]
