"""The household example and its demo: whole runs on episodes of the built-in game."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from megatron_gmpo.batch.samples import Prompt
from megatron_gmpo.rollout.environments.household import Household
from megatron_gmpo.testing.household import make_household

from ..support.commands import json_lines, options, run_module
from ..support.demos import demo_result

pytestmark = pytest.mark.distributed

CONFIG = "examples/agents/household_tiny_cpu.toml"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a model that few expert episodes have taught some of the commands."""
    out = tmp_path_factory.mktemp("household")
    make_household(out, num_train=100, num_unseen=6, num_experts=8, warm_up_steps=60)
    return out


def settings(made: Path, **others: object) -> dict[str, object]:
    paths = {"model__path": made / "model", "data__path": made / "train.jsonl"}
    paths["eval__sets__unseen__path"] = made / "unseen.jsonl"
    return paths | {"rollout__prompts_per_step": 8, "train__num_steps": 2} | others


def played_anew(answer: str, turns: list[dict[str, str]]) -> tuple[list[dict[str, Any]], float, bool]:
    """Return the messages, the reward and the success of the same commands in a new game."""
    game = Household()
    game.reset(Prompt("", answer))
    messages, reward, success = [], 0.0, False
    for command in [turn for turn in turns if turn["role"] == "assistant"]:
        observation = game.step(command["content"])
        messages += [command, *observation.messages]
        reward, success = reward + observation.reward, observation.done
    return messages, reward, success


def test_the_figures_of_a_run_are_those_of_its_episodes_played_anew(made: Path, tmp_path: Path) -> None:
    chosen = settings(made, run_dir=tmp_path, checkpoint__save_final="false", log__transcripts_per_step=8)
    done = run_module("megatron_gmpo.train", CONFIG, *options(**chosen))
    assert done.returncode == 0, done.stderr
    before, *steps = json_lines(tmp_path / "metrics.jsonl")
    # a reward of 1 is success
    for line in (before, steps[-1]):
        assert line["eval/unseen/success"] == line["eval/unseen/pass@1"]
    transcripts = json_lines(tmp_path / "transcripts.jsonl")
    for line in steps:
        episodes = []
        for record in (record for record in transcripts if record["step"] == line["step"]):
            for sample in record["samples"]:
                messages, reward, success = played_anew(record["answer"], sample["turns"])
                assert sample["turns"] == messages
                assert sample["reward"] == pytest.approx(reward)
                episodes.append((json.loads(record["answer"])["kind"], reward, success, len(messages) // 2))
        kinds, rewards, successes, turns = zip(*episodes, strict=True)
        assert len(episodes) == 8 * 8
        assert max(rewards) > 0
        assert line["reward/mean"] == pytest.approx(fmean(rewards))
        assert line["episode/success"] == pytest.approx(fmean(successes))
        assert line["episode/turns"] == pytest.approx(fmean(turns))
        for kind in set(kinds):
            of_kind = [success for each, success in zip(kinds, successes, strict=True) if each == kind]
            assert line[f"episode/success/{kind}"] == pytest.approx(fmean(of_kind))
        assert line["rollout/logprob_diff_max"] < 1e-4
        assert line["grad_norm"] > 0


@pytest.mark.slow
def test_the_last_line_of_the_demo_is_its_result(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    words = options(**settings(made, eval__interval=1))
    result = demo_result("household", made, words, tmp_path, monkeypatch, capfd)
    rates = ["success_before", "success_before_interval", "success_after", "success_after_interval"]
    assert list(result) == [*rates, "seconds", "run_dir"]
    assert re.fullmatch(r"runs/demo-\d{8}-\d{6}", result["run_dir"])
    before, _, after = json_lines(Path(result["run_dir"]) / "metrics.jsonl")
    assert result["success_before"] == before["eval/unseen/success"]
    assert result["success_after"] == after["eval/unseen/success"]
    ends = [after[f"eval/unseen/ci_{end}@success"] for end in ("low", "high")]
    assert result["success_after_interval"] == pytest.approx(ends, abs=1e-4)
    page = (Path(result["run_dir"]) / "page.html").read_text()
    assert "Successful episodes of an evaluation" in page
    assert result["seconds"] > 0
