"""A run on problems with images: both engines against the policy, evaluation, transcripts, and a replay."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_gmpo.testing.tiny_models import make_tiny_model

from ..support.commands import CONFIG, json_lines, options, run_module
from ..support.sglang_servers import PYTHON, needs_sglang
from ..support.vision import SIZES, picture

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def argv(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return the arguments of a run of two steps on eight problems with one or two images each."""
    folder = tmp_path_factory.mktemp("vision")
    make_tiny_model(folder / "model", family="qwen3_vl", num_layers=2, randomize_norms=True)
    for seed, size in enumerate(SIZES):
        (folder / f"{seed}.{'png' if seed % 3 else 'jpg'}").write_bytes(picture(*size, seed=seed))
    names = [path.name for path in sorted(folder.glob("*.??g"))]
    rows: list[dict[str, Any]] = []
    for number in range(8):
        shown = [names[number % 4]] if number < 4 else [names[number % 4], names[(number + 1) % 4]]
        rows.append({"problem": f"{'<image>' * len(shown)} {number}?", "answer": "7", "images": shown})
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"path": str(folder / "problems.jsonl"), "prompt_column": "problem", "image_column": "images"}
    data |= {"max_pixels": 20_000}
    chosen: dict[str, object] = {
        "model__path": folder / "model",
        "model__dtype": "fp32",
        **{f"data__{name}": value for name, value in data.items()},
        "data__use_chat_template": "true",
        **{f"eval__sets__heldout__{name}": value for name, value in data.items()},
        "eval__interval": 2,
        "eval__before": "false",
        "eval__samples_per_prompt": 1,
        "eval__k": "[1]",
        "reward__name": "tests.support.rewards:share_of_digits",
        "rollout__prompts_per_step": 4,
        "rollout__samples_per_prompt": 4,
        "rollout__max_new_tokens": 8,
        "rollout__temperature": 1.0,
        "train__num_steps": 2,
        "log__tensorboard": "false",
        "log__transcripts_per_step": 2,
    }
    return [CONFIG, *options(**chosen)]


def test_a_run_and_its_replay_in_another_layout(argv: list[str], tmp_path: Path) -> None:
    """The images of the replay come from the folder of the saved rollouts alone."""
    saved = tmp_path / "saved"
    first, second = tmp_path / "first", tmp_path / "second"
    done = run_module("megatron_gmpo.train", *argv, *options(run_dir=first, rollout__save_path=saved))
    assert done.returncode == 0, done.stderr
    steps = [line for line in json_lines(first / "metrics.jsonl") if "loss" in line]
    assert len(steps) == 2
    for line in steps:
        assert line["rollout/logprob_diff_mean"] < 1e-5
        assert line["grad_norm"] > 0
    names = sorted(file.name for file in (first / "images").iterdir())
    assert len(names) == len(SIZES)
    assert sorted(file.name for file in (saved / "images").iterdir()) == names
    for group in json_lines(first / "transcripts.jsonl"):
        assert 1 <= len(group["images"]) <= 2
        assert set(group["images"]) <= set(names)
    replay = options(
        run_dir=second, rollout__replay_path=saved, parallel__context_parallel_size=2, eval__interval=0
    )
    done = run_module("megatron_gmpo.train", *argv, *replay, ranks=2)
    assert done.returncode == 0, done.stderr
    assert sorted(file.name for file in (second / "images").iterdir()) == names
    again = [line for line in json_lines(second / "metrics.jsonl") if "loss" in line]
    for one, other in zip(steps, again, strict=True):
        for figure in ("loss", "grad_norm", "reward/mean", "rollout/logprob_diff_mean"):
            assert other[figure] == pytest.approx(one[figure], rel=1e-3, abs=1e-6)


@needs_sglang
@pytest.mark.slow
def test_servers_agree_with_the_policy(argv: list[str], tmp_path: Path) -> None:
    """The tower is frozen and not sent, and the verification finds all other weights replaced."""
    settings = {
        "run_dir": tmp_path / "run",
        "rollout__engine": "sglang",
        "sglang__python": PYTHON,
        "weight_sync__verify": "true",
    }
    done = run_module("megatron_gmpo.train", *argv, *options(**settings))
    assert done.returncode == 0, done.stderr
    steps = [line for line in json_lines(tmp_path / "run/metrics.jsonl") if "loss" in line]
    assert len(steps) == 2
    assert max(line["rollout/logprob_diff_mean"] for line in steps) < 1e-5
