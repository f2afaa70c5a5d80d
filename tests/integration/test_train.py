"""Whole runs of the train and evaluate commands on real Megatron-Core."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pandas
import pytest
import safetensors.torch
import torch
from huggingface_hub import ModelCard, constants

from megatron_gmpo.batch.samples import Episode, Prompt
from megatron_gmpo.command_line import load_config
from megatron_gmpo.commands.model_card import model_card
from megatron_gmpo.commands.push import main as push
from megatron_gmpo.errors import InputError, RunError
from megatron_gmpo.metrics.token_records import Record
from megatron_gmpo.rewards.countdown import countdown_reward
from megatron_gmpo.rollout.replay import load_groups, save_groups
from megatron_gmpo.testing.arithmetic import write_addition_problems
from megatron_gmpo.view.snapshot import read

from ..support.commands import CONFIG, error_lines, json_lines, last_of_report, options, run_module
from ..support.hub import Repository, uploads

pytestmark = pytest.mark.distributed

STABLE_METRICS = [
    "step",
    "loss",
    "grad_norm",
    "reward/mean",
    "reward/std",
    "response_length/mean",
    "policy/entropy",
    "policy/log_ratio_max",
    "policy/log_ratio_min",
    "policy/log_ratio_q001",
    "policy/log_ratio_q999",
    "policy/ratio_effective_sample_size",
    "policy/token_ratio_max",
    "policy/sequence_ratio_max",
    "policy/ratio_max",
    "policy/ratio_min",
    "policy/clip_fraction_high",
    "policy/clip_fraction_low",
    "policy/clip_low",
    "policy/clip_high",
    "policy/kl_old",
    "rollout/logprob_diff_mean",
    "rollout/k3_kl",
    "time/step",
    "time/rollout",
    "time/exchange",
    "time/logprobs",
    "time/train",
    "time/weight_sync",
    "time/other",
    "throughput/tokens_per_second",
]

TERMINAL = "terminal.txt"
"""File next to a run folder with the run's output on stderr."""
EP2 = {"parallel__expert_model_parallel_size": 2}
ADAPTIVE = {"algorithm__clip": "adaptive"}

ONE_REPLAYED_UPDATE: dict[str, Any] = {
    "algorithm__loss": "dr_grpo",
    "train__num_steps": 1,
    "train__minibatches_per_step": 1,
    "eval__before": "false",
    "checkpoint__save_final": "false",
}


@pytest.fixture(scope="module")
def argv(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return the example config with a tiny random model and small steps.

    The reward differs between the responses of such a model.
    """
    problems = tmp_path_factory.mktemp("problems")
    write_addition_problems(problems)
    return [
        CONFIG,
        *options(
            model__path=tiny_model("qwen3_moe", num_layers=2),
            data__path=problems / "train.jsonl",
            data__max_prompts=40,
            eval__sets__heldout__path=problems / "heldout.jsonl",
            eval__sets__heldout__max_prompts=8,
            eval__pass_reward=0.5,
            reward__name="tests.support.rewards:share_of_digits",
            rollout__prompts_per_step=6,
            rollout__samples_per_prompt=4,
            train__minibatches_per_step=3,
            train__max_tokens_per_microbatch=64,
            optimizer__lr=1e-3,
            optimizer__lr_schedule="constant",
            log__tensorboard="false",
            log__tokens_per_step=64,  # every sample of a step
        ),
    ]


@pytest.fixture(scope="module")
def two_steps(argv: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run two steps with expert parallelism; return the run folder, with evaluations and saved rollouts."""
    run_dir = tmp_path_factory.mktemp("run") / "two_steps"
    config = [
        *argv,
        *options(
            run_dir=run_dir,
            train__num_steps=2,
            eval__interval=1,
            eval__samples_per_prompt=4,
            eval__k="[1, 2, 4]",
            eval__temperature=1.0,
            rollout__save_path=run_dir / "rollouts",
            log__tensorboard="true",
            **EP2,
            **ADAPTIVE,
        ),
    ]
    done = run_module("megatron_gmpo.train", *config, ranks=2, fresh=True)
    assert done.returncode == 0, done.stderr
    assert "step 2/2" in done.stderr
    (run_dir.parent / TERMINAL).write_text(done.stderr)
    assert load_config([str(run_dir / "config.toml")]) == load_config(config)
    return run_dir


def test_the_terminal_says_what_runs(two_steps: Path) -> None:
    """Rank 0 prints the headline before the first step, although its module is named __main__."""
    lines = (two_steps.parent / TERMINAL).read_text().splitlines()
    (headline,) = [line for line in lines if " ranks; " in line]
    # the paper has clips for dense models only, so the line says where the value for a MoE comes from
    clip = r"loss gmpo, clip_low 0\.2, clip_high 0\.2 \(MoE: the GMPO authors .*\)"
    model = r"\S+ \(qwen3_moe, MoE\) on 2 ranks; 40 problems of \S+train\.jsonl"
    pattern = rf"{model}; {clip}.*; run_dir {re.escape(str(two_steps))}"
    assert re.fullmatch(pattern, headline)
    first_step = next(number for number, line in enumerate(lines) if "step 1/2" in line)
    assert lines.index(headline) < first_step
    line = next(line for line in lines if "step 2/2" in line)
    shown = r"reward [\d.]+  entropy [\d.]+  grad [\d.e-]+  truncated \d+%  kl old [\d.e-]+  tok/s [\d,]+"
    assert re.search(rf"{shown}  saved \d+%  heldout/pass@1 [\d.]+  [\d.]+ s  0:00:00 left", line)
    assert not [line for line in lines if "it/s" in line or "%|" in line]  # bars of the libraries


def test_a_run_leaves_its_figures_transcripts_and_checkpoint(two_steps: Path) -> None:
    figures = json_lines(two_steps / "metrics.jsonl")
    assert [line["step"] for line in figures] == [0, 1, 2]
    for line in figures[1:]:
        assert [name for name in STABLE_METRICS if line.get(name) is None] == []
        assert 0 < line["reward/mean"] < 1
        assert line["grad_norm"] > 0
        assert line["rollout/logprob_diff_mean"] < 1e-5  # the rollout engine has the policy's weights
        phases = [value for name, value in line.items() if name.startswith("time/") and name != "time/step"]
        assert sum(phases) == pytest.approx(line["time/step"], abs=1e-6)
    # the only checkpoint is that of the last step, whose line has its time
    assert [line.get("time/checkpoint", 0) > 0 for line in figures] == [False, False, True]
    for line in figures:
        pass_at = [line[f"eval/heldout/pass@{k}"] for k in (1, 2, 4)]
        assert 0 < pass_at[0] <= pass_at[1] <= pass_at[2] <= 1
    assert list((two_steps / "tensorboard").glob("events.out.tfevents.*"))
    transcripts = json_lines(two_steps / "transcripts.jsonl")
    assert [line["step"] for line in transcripts] == [1] * 4 + [2] * 4
    assert all(len(line["samples"]) == 4 for line in transcripts)
    assert (two_steps / "checkpoints" / "latest_checkpointed_iteration.txt").read_text() == "2"
    assert (two_steps / "checkpoints" / "iter_0000002" / "state.json").is_file()


def recorded_tokens(run_dir: Path, step: int) -> dict[tuple[str, int], Record]:
    """Return the records of a step by prompt and number of the sample."""
    lines = (run_dir / "tokens" / f"step_{step:06d}.jsonl").read_bytes().splitlines()[1:]
    return {(record.prompt_id, record.index): record for record in map(Record.from_json, lines)}


def test_the_recorded_tokens_have_the_figures_of_the_step(two_steps: Path) -> None:
    """The metrics are reduced on the device over all ranks, and every sample is recorded here."""
    transcripts = {
        (line["step"], line["prompt_id"], index): sample
        for line in json_lines(two_steps / "transcripts.jsonl")
        for index, sample in enumerate(line["samples"])
    }
    for line in json_lines(two_steps / "metrics.jsonl")[1:]:
        records = recorded_tokens(two_steps, line["step"])
        log_ratio, clipped, entropy = (
            np.concatenate([getattr(record, name) for record in records.values()])
            for name in ("log_ratio", "clipped", "entropy")
        )
        assert log_ratio.max() == pytest.approx(line["policy/log_ratio_max"], abs=1e-5)
        assert log_ratio.min() == pytest.approx(line["policy/log_ratio_min"], abs=1e-5)
        assert entropy.mean() == pytest.approx(line["policy/entropy"], abs=1e-5)
        fractions = line["policy/clip_fraction_high"] + line["policy/clip_fraction_low"]
        assert clipped.mean() == pytest.approx(fractions)
        ratios = [record.sequence_ratio for record in records.values()]
        assert max(ratios) == pytest.approx(line["policy/sequence_ratio_max"], rel=1e-5)
        assert min(ratios) == pytest.approx(line["policy/sequence_ratio_min"], rel=1e-5)
        for (prompt_id, index), record in records.items():
            assert abs(record.rollout_difference).max() < 1e-4  # the engine has the policy's weights
            if sample := transcripts.get((line["step"], prompt_id, index)):
                assert record.reward == pytest.approx(sample["reward"])
                assert len(record.ids) == sample["length"]
                text = "".join(record.text)
                assert re.sub("<(pad|bos|eos)>", "", text).strip() == sample["text"].strip()
        assert any((line["step"], *key) in transcripts for key in records)


def test_plot_metrics_draws_the_run(two_steps: Path, tmp_path: Path) -> None:
    done = run_module("tools.plot_metrics", two_steps, "--out", tmp_path / "curves.png")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


TOKEN = "hf_a-token"


@pytest.fixture
def on_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[dict[str, Repository]]:
    """Point the hub's client at a hub on loopback, and yield its repositories."""
    with uploads(TOKEN) as (endpoint, repositories):
        # huggingface_hub reads these from the environment once, when it is imported
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # its storage has another protocol
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield repositories


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_push_uploads_the_folder_that_it_can_also_write(
    two_steps: Path,
    tmp_path: Path,
    on_hub: dict[str, Repository],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = sorted(two_steps.rglob("*"))
    push(["--folder", str(tmp_path / "model"), str(two_steps), "me/tiny-gmpo"])
    assert on_hub == {}
    expected = files_of(tmp_path / "model")
    push([str(two_steps), "me/tiny-gmpo", "--private"])
    repository = on_hub["me/tiny-gmpo"]
    assert repository.visibility == "private"
    assert repository.files == expected | {".gitattributes": b""}
    monkeypatch.chdir(two_steps)
    push([".", "me/tiny-gmpo", "--step", "2"])  # the same run again
    assert repository.messages == ["iter_0000002"] * 2
    listed = capsys.readouterr().out
    assert all(f"MB  {name}\n" in listed for name in expected)
    assert re.search(
        r"/me/tiny-gmpo, a new private repository\n.*/me/tiny-gmpo, a new commit\n", listed, re.DOTALL
    )
    assert sorted(two_steps.rglob("*")) == before
    direct = run_module(
        "tools.convert_megatron_to_hf", *options(megatron=two_steps / "checkpoints", hf=tmp_path / "direct")
    )
    assert direct.returncode == 0, direct.stderr
    assert expected.keys() == {*files_of(tmp_path / "direct"), "README.md", "curves.png"}
    assert expected["model.safetensors"] == (tmp_path / "direct" / "model.safetensors").read_bytes()
    assert expected["curves.png"].startswith(b"\x89PNG")


def test_the_card_has_what_the_run_did(two_steps: Path, tmp_path: Path) -> None:
    push(["--folder", str(tmp_path / "model"), str(two_steps), "me/tiny-gmpo"])
    card = ModelCard.load(tmp_path / "model" / "README.md")
    assert card.data.get("gmpo_run") == two_steps.name
    about = card.data.to_dict()
    assert about["library_name"] == "transformers"
    assert not about.keys() & {"base_model", "license"}
    first, _, last = json_lines(two_steps / "metrics.jsonl")
    assert "| benchmark | figure | step 0 | step 2 |\n| --- | --- | --- | --- |\n" in card.text
    for k in (1, 2, 4):
        cells = [
            f"{line[f'eval/heldout/pass@{k}']:.3f} [{line[f'eval/heldout/ci_low@{k}']:.3f}, "
            f"{line[f'eval/heldout/ci_high@{k}']:.3f}]"
            for line in (first, last)
        ]
        assert f"| heldout | pass@{k} | {cells[0]} | {cells[1]} |" in card.text
    assert f"| `policy/clip_low` | {last['policy/clip_low']:.3g} |" in card.text  # adapted in this run
    for row in ("`optimizer.lr` | 0.001", "`data.path` | train.jsonl", "`seed` | 1234"):
        assert f"| {row} |" in card.text
    assert "zhao2025gmpo" in card.text
    assert "curves.png" in card.text
    assert str(two_steps.parent) not in card.content  # no path of this machine


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (["me/tiny", "--step", "1"], "--step 1: .* has no such checkpoint, only 2"),
        (["me/other"], r"me/other exists and holds 1 files that are not of run 'two_steps': choose another"),
        (["tiny"], "REPO 'tiny' is no name on the hub: give owner/name"),
        (["me/{model}"], "has the name of the base model .*, for which it would be mistaken"),
        (["me/tiny", "--folder", "."], r"--folder \. exists: choose another folder or remove it"),
    ],
)
def test_push_refuses(two_steps: Path, on_hub: dict[str, Repository], given: list[str], line: str) -> None:
    model = Path(load_config([str(two_steps / "config.toml")]).model.path).name
    on_hub["me/other"] = Repository(None, {"README.md": b"mine"})
    with pytest.raises(InputError, match=line):
        push([str(two_steps), *(word.format(model=model) for word in given)])
    assert on_hub.keys() == {"me/other"}


def test_push_needs_a_token_and_a_checkpoint(
    two_steps: Path, tmp_path: Path, on_hub: dict[str, Repository], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.toml").write_text('[model]\npath = "some/model"\n')
    with pytest.raises(InputError, match="has no checkpoint: give the folder of a run that has saved one"):
        push([str(tmp_path), "me/tiny"])
    monkeypatch.setenv("HF_TOKEN", "hf_of-another")
    with pytest.raises(RunError, match=r"the upload to me/tiny failed \(.*401.*run the command again, or"):
        push([str(two_steps), "me/tiny"])
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(InputError, match="no token for the hub: run 'hf auth login', or set HF_TOKEN"):
        push([str(two_steps), "me/tiny"])
    assert on_hub == {}


def test_watch_shows_the_run(two_steps: Path) -> None:
    done = run_module("tools.watch", two_steps, "--once")
    assert done.returncode == 0, done.stderr
    for words in ("step 2/2", "reward", "heldout/pass@1", "checkpoint"):
        assert words in done.stdout


def test_evaluate_judges_the_newest_checkpoint(argv: list[str], two_steps: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(two_steps, run_dir)
    expected = json_lines(run_dir / "metrics.jsonl")[-1]
    sampled = options(run_dir=run_dir, eval__samples_per_prompt=4, eval__k="[1, 2, 4]", eval__temperature=1.0)
    (run_dir / "evaluation_heldout.jsonl").write_text("of an earlier evaluation\n")
    done = run_module("megatron_gmpo.evaluate", *argv, *sampled, *options(**EP2), ranks=2)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["evaluated"] == str(run_dir / "checkpoints" / "iter_0000002")
    assert {name: result[name] for name in expected if name.startswith("eval/")} == pytest.approx(
        {name: value for name, value in expected.items() if name.startswith("eval/")}
    )
    assert len(json_lines(run_dir / "evaluation_heldout.jsonl")) == 8
    model = run_dir / "checkpoints/hf"
    card = model_card(read(run_dir), model, "me/tiny", 2, "base")  # a column beside those of the run
    assert "| benchmark | figure | step 0 | step 2 | step 2, `evaluate` |\n" in card
    (row,) = (line for line in card.splitlines() if line.startswith("| heldout | pass@4 |"))
    assert f"| {result['eval/heldout/pass@4']:.3f} [{result['eval/heldout/ci_low@4']:.3f}, " in row
    other = model_card(read(run_dir), model, "me/tiny", 1, "base")  # of another checkpoint
    assert "`evaluate`" not in other


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (1, {}),
        (4, {"parallel__tensor_model_parallel_size": 2, **EP2}),
        (2, {"parallel__pipeline_model_parallel_size": 2}),
    ],
    ids=["one rank", "tp2 ep2", "pp2"],
)
def test_replayed_rollouts_train_the_same_in_another_layout(
    ranks: int, layout: dict[str, int], argv: list[str], two_steps: Path, tmp_path: Path
) -> None:
    replay = options(
        run_dir=tmp_path,
        train__num_steps=2,
        rollout__replay_path=two_steps / "rollouts",
        eval__before="false",
        checkpoint__save_final="false",
        **layout,
        **ADAPTIVE,
    )
    done = run_module("megatron_gmpo.train", *argv, *replay, ranks=ranks)
    assert done.returncode == 0, done.stderr
    expected, found = (json_lines(folder / "metrics.jsonl") for folder in (two_steps, tmp_path))
    for a, b in zip(expected[1:], found, strict=True):
        assert abs(a["loss"]) > 1e-4
        for name in ("loss", "grad_norm", "policy/log_ratio_max", "policy/entropy", "reward/mean"):
            # the loss is a mean of fp32 terms around 1 that cancel
            assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-7), name
    for step in (1, 2):
        assert_equal_records(recorded_tokens(two_steps, step), recorded_tokens(tmp_path, step))


def assert_equal_records(expected: dict[Any, Record], found: dict[Any, Record]) -> None:
    assert found.keys() == expected.keys()
    for key, record in expected.items():
        other = found[key]
        assert other.text == record.text
        assert other.prompt == record.prompt
        for name in ("log_ratio", "entropy", "rollout_difference"):
            np.testing.assert_allclose(getattr(other, name), getattr(record, name), atol=1e-4)
        assert (other.layers_rerouted is None) == (record.layers_rerouted is None)


def test_dr_grpo_alone_is_the_papers_loss_without_truncated_samples(
    argv: list[str], two_steps: Path, tmp_path: Path
) -> None:
    """With one update a step all ratios are 1. The loss is then minus the mean over sequences of A n / L."""
    chosen = options(
        run_dir=tmp_path,
        algorithm__mask_truncated="true",
        rollout__replay_path=two_steps / "rollouts",
        **ONE_REPLAYED_UPDATE,
    )
    done = run_module("megatron_gmpo.train", *argv, *chosen)
    assert done.returncode == 0, done.stderr
    assert "(usual for PPO), advantage mean (default of dr_grpo); run_dir" in done.stderr
    terms = []
    for group in load_groups(str(two_steps / "rollouts"), 0, vocab_size=2**31):
        mean_reward = fmean(group.rewards)
        terms += [
            (sample.reward - mean_reward) * sample.response_length / 8
            for sample in group.samples
            if sample.finish_reason == "stop"
        ]
    (line,) = json_lines(tmp_path / "metrics.jsonl")
    assert 0 < len(terms) < 24
    assert line["rollout/truncated_fraction"] == pytest.approx(1 - len(terms) / 24)
    assert line["loss"] == pytest.approx(-fmean(terms), rel=1e-5)


def test_turns_are_the_sequences_of_the_loss(argv: list[str], two_steps: Path, tmp_path: Path) -> None:
    """As above, with a sequence for each turn: the third token of a long response is made an observation."""
    groups = load_groups(str(two_steps / "rollouts"), 0, vocab_size=2**31)
    terms = []
    for group in groups:
        mean_reward = fmean(group.rewards)
        for sample in group.samples:
            observed = len(sample.tokens) - sample.response_length + 2
            lengths = [sample.response_length]
            if sample.response_length > 3:
                sample.response_mask[observed], sample.rollout_logprobs[observed] = False, 0.0
                lengths = [2, sample.response_length - 2]
            sample.episode = Episode("done", success=sample.reward > 0)
            terms += [(sample.reward - mean_reward) * length / 8 for length in lengths]
    save_groups(str(tmp_path / "rollouts"), 0, dict(enumerate(groups)))
    chosen = options(
        run_dir=tmp_path / "run",
        algorithm__unit="turn",
        rollout__replay_path=tmp_path / "rollouts",
        **ONE_REPLAYED_UPDATE,
    )
    done = run_module("megatron_gmpo.train", *argv, *chosen)
    assert done.returncode == 0, done.stderr
    assert ", each turn a sequence; run_dir" in done.stderr
    (line,) = json_lines(tmp_path / "run" / "metrics.jsonl")
    assert len(terms) > 24
    assert line["episode/turns"] == pytest.approx(len(terms) / 24)
    assert 0 < line["episode/success"] < 1
    assert line["loss"] == pytest.approx(-fmean(terms), rel=1e-5)
    records = (tmp_path / "run" / "tokens" / "step_000001.jsonl").read_bytes().splitlines()[1:]
    assert {int(turn) for record in map(Record.from_json, records) for turn in record.turn} == {0, 1}


def test_the_rollouts_routing_is_replayed_in_another_layout(
    argv: list[str], two_steps: Path, tmp_path: Path
) -> None:
    replay = options(
        algorithm__moe_routing_replay="rollout",
        train__num_steps=2,
        eval__before="false",
        checkpoint__save_final="false",
    )
    sampling = options(
        run_dir=tmp_path / "ep2",
        rollout__routed_experts="true",
        rollout__save_path=tmp_path / "rollouts",
        **EP2,
    )
    done = run_module("megatron_gmpo.train", *argv, *replay, *sampling, ranks=2)
    assert done.returncode == 0, done.stderr
    saved = options(
        run_dir=tmp_path / "pp2",
        rollout__replay_path=tmp_path / "rollouts",
        parallel__pipeline_model_parallel_size=2,
    )
    done = run_module("megatron_gmpo.train", *argv, *replay, *saved, ranks=2)
    assert done.returncode == 0, done.stderr
    expected, found = (json_lines(tmp_path / name / "metrics.jsonl") for name in ("ep2", "pp2"))
    for a, b in zip((line for line in expected if line["step"]), found, strict=True):
        assert max(a["moe/routing_differs"], b["moe/routing_differs"]) < 0.01
        assert b["loss"] == pytest.approx(a["loss"], abs=1e-7)  # the loss is a sum of terms near 1 and -1
        for name in ("grad_norm", "policy/log_ratio_max", "policy/entropy"):
            assert b[name] == pytest.approx(a[name], rel=1e-4), name
    assert found[-1]["moe/routing_drift"] > 0  # the replay has an effect
    for step in (1, 2):
        records = [recorded_tokens(tmp_path / name, step) for name in ("ep2", "pp2")]
        assert_equal_records(*records)
        counts = [
            np.concatenate(
                [r.layers_rerouted for _, r in sorted(part.items()) if r.layers_rerouted is not None]
            )
            for part in records
        ]
        # the choice between two experts with nearly equal scores may depend on rounding
        assert (counts[0] != counts[1]).mean() < 0.01
        assert counts[0].max() <= 2
        assert counts[0].any()
    without = options(run_dir=tmp_path / "none", rollout__replay_path=two_steps / "rollouts")
    done = run_module("megatron_gmpo.train", *argv, *replay, *without)
    assert done.returncode == 2
    assert error_lines(done.stderr) == [
        "error: sample 0 has no record of its routed experts: generate with rollout.routed_experts = true"
    ]


def test_a_resumed_run_equals_an_unbroken_one(argv: list[str], two_steps: Path, tmp_path: Path) -> None:
    broken, unbroken = tmp_path / "broken", tmp_path / "unbroken"
    shutil.copytree(two_steps, broken)
    # A kill between two checkpoints leaves such a line.
    with (broken / "transcripts.jsonl").open("a") as file:
        file.write(json.dumps({"step": 3, "prompt_id": "lost"}) + "\n")
    shared = options(
        train__num_steps=4,
        eval__interval=1,
        eval__samples_per_prompt=4,
        eval__k="[1, 2, 4]",
        eval__temperature=1.0,
        **EP2,
        **ADAPTIVE,
    )
    for run_dir, resumed in ((broken, "; resumed at step 2\n"), (unbroken, "\n")):
        done = run_module("megatron_gmpo.train", *argv, *shared, *options(run_dir=run_dir), ranks=2)
        assert done.returncode == 0, done.stderr
        assert f"run_dir {run_dir}{resumed}" in done.stderr
    first, second = (
        [_untimed(line) for line in json_lines(folder / "metrics.jsonl")] for folder in (broken, unbroken)
    )
    assert [line["step"] for line in first] == [0, 1, 2, 3, 4]
    assert first == second
    # The checkpoint includes the adapted clip.
    assert first[3]["policy/clip_low"] != first[1]["policy/clip_low"]
    assert (broken / "transcripts.jsonl").read_text() == (unbroken / "transcripts.jsonl").read_text()


def test_a_run_resumes_with_changed_data_only_if_told_to(
    argv: list[str], two_steps: Path, tmp_path: Path
) -> None:
    run_dir, problems = tmp_path / "run", tmp_path / "problems.jsonl"
    shutil.copytree(two_steps, run_dir)
    rows = json_lines(Path(argv[argv.index("--data.path") + 1]))
    problems.write_text("".join(json.dumps(row | {"answer": "9" + row["answer"]}) + "\n" for row in rows))
    edited = [*argv, *options(run_dir=run_dir, data__path=problems, train__num_steps=3, **ADAPTIVE)]
    change = "data has the checkpoint's prompts with other answers"
    metrics = (run_dir / "metrics.jsonl").read_text()
    done = run_module("megatron_gmpo.train", *edited)
    assert done.returncode == 2
    (line,) = error_lines(done.stderr)
    assert line.startswith(f"error: {change}: ")
    assert (run_dir / "metrics.jsonl").read_text() == metrics
    done = run_module("megatron_gmpo.train", *edited, *options(data__allow_changed="true"))
    assert done.returncode == 0, done.stderr
    assert f"{change}; data.allow_changed = true accepts it" in done.stderr
    before, after = (
        json.loads((run_dir / "checkpoints" / f"iter_000000{step}" / "state.json").read_text())["prompts"]
        for step in (2, 3)
    )
    assert after["position"] == before["position"] + 6
    assert after["fingerprint"]["prompts"] == before["fingerprint"]["prompts"]
    assert after["fingerprint"]["answers"] != before["fingerprint"]["answers"]


def _untimed(line: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if not name.startswith(("time/", "throughput/"))}


def test_a_finished_run_is_left_as_it_is(argv: list[str], two_steps: Path) -> None:
    def contents() -> dict[Path, tuple[int, bytes]]:
        return {
            path: (path.stat().st_mtime_ns, path.read_bytes())
            for path in two_steps.rglob("*")
            if path.is_file()
        }

    before = contents()
    done = run_module("megatron_gmpo.train", *argv, *options(run_dir=two_steps, train__num_steps=2))
    assert done.returncode == 0, done.stderr
    assert "has 2 of 2 steps: nothing to do" in done.stdout
    assert contents() == before


@pytest.mark.parametrize("mode", ["drop", "resample"])
def test_dynamic_sampling_with_a_reference_policy(mode: str, argv: list[str], tmp_path: Path) -> None:
    chosen = options(
        run_dir=tmp_path,
        train__num_steps=2,
        train__minibatches_per_step=1,
        rollout__max_new_tokens=1,  # a response is one token, so the rewards of some groups of two agree
        rollout__samples_per_prompt=2,
        rollout__dynamic_sampling=mode,
        algorithm__kl_coef=0.05,
        eval__before="false",
        checkpoint__save_final="false",
    )
    done = run_module("megatron_gmpo.train", *argv, *chosen)
    assert done.returncode == 0, done.stderr
    first, second = json_lines(tmp_path / "metrics.jsonl")
    assert first["rollout/dropped_groups"] > 0
    assert (first["rollout/resample_rounds"] > 0) == (mode == "resample")
    assert first["reward/std"] > 0
    # the reference is the model that the run starts from
    assert first["policy/kl_ref"] == pytest.approx(0, abs=1e-9)
    assert second["policy/kl_ref"] > 1e-6


@pytest.mark.parametrize("minibatches", [3, 1], ids=["in the update", "in the next rollout"])
def test_a_diverged_run_stops_and_says_where(
    minibatches: int, argv: list[str], two_steps: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(two_steps, run_dir)
    diverging = options(
        run_dir=run_dir,
        train__num_steps=9,
        optimizer__lr=1e30,
        train__minibatches_per_step=minibatches,
        **EP2,
    )
    done = run_module("megatron_gmpo.train", *argv, *diverging, ranks=2)
    assert done.returncode == 1
    (line,) = error_lines(done.stderr)
    assert "[rank" not in done.stderr  # torchrun marks a rank's traceback with this prefix
    assert last_of_report(done.stderr) == line
    assert (run_dir / "checkpoints" / "latest_checkpointed_iteration.txt").read_text() == "2"
    assert (run_dir / "checkpoints" / "iter_0000002" / "state.json").is_file()
    if minibatches == 1:
        file = run_dir / "nonfinite_step_000004.safetensors"
        assert line.startswith(
            "error: step 4: the rollout model's logits are not finite under the weights of step 3"
        )
    else:
        file = run_dir / "nonfinite_step_000003.safetensors"
        assert line.startswith("error: step 3: loss is nan")
    assert str(file) in line
    assert line.endswith("iter_0000002")
    batch = safetensors.torch.load_file(file)
    assert int(batch["lengths"].sum()) == len(batch["tokens"])
    assert torch.isfinite(batch["advantages"]).all()
    assert json_lines(run_dir / "events.jsonl")[-1]["event"] == "nonfinite"


def test_the_countdown_example_runs_on_disturbed_rollouts(tmp_path: Path) -> None:
    made = run_module(
        "tools.countdown", "--out", tmp_path, "--num_train", 100, "--num_heldout", 4, "--warm_up_steps", 30
    )
    assert made.returncode == 0, made.stderr
    chosen = options(
        run_dir=tmp_path / "run",
        model__path=tmp_path / "model",
        data__path=tmp_path / "train.jsonl",
        eval__sets__heldout__path=tmp_path / "heldout.jsonl",
        rollout__prompts_per_step=8,
        rollout__routed_experts="true",
        rollout__router_noise=0.5,
        rollout__dtype="bf16",
        algorithm__moe_routing_replay="rollout",
        train__num_steps=2,
        checkpoint__save_final="false",
        log__transcripts_per_step=8,
    )
    done = run_module("megatron_gmpo.train", "examples/moe/countdown_tiny_cpu.toml", *chosen)
    assert done.returncode == 0, done.stderr
    _, first, second = json_lines(tmp_path / "run" / "metrics.jsonl")
    for line in (first, second):
        assert line["moe/routing_differs"] > 0.2
        assert line["rollout/logprob_diff_mean"] > 0.01
    assert "eval/heldout/pass@1" in second
    transcripts = json_lines(tmp_path / "run" / "transcripts.jsonl")
    scored = [
        (Prompt("", answer=line["answer"]), sample) for line in transcripts for sample in line["samples"]
    ]
    assert len(scored) == 2 * 8 * 8
    assert all(countdown_reward(prompt, sample["text"]) == sample["reward"] for prompt, sample in scored)


def test_the_gsm8k_example_runs_on_text_with_the_math_verifier(text_model: Path, tmp_path: Path) -> None:
    problems = tmp_path / "problems.parquet"
    pandas.DataFrame(
        {"problem": ["What is $1+1$?", "What is half of 8?"], "answer": ["2", "#### 4"]}
    ).to_parquet(problems)
    run_dir = tmp_path / "run"
    chosen = options(
        run_dir=run_dir,
        model__path=text_model,
        data__path=problems,
        eval__sets__math500__path=problems,
        eval__sets__aime24__path=problems,
        rollout__max_new_tokens=8,
        rollout__prompts_per_step=2,
        train__num_steps=1,
        checkpoint__save_final="false",
    )
    done = run_module("megatron_gmpo.train", "examples/moe/gsm8k_tiny_cpu.toml", *chosen)
    assert done.returncode == 0, done.stderr
    before, after = json_lines(run_dir / "metrics.jsonl")
    assert {
        "eval/math500/pass@1",
        "eval/math500/pass@2",
        "eval/aime24/pass@1",
        "eval/aime24/pass@2",
    } <= before.keys() & after.keys()
    assert after["reward/timeouts"] == 0
    prompt = json_lines(run_dir / "transcripts.jsonl")[0]["prompt"]
    assert prompt[0]["content"].endswith("put the final answer in \\boxed{}.")
