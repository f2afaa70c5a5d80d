"""load_config: TOML and dotted overrides into one checked tree, every mistake in one line that names the field."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from megatron_gmpo.config import (
    ALONE_S,
    AlgorithmConfig,
    Config,
    EvalConfig,
    ParallelConfig,
    exit_with_one_line,
    load_config,
)
from megatron_gmpo.errors import InputError

ROOT = Path(__file__).parents[2]

TOML = """
run_dir = "runs/a"

[model]
path = "models/qwen"

[megatron]
moe_router_dtype = "fp32"

[rollout]
stop = ["</answer>"]

[train]
num_steps = 7

[eval.sets.math500]
path = "math500.parquet"

[eval.sets.aime24]
path = "aime24.parquet"
max_prompts = 30
"""


@pytest.fixture
def toml(tmp_path: Path) -> str:
    path = tmp_path / "config.toml"
    path.write_text(TOML)
    return str(path)


def mistake(*argv: str) -> str:
    with pytest.raises(InputError) as caught:
        load_config(list(argv))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_no_arguments_give_the_defaults() -> None:
    assert load_config([]) == Config()


def test_toml_fills_the_tree_and_leaves_the_other_defaults(toml: str) -> None:
    cfg = load_config([toml])
    assert (cfg.run_dir, cfg.model.path, cfg.train.num_steps, cfg.rollout.stop) == (
        "runs/a",
        "models/qwen",
        7,
        ("</answer>",),
    )
    assert cfg.megatron == {"moe_router_dtype": "fp32"}
    assert {name: (data.path, data.max_prompts) for name, data in cfg.eval.sets.items()} == {
        "math500": ("math500.parquet", None),
        "aime24": ("aime24.parquet", 30),
    }
    assert cfg.optimizer == Config().optimizer


def test_overrides_win_over_the_file_and_the_last_one_wins(toml: str) -> None:
    cfg = load_config(
        [
            toml,
            "--train.num_steps",
            "8",
            "--run_dir=runs/b",
            "--train.num_steps",
            "9",
            "--eval.sets.aime24.max_prompts=3",
        ]
    )
    assert (cfg.train.num_steps, cfg.run_dir) == (9, "runs/b")
    assert (cfg.eval.sets["aime24"].max_prompts, cfg.eval.sets["aime24"].path) == (3, "aime24.parquet")


def test_overrides_alone_open_new_tables() -> None:
    cfg = load_config(
        [
            "--eval.sets.gsm8k.path",
            "g.jsonl",
            "--megatron.moe_aux_loss_coeff=0.001",
            "--algorithm.options.dual_clip=3.0",
        ]
    )
    assert cfg.eval.sets["gsm8k"].path == "g.jsonl"
    assert cfg.megatron == {"moe_aux_loss_coeff": 0.001}
    assert cfg.algorithm.options == {"dual_clip": 3.0}


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ("--optimizer.lr=1e-6", "optimizer.lr", 1e-6),
        ("--checkpoint.resume=false", "checkpoint.resume", False),
        ("--parallel.sequence_parallel=true", "parallel.sequence_parallel", True),
        ('--rollout.stop=["a", "b"]', "rollout.stop", ("a", "b")),
        ("--data.split=train[:10]", "data.split", "train[:10]"),
        ("--data.path=2024", "data.path", "2024"),
        ('--data.template="{prompt}\\n"', "data.template", "{prompt}\n"),
        ("--rollout.save_path=", "rollout.save_path", ""),
    ],
)
def test_values_are_toml_or_plain_strings(text: str, field: str, value: object) -> None:
    section, name = field.split(".")
    found = getattr(getattr(load_config([text]), section), name)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("text", ["2025-08-01", "1e3", "12_000", "1979-05-27T07:32:00Z", "007", "true"])
def test_text_that_looks_like_another_type_stays_text(text: str) -> None:
    assert load_config(["--run_dir", text, "--data.path", text]).data.path == text


@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"])))
def test_any_quoted_string_survives(text: str) -> None:
    quoted = text.replace("\\", "\\\\").replace('"', '\\"')
    assert load_config(["--data.system_prompt", f'"{quoted}"']).data.system_prompt == text


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("train.num_step", "train.num_steps"),
        ("parallel.tensor_parallel_size", "parallel.tensor_model_parallel_size"),
        ("algorithm.cliplow", "algorithm.clip_low"),
        ("optimiser", "optimizer"),
        ("lr", "optimizer.lr"),
        ("eval.sets.math500.pth", "eval.sets.*.path"),
    ],
)
def test_an_unknown_key_names_the_nearest(key: str, nearest: str) -> None:
    assert mistake(f"--{key}", "1") == f"unknown config key {key!r}: did you mean {nearest!r}?"


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--train.num_steps", "many"], ["train.num_steps", "'many'", "valid integer"]),
        (["--train.num_steps", "0"], ["train.num_steps", "0", "greater than or equal to 1"]),
        (["--rollout.temperature", "-1"], ["rollout.temperature", "-1", "greater than 0"]),
        (["--rollout.top_p", "1.5"], ["rollout.top_p", "1.5", "less than or equal to 1"]),
        (["--optimizer.adam_beta1", "1"], ["optimizer.adam_beta1", "1", "less than 1"]),
        (["--model.dtype", "fp16"], ["model.dtype", "'fp16'", "'fp32' or 'bf16'"]),
        (["--log.progress", "maybe"], ["log.progress", "'maybe'", "valid boolean"]),
        (["--model", "qwen"], ["model", "'qwen'"]),
        (["--model", "qwen", "--model.path", "p"], ["--model.path", "model is a value"]),
        (["--train.num_steps"], ["--train.num_steps has no value"]),
        (["--seed", "1", "stray"], ["'stray' is not an option"]),
    ],
)
def test_a_wrong_value_is_named_with_its_field(argv: list[str], parts: list[str]) -> None:
    message = mistake(*argv)
    assert all(part in message for part in parts), message


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    assert "nowhere.toml does not exist" in mistake("nowhere.toml")
    (tmp_path / "broken.toml").write_text("[train\n")
    assert "broken.toml cannot be read as TOML" in mistake(str(tmp_path / "broken.toml"))
    assert "cannot be read as TOML" in mistake(str(tmp_path))


def test_unknown_key_in_the_file(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("[rollout]\nprompts_per_steps = 4\n")
    assert mistake(str(tmp_path / "c.toml")).endswith("did you mean 'rollout.prompts_per_step'?")


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (
            ["--parallel.virtual_pipeline_model_parallel_size", "2"],
            ["virtual_pipeline_model_parallel_size needs pipeline_model_parallel_size > 1"],
        ),
        (["--eval.k", "[1, 8]", "--eval.temperature", "1"], ["k = 8", "samples_per_prompt >= 8"]),
        (["--eval.samples_per_prompt", "4"], ["samples_per_prompt > 1", "temperature > 0"]),
        (
            ["--algorithm.clip", "adaptive"],
            ["algorithm.clip = 'adaptive' needs train.minibatches_per_step > 1"],
        ),
        (
            ["--algorithm.clip_bounds", "[0.5, 0.1]"],
            ["clip_bounds = [0.5, 0.1]", "put the smaller value first"],
        ),
        (
            ["--algorithm.mask", "icepop", "--algorithm.mask_low", "6"],
            ["mask_low = 6 is above mask_high = 5"],
        ),
        (
            ["--rollout.engine", "sglang", "--rollout.dtype", "fp32"],
            ["dtype = 'fp32' needs engine = 'embedded'", "sglang.args.dtype"],
        ),
        (
            ["--rollout.engine", "sglang", "--rollout.router_noise", "0.5"],
            ["router_noise = 0.5 needs engine = 'embedded'"],
        ),
        (
            ["--algorithm.moe_routing_replay", "rollout"],
            ["algorithm.moe_routing_replay = 'rollout' needs rollout.routed_experts = true"],
        ),
    ],
)
def test_fields_that_contradict_each_other(argv: list[str], parts: list[str]) -> None:
    message = mistake(*argv)
    assert all(part in message for part in parts), message


def test_fields_that_fit_together() -> None:
    assert AlgorithmConfig(mask="icepop").mask_band == (0.5, 5.0)
    assert AlgorithmConfig(mask="geometric", mask_low=0.9).mask_band == (0.9, 1.01)
    assert (
        ParallelConfig(
            pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2
        ).model_parallel_size
        == 2
    )
    assert EvalConfig(k=(1, 8), samples_per_prompt=8, temperature=0.6).k == (1, 8)
    saved = load_config(["--algorithm.moe_routing_replay", "rollout", "--rollout.replay_path", "rollouts"])
    assert saved.needs_rollout_routing
    assert not load_config(["--algorithm.moe_routing_replay", "policy"]).needs_rollout_routing


@pytest.mark.parametrize(
    ("tp", "sequence_parallel", "expected"),
    [(1, None, False), (2, None, True), (2, False, False), (1, True, False), (2, True, True)],
)
def test_sequence_parallelism_follows_tensor_parallelism(
    tp: int, sequence_parallel: bool | None, expected: bool
) -> None:
    parallel = ParallelConfig(tensor_model_parallel_size=tp, sequence_parallel=sequence_parallel)
    assert parallel.uses_sequence_parallel is expected


def test_the_tree_is_frozen_and_survives_json() -> None:
    cfg = load_config(
        ["--parallel.pipeline_model_parallel_size", "2", "--eval.sets.a.path", "b", "--rollout.stop", '["x"]']
    )
    with pytest.raises(ValidationError):
        cfg.train.num_steps = 3  # pyright: ignore[reportAttributeAccessIssue]
    assert Config.model_validate_json(cfg.model_dump_json()) == cfg


def test_help_lists_every_option_and_exits_0() -> None:
    code = "import sys; from megatron_gmpo.config import load_config; load_config(sys.argv[1:])"
    done = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    options = [
        f"--{section}.{name}" if hasattr(info.annotation, "model_fields") else f"--{section}"
        for section, info in Config.model_fields.items()
        for name in getattr(info.annotation, "model_fields", [section])
    ]
    assert "--optimizer.lr" in options
    assert [option for option in options if option not in done.stdout] == []


@pytest.mark.parametrize(("rank", "waits"), [(None, []), ("0", []), ("3", [ALONE_S])])
def test_user_errors_exit_with_code_2_and_the_first_rank_speaks_first(
    rank: str | None, waits: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    with pytest.raises(SystemExit) as caught:
        exit_with_one_line(InputError("data.path = 'x' does not exist"))
    assert caught.value.code == 2
    assert waited == waits
    assert capsys.readouterr().err == "error: data.path = 'x' does not exist\n"


def test_the_readmes_example_loads(tmp_path: Path) -> None:
    block = re.search(r"```toml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert block
    (tmp_path / "c.toml").write_text(block[1])
    assert load_config([str(tmp_path / "c.toml")]).algorithm.loss == "gmpo"


@pytest.mark.parametrize("path", sorted(ROOT.glob("examples/moe/*.toml")), ids=lambda path: path.name)
def test_every_example_loads(path: Path) -> None:
    assert load_config([str(path)]) != Config()
    assert tomllib.loads(path.read_text())
