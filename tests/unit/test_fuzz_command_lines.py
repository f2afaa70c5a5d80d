"""Changed configs of runs and command lines are accepted, or refused with one line; see ``test_fuzz.py``."""

from __future__ import annotations

import contextlib
import functools
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

import pytest
import tomli_w
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from megatron_gmpo import commands
from megatron_gmpo.command_line import (
    Options,
    Positional,
    _all_keys,
    load_config,
    parse_options,
    parse_options_and_config,
)
from megatron_gmpo.config import Config
from megatron_gmpo.losses.objective import make_objective
from megatron_gmpo.models.description import describe_model

from ..support.fuzzing import (
    FOLDER,
    ODD_TEXTS,
    Draw,
    inputs,
    model,
    odd_values,
    read_or_refused,
    toml_files,
)

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

ROOT = Path(__file__).parents[2]


@functools.cache
def run_config() -> dict[str, Any]:
    """Return a config with every field that has a value in TOML."""
    content = Config().model_dump(mode="json", exclude_none=True)
    content["model"]["path"] = str(model("qwen3_moe"))
    content["eval"]["sets"] = {"a": {"path": "a.jsonl", "max_prompts": 3}}
    content["algorithm"]["options"] = {"dual_clip": 3.0}
    content["megatron"] = {"moe_router_dtype": "fp32", "moe_aux_loss_coeff": 0.1}
    return content


WORDS_OF_RUNS = " ".join(key.rpartition(".")[2] for key in _all_keys(Config))
WORDS_OF_RUNS += """
    gmpo dapo adaptive json:loads no_module:f sglang embedded fp8 bf16 hybrid e4m3 num_layers selective full
    recompute_granularity pipeline_model_parallel_layout moe_router_topk hidden_size
"""


def describe(content: bytes) -> None:
    path = FOLDER / "run.toml"
    path.write_bytes(content)
    cfg = load_config([str(path)])
    tomli_w.dumps(cfg.model_dump(mode="json", exclude_none=True)).encode()
    make_objective(cfg.algorithm, is_moe=True, max_new_tokens=cfg.rollout.max_new_tokens)
    describe_model(cfg, 1, torch.device("cpu"))


@inputs(300)
@example(b"seed = " + b"9" * 5000)
@example(b"seed = " + b"[" * 100_000)
@given(toml_files(run_config, WORDS_OF_RUNS))
def test_configs_of_runs(content: bytes) -> None:
    with read_or_refused():
        describe(content)


def test_the_unchanged_config_is_accepted() -> None:
    describe(tomli_w.dumps(run_config()).encode())


@dataclass
class CommandLine:
    """The parser, the keys and the required words of a command."""

    parse: Callable[..., object]
    keys: list[str]
    required: list[str]


def command_lines() -> dict[str, CommandLine]:
    """Return the command line of every command."""
    found: dict[str, CommandLine] = {}
    keys = _all_keys(Config)
    for name in commands.NAMES:
        module = import_module(
            "megatron_gmpo.lab.__main__" if name == "lab" else f"megatron_gmpo.commands.{name}"
        )
        schemas = [
            part
            for part in vars(module).values()
            if isinstance(part, type) and issubclass(part, Options) and part.__module__ == module.__name__
        ]
        for schema in schemas:
            required = [
                "1" if Positional in field.metadata else f"--{key}={[*get_args(field.annotation), 1][0]}"
                for key, field in schema.model_fields.items()
                if field.is_required()
            ]
            with_config = hasattr(module, "parse_options_and_config")
            parse = functools.partial(parse_options_and_config if with_config else parse_options, schema)
            found[name] = CommandLine(parse, _all_keys(schema) + keys * with_config, required)
        if not schemas or hasattr(module, "load_config"):
            found[f"{name} CONFIG"] = CommandLine(
                load_config, keys, [str(ROOT / "examples/moe/tiny_cpu.toml")]
            )
    return found


COMMAND_LINES = command_lines()


WORDS_OF_LINES = [
    "",
    *["-", "--", "-h", "--help", "-1", "None", "nan", "[1,2]", "{a=1}", "'", "{", "@x", "=1"],
    "[" * 5000,
    "{a = " * 2000,
]


@st.composite
def arguments(draw: Draw) -> tuple[str, list[str]]:
    """Return a command and arguments: in three of four cases the required ones, then up to six others."""
    name = draw(st.sampled_from(sorted(COMMAND_LINES)))
    line = COMMAND_LINES[name]
    json_values = odd_values(WORDS_OF_RUNS.split()).map(lambda value: json.dumps(value, ensure_ascii=False))
    values = st.sampled_from([*WORDS_OF_LINES, "[" + "9" * 5000]) | json_values | ODD_TEXTS
    argv = [*draw(st.sampled_from([[]] + [line.required] * 3))]
    for _ in range(draw(st.integers(0, 6))):
        key = draw(st.sampled_from(line.keys)).replace(
            "*", draw(st.sampled_from(["a", "NAME", "*", "", "a-b"]))
        )
        if draw(st.integers(0, 5)) == 0:
            wrong = [key[:-1], f"{key}.x", key.upper(), key.replace("_", "-"), f".{key}", f"{key}="]
            key = draw(st.sampled_from(wrong))
        value = draw(values)
        argv += draw(st.sampled_from([[f"--{key}", value], [f"--{key}={value}"]] * 4 + [[value]]))
    return name, [word.replace("\0", "") for word in argv]  # the system passes no zero bytes


@inputs(350)
@example(("train CONFIG", ["/dev/zero"]))
@example(("train CONFIG", ["a\nb"]))
@example(("lab", ["1", "--out", "[0]"]))
@example(("train CONFIG", ["--megatron.x", "[" * 5000]))
@example(("train CONFIG", ["--megatron.x", "9" * 5000]))
@given(arguments())
def test_command_lines(line: tuple[str, list[str]]) -> None:
    name, argv = line
    with read_or_refused(), contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        COMMAND_LINES[name].parse(argv, prog="megatron-gmpo")


def test_the_required_arguments_are_accepted() -> None:
    for line in COMMAND_LINES.values():
        line.parse(line.required, prog="megatron-gmpo")


def test_every_command_is_covered() -> None:
    assert {name.partition(" ")[0] for name in COMMAND_LINES} == set(commands.NAMES)
