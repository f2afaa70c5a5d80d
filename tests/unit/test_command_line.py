"""The command line: files, options and values; help that parses back; one-line errors for all mistakes."""

from __future__ import annotations

import importlib
import inspect
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field

from megatron_gmpo import commands
from megatron_gmpo.command_line import (
    ALONE_S,
    Options,
    Positional,
    as_argument,
    exit_with_one_line,
    load_config,
    one_line_errors,
    parse_options,
    parse_options_and_config,
)
from megatron_gmpo.config import Config, DataConfig
from megatron_gmpo.errors import InputError, NonFiniteError
from megatron_gmpo.metrics.messages import PrintableLines

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


@pytest.mark.slow
@settings(deadline=None)
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
        (["--train.num_steps", "--seed", "1"], ["--train.num_steps has no value"]),
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


def test_a_stray_argument_is_named(toml: str) -> None:
    assert "'stray' is not an option" in mistake(toml, "--seed", "1", "stray")
    assert "'stray' is not an option" in mistake("--seed", "1", toml, "stray")


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


def test_a_run_error_is_one_line_with_its_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught, one_line_errors():
        raise NonFiniteError("the loss is nan")
    assert caught.value.code == 1
    assert capsys.readouterr().err == "error: the loss is nan\n"


# --- help ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def printed() -> dict[str, tuple[str, str]]:
    """Return what ``python -m megatron_gmpo.train --help`` prints: option -> (form of its value, default)."""
    done = subprocess.run(
        [sys.executable, "-m", "megatron_gmpo.train", "--help"],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        env=os.environ | {"COLUMNS": "10000"},
    )
    assert done.returncode == 0, done.stderr
    entries = re.findall(r"^  --(\S+) (\S.*)\n((?: {6}.*\n)*)", done.stdout, re.MULTILINE)
    defaults = {name: re.search(r"\(default: (.*)\)$", about) for name, _, about in entries}
    return {name: (form, found[1] if (found := defaults[name]) else "") for name, form, _ in entries}


def test_help_prints_every_field(printed: dict[str, tuple[str, str]]) -> None:
    fields = {
        f"{section}.{name}" if hasattr(info.annotation, "model_fields") else section
        for section, info in Config.model_fields.items()
        for name in getattr(info.annotation, "model_fields", [section])
    }
    tables = {
        *("megatron", "algorithm.options", "sglang.args", "eval.sets", "data.chat_template_kwargs"),
        "rollout.environment_args",
    }
    assert {"optimizer.lr", "run_dir"} <= fields
    assert fields - tables <= printed.keys()
    assert printed.keys() - fields == {
        *(f"{table}.NAME" for table in tables - {"eval.sets"}),
        *(f"eval.sets.NAME.{name}" for name in DataConfig.model_fields if f"data.{name}" not in tables),
        "eval.sets.NAME.chat_template_kwargs.NAME",
        "eval.sets.NAME.report_by",
    }


def test_printed_defaults_are_the_defaults(printed: dict[str, tuple[str, str]]) -> None:
    defaults = {name: default for name, (_, default) in printed.items() if ".NAME" not in name}
    assert "" not in defaults.values()
    assert load_config([word for name in defaults for word in (f"--{name}", defaults[name])]) == Config()


WORDS = {"INT": ["3"], "FLOAT": ["0.5"], "TEXT": ["some/text"], "PATH": ["some/path"], "VALUE": ["7"]}
"""Form in the help -> values that match it."""
IN_RANGE = {
    "collapse.grad_norm_factor": "2.5",
    "sglang.hang_timeout_s": "60",
    "supervision.hang_timeout_s": "900.5",
    "train.minibatches_per_step": "2",
}
SGLANG = ["--rollout.engine", "sglang"]
COMPANIONS: dict[str, list[str]] = {
    "algorithm.clip": ["--train.minibatches_per_step", "2"],
    "algorithm.moe_routing_replay": ["--rollout.routed_experts", "true"],
    "collapse.action": ["--checkpoint.save_interval", "20"],
    "eval.k": ["--eval.samples_per_prompt", "4", "--eval.temperature", "1"],
    "eval.samples_per_prompt": ["--eval.temperature", "1"],
    "fp8.format": ["--fp8.recipe", "tensorwise"],
    "fp8.moe_router_padding_for_quantization": ["--fp8.recipe", "tensorwise"],
    "fp8.num_layers_at_end_in_bf16": ["--fp8.recipe", "tensorwise"],
    "fp8.num_layers_at_start_in_bf16": ["--fp8.recipe", "tensorwise"],
    "fp8.param": ["--fp8.recipe", "tensorwise"],
    "optimizer.min_lr": ["--optimizer.lr", "1"],
    "optimizer.overlap_param_gather": ["--optimizer.overlap_grad_reduce", "true"],
    "parallel.virtual_pipeline_model_parallel_size": ["--parallel.pipeline_model_parallel_size", "2"],
    "rollout.environment_args.NAME": ["--rollout.environment", "a"],
    "rollout.keep_thinking": ["--rollout.environment", "a"],
    "rollout.max_episode_tokens": ["--rollout.environment", "a", "--rollout.max_new_tokens", "1"],
    "rollout.max_staleness": SGLANG,
    "rollout.placement": SGLANG,
    "rollout.server_urls": SGLANG,
    "rollout.servers_file": SGLANG,
}
"""Other options that an option needs."""


def cases(name: str, form: str) -> Iterator[list[str]]:
    """Yield values that match a form, each as a list of words."""
    form, several, _ = form.partition(" [")
    words: list[str] = []
    for part in form.split("|"):
        words += part.strip("{}").split(",") if part.startswith("{") else WORDS.get(part, [part])
    if name in IN_RANGE:
        words = [IN_RANGE[name]]
    yield from ([word] for word in words)
    if several:
        yield {"INT": ["1", "3"], "FLOAT": ["0.25", "0.5"], "TEXT": ["a", "b"]}[form]


@pytest.mark.slow
def test_every_option_that_help_prints_parses(printed: dict[str, tuple[str, str]]) -> None:
    for name, (form, _) in printed.items():
        for words in cases(name, form):
            if name == "algorithm.clip_bounds" and len(words) == 1 and words != ["None"]:
                continue  # this option takes two numbers
            argv = [*COMPANIONS.get(name, []), f"--{name}", *words]
            found: Any = load_config(argv)
            for part in name.split("."):
                found = found[part] if isinstance(found, dict) else getattr(found, part)
            written = [{"None": None, "true": True, "false": False, "7": 7}.get(word, word) for word in words]
            if isinstance(found, tuple):
                assert [str(value) for value in found] == words, argv
            elif isinstance(found, int | float) and not isinstance(found, bool):
                assert found == float(words[0]), argv
            else:
                assert found == written[0], argv
            if len(words) == 1:
                assert load_config([*COMPANIONS.get(name, []), f"--{name}={words[0]}"]) == load_config(argv)


def schemas_of_commands() -> list[type[Options]]:
    """Return the schema of every command's own options."""
    modules = [*(f"megatron_gmpo.commands.{name}" for name in commands.NAMES), "megatron_gmpo.lab.__main__"]
    values = [value for module in modules for value in vars(importlib.import_module(module)).values()]
    return [value for value in values if inspect.isclass(value) and Options in value.__bases__]


@pytest.mark.parametrize("schema", schemas_of_commands(), ids=lambda schema: schema.__name__)
def test_every_option_that_a_commands_help_prints_parses(
    schema: type[Options], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "10000")
    with pytest.raises(SystemExit):
        parse_options(schema, ["--help"], "example")
    text = capsys.readouterr().out
    forms = dict(re.findall(r"^  --([a-z]\w*)(?: (\S.*))?$", text, re.MULTILINE))
    positional = [name.lower() for name in re.findall(r"^  ([A-Z_]+)(?: \[.*)?$", text, re.MULTILINE)]
    fields = {field.alias or name: (name, field) for name, field in schema.model_fields.items()}
    assert fields.keys() == {*forms, *positional}
    needed = ["3" if fields[name][1].annotation is int else "some/path" for name in positional]
    for name, form in forms.items():
        if fields[name][1].is_required():
            needed += [f"--{name}", *next(cases(name, form))]
    for name, form in forms.items():
        for words in cases(name, form) if form else [[]]:
            found = parse_options(schema, [*needed, f"--{name}", *words], "example")
            value = getattr(found, fields[name][0])
            written = [as_argument(part) for part in (value if isinstance(value, tuple) else [value])]
            assert written == (words or ["true"]), name


def test_a_list_is_one_toml_value_or_several_values() -> None:
    rest = ["--eval.samples_per_prompt", "4", "--eval.temperature", "1"]
    assert load_config([*rest, "--eval.k", "1", "4"]).eval.k == (1, 4)
    assert load_config([*rest, "--eval.k", "[1, 4]"]).eval.k == (1, 4)
    assert load_config(["--rollout.stop", "</answer>"]).rollout.stop == ("</answer>",)
    assert load_config(["--rollout.stop", "[]"]).rollout.stop == ()
    assert load_config(["--rollout.stop", '"]"', "'[a'"]).rollout.stop == ("]", "[a")
    assert load_config(["--algorithm.clip_bounds", ".5", "1."]).algorithm.clip_bounds == (0.5, 1.0)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("False", False),
        ("True", True),
        ("true", True),
        ("None", None),
        ("0.1", 0.1),
        ("alltoall", "alltoall"),
        ('"False"', "False"),
        ("[0, 1]", [0, 1]),
        ("-1e-3", -1e-3),
        (".001", 0.001),
        ("1.e-3", 0.001),
        ("-.5", -0.5),
        ("[False, .5]", [False, 0.5]),
        ("007", "007"),
        ("2025-8-1", "2025-8-1"),
        ("os.sep", "os.sep"),
        ("1+1j", "1+1j"),
        ("{a: 1}", "{a: 1}"),
    ],
)
def test_values_of_open_tables(text: str, value: object) -> None:
    """A value is written as in TOML or in Python, or it is text."""
    cfg = load_config([f"--megatron.some_field={text}", f"--algorithm.options.some_field={text}"])
    for found in (cfg.megatron, cfg.algorithm.options):
        assert found == {"some_field": value}
        assert type(found["some_field"]) is type(value)


@pytest.mark.parametrize(
    ("value", "expected"),
    [("False", False), ("false", False), ("True", True), ("off", "off"), ("0.5", "0.5"), (0.5, 0.5), (1, 1)],
)
def test_switches_of_servers_are_bools(value: object, expected: object) -> None:
    """A switch of sglang.launch_server takes no value, so the text "False" can only mean a bool."""
    found = Config.model_validate({"sglang": {"args": {"x": value}}}).sglang.args["x"]
    assert found == expected
    assert type(found) is type(expected)


def test_sections_and_tables_can_be_inline_tables() -> None:
    assert load_config(["--algorithm.options", "{dual_clip = 3.0}"]).algorithm.options == {"dual_clip": 3.0}
    cfg = load_config(["--train", "{num_steps = 3}", "--train.minibatches_per_step", "2"])
    assert (cfg.train.num_steps, cfg.train.minibatches_per_step) == (3, 2)
    assert load_config(
        ["--eval.sets", '{a = {path = "x"}}', "--eval.sets.b-1.path", "y"]
    ).eval.sets.keys() == {
        "a",
        "b-1",
    }


@pytest.mark.parametrize("text", ["-0.01", "-1e-3", "-1E-3", "-.5e-2"])
def test_a_negative_number_is_a_value(text: str) -> None:
    assert load_config(["--algorithm.entropy_coef", text]).algorithm.entropy_coef == float(text)


@settings(deadline=None)
@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"])))
def test_any_string_survives_as_an_argument(text: str) -> None:
    assert load_config([f"--data.system_prompt={as_argument(text)}"]).data.system_prompt == text


# --- options of commands ------------------------------------------------------------------------------------


class Example(Options):
    """Do an example."""

    folder: Annotated[Path, Positional]
    """Folder to read."""
    out_file: Path
    """File to write."""
    count: Annotated[int, Field(ge=1)] = 3
    """Number, 100 % of them."""
    names: tuple[str, ...] = ()
    """Names."""
    dry_run: bool = False
    """Write nothing."""


def test_paths_of_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    found = parse_options(Example, ["~/data", "--out_file=~/x", "--names", "~"], "example")
    assert (found.folder, found.out_file) == (Path("/home/ann/data"), Path("/home/ann/x"))
    assert found.names == ("~",)  # names are not paths
    for argv in (["", "--out_file", "x"], ["data", "--out_file", ""], ["data", "--out_file="]):
        with pytest.raises(InputError, match="= '': Input should not be empty"):
            parse_options(Example, argv, "example")


def test_a_positional_with_a_default() -> None:
    class Optional(Options):
        folder: Annotated[Path, Positional] = Path("here")

    assert parse_options(Optional, [], "example").folder == Path("here")
    assert parse_options(Optional, ["there"], "example").folder == Path("there")


def test_options_of_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--dry-run", "data", "--out_file=x", "--count", "5", "--names", "a", "b"]
    expected = Example(folder=Path("data"), out_file=Path("x"), count=5, names=("a", "b"), dry_run=True)
    assert parse_options(Example, argv, "example") == expected
    own, cfg = parse_options_and_config(Example, [*argv, "--train.num_steps", "4"], "example")
    assert (own, cfg.train.num_steps) == (expected, 4)
    with pytest.raises(SystemExit) as caught:
        parse_options(Example, ["--help"], "example")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for part in ("Do an example.", "--out_file PATH", "--dry_run\n", "Number, 100 % of them. (default: 3)"):
        assert part in text


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        ([], "the following arguments are required: --out_file; --help lists the options"),
        (["--out_file", "x"], "the following arguments are required: FOLDER; --help lists the options"),
        (["data"], "the following arguments are required: --out_file; --help lists the options"),
        (["data", "--out_fil", "x"], "unknown option '--out_fil': did you mean '--out_file'?"),
        (
            ["data", "--out_file", "x", "--count", "0"],
            "count = '0': Input should be greater than or equal to 1",
        ),
        (["data", "more", "--out_file", "x"], "argument 'more' is not an option"),
        (["data", "--out_file"], "--out_file has no value"),
    ],
)
def test_mistakes_in_a_commands_options(argv: list[str], line: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_options(Example, argv, "example")
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)


# --- commands -----------------------------------------------------------------------------------------------


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=120, cwd=ROOT)


def test_the_list_of_commands_has_a_line_for_each_and_imports_nothing() -> None:
    code = (
        "import sys; from megatron_gmpo import commands; sys.argv[1:] = ['--help']; commands.main();"
        "print(sorted({'torch', 'pydantic', 'rich'} & sys.modules.keys()))"
    )
    done = run("-c", code)
    lines = done.stdout.splitlines()
    assert lines[-1] == "[]"
    assert [line.split()[0] for line in lines if line.startswith("  ")] == list(commands.NAMES)
    assert all(len(line.split()) > 4 for line in lines if line.startswith("  "))


def test_every_command_has_help_without_torch() -> None:
    code = """
import contextlib, io, sys
from megatron_gmpo import commands
for name in commands.NAMES:
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        commands.run(name, ["--help"])
    print(name, out.getvalue().startswith("usage: ") and f"megatron-gmpo {name}" in out.getvalue())
print("torch", "torch" in sys.modules)
"""
    done = run("-c", code)
    assert done.stdout.splitlines() == [*(f"{name} True" for name in commands.NAMES), "torch False"], (
        done.stderr
    )


def test_an_unknown_command_names_the_nearest() -> None:
    done = run("-m", "megatron_gmpo", "trian")
    assert done.returncode == 2
    assert done.stderr == "error: unknown command 'trian': did you mean 'train'? --help lists all\n"
    dashes = run("-m", "megatron_gmpo", "slurm-attempt", "nothing")
    assert dashes.returncode == 2
    assert dashes.stderr.startswith(
        "error: unknown action 'nothing': write megatron-gmpo slurm_attempt begin"
    )


TOOLS = sorted(path.stem for path in (ROOT / "tools").glob("*.py") if path.stem != "__init__")


def test_tools_are_commands() -> None:
    assert len(TOOLS) == 21
    assert set(TOOLS) <= set(commands.NAMES)
    entry = re.search(r'"megatron-gmpo = (\S+):(\w+)"', (ROOT / "setup.py").read_text())
    assert entry
    assert (entry[1], entry[2]) == (commands.__name__, commands.main.__name__)


@pytest.mark.slow
@pytest.mark.parametrize("name", TOOLS)
def test_a_tool_runs_by_its_path_and_as_a_module(name: str) -> None:
    for start in ([f"tools/{name}.py"], ["-m", f"tools.{name}"]):
        done = run(*start, "--help")
        assert done.returncode == 0, done.stderr
        assert f"megatron-gmpo {name}" in done.stdout


def test_a_value_may_begin_with_a_dash() -> None:
    cfg = load_config(
        ["--data.template", "-{prompt}", "--eval.pass_reward", "-1e-3", "--sglang.args.x", "-7"]
    )
    assert (cfg.data.template, cfg.eval.pass_reward, cfg.sglang.args) == ("-{prompt}", -1e-3, {"x": -7})


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain é 🍎 = 3", "plain é 🍎 = 3"),
        ("\x1b[2Jerror", "\\x1b[2Jerror"),
        ("a\x9b2J\x07\x00\x7f", "a\\x9b2J\\x07\\x00\\x7f"),
        ("one\r\ntwo\tthree\u2028four", "one\\r\\ntwo\\tthree\\u2028four"),
        ("\u202etxt.exe", "\\u202etxt.exe"),
        ("caf\udce9", "caf\\udce9"),
    ],
)
def test_an_error_line_cannot_control_the_terminal(
    text: str, shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        exit_with_one_line(InputError(text))
    assert capsys.readouterr().err == f"error: {shown}\n"


def test_log_lines_cannot_control_the_terminal() -> None:
    """The lines of a traceback stay apart."""
    record = logging.LogRecord("x", logging.WARNING, "", 0, "server %s\n\x1b[2J", ("a\rb",), None)
    assert PrintableLines("%(message)s").format(record) == "server a\\rb\n\\x1b[2J"
