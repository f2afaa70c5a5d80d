"""Inputs that hypothesis makes out of valid ones: each is read, or refused with one line.

Every reader may use 10 s of CPU time and 1 GB of memory for an input. The 2,000 inputs of CI are the same in
every run; ``make fuzz`` draws a hundred times as many new ones. An input that once failed is an ``example``.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import resource
import signal
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import tomli_w
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from megatron_gmpo import commands
from megatron_gmpo.batch.assembly import make_train_batch
from megatron_gmpo.batch.columns import RoutingShape
from megatron_gmpo.batch.samples import Prompt, Sample, SampleGroup
from megatron_gmpo.command_line import (
    Options,
    _all_keys,
    load_config,
    parse_options,
    parse_options_and_config,
)
from megatron_gmpo.config import Config
from megatron_gmpo.errors import InputError
from megatron_gmpo.losses.advantages import group_advantages
from megatron_gmpo.losses.objective import make_objective
from megatron_gmpo.models import FAMILIES
from megatron_gmpo.models.description import describe_model
from megatron_gmpo.rollout.replay import load_groups, save_groups
from megatron_gmpo.testing.tiny_models import make_tiny_model
from megatron_gmpo.weights.safetensors_folder import SafetensorsFolder
from megatron_gmpo.weights.table import ConversionTable
from megatron_gmpo.weights.weight_files import INDEX

from ..support.mutations import ODD_TEXTS, damaged, json_files, odd_values, toml_files

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

ROOT = Path(__file__).parents[2]
CPU_S, MEMORY_BYTES = 10.0, 10**9
SCRATCH = tempfile.TemporaryDirectory()
FOLDER = Path(SCRATCH.name)
TIMES = max(1, settings.default.max_examples // 100)  # type: ignore[union-attr]
"""Inputs for each input of CI; above 1 with the profile of ``make fuzz``."""


def inputs(count: int) -> settings:
    return settings(
        max_examples=count * TIMES,
        derandomize=TIMES == 1,
        database=None if TIMES == 1 else settings.default.database,  # type: ignore[union-attr]
        deadline=None,  # of wall time
        suppress_health_check=list(HealthCheck),
    )


class TooSlow(BaseException):
    """An input took more than ``CPU_S`` of CPU time. No handler of the code under test catches this."""


def _too_slow(*_: object) -> None:
    raise TooSlow


@contextmanager
def read_or_refused() -> Iterator[None]:
    """Limit the time and memory of the block, which may raise an InputError of one line."""
    process, (_, hard) = psutil.Process(), resource.getrlimit(resource.RLIMIT_DATA)
    signal.signal(signal.SIGVTALRM, _too_slow)
    resource.setrlimit(resource.RLIMIT_DATA, (process.memory_info().data + MEMORY_BYTES, hard))
    signal.setitimer(signal.ITIMER_VIRTUAL, CPU_S)
    try:
        yield
    except InputError as error:
        assert len(str(error).splitlines()) == 1, str(error)
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))


@functools.cache
def model(family: str) -> Path:
    """Return the folder of a tiny model with two layers."""
    folder = FOLDER / family
    make_tiny_model(folder, family=family, num_layers=2, num_experts=4)  # type: ignore[arg-type]
    return folder


def config_of(family: str) -> dict[str, Any]:
    return json.loads((model(family) / "config.json").read_text())


# Model folders

WORDS_OF_CONFIGS: list[Any] = ["head_dim", "layer_types", "pad_token_id", "quantization_config", "rope_scaling"]
WORDS_OF_CONFIGS += ["rope_parameters", "rope_type", "rope_theta", "factor", "type", "full_attention", "yarn"]
WORDS_OF_CONFIGS += ["llama3", "dynamic", "default", "linear", "silu", "gelu", "float32", "bfloat16", "sliding_attention"]
WORDS_OF_CONFIGS += ["sliding_window", "use_sliding_window", "mlp_only_layers", "moe_layer_freq", "quant_method", "fp8"]
WORDS_OF_CONFIGS += ["dtype", "torch_dtype", "architectures", "attn_implementation", "auto_map", "partial_rotary_factor"]


@inputs(400)
@given(
    st.sampled_from(sorted(FAMILIES)).flatmap(
        lambda family: json_files(lambda: config_of(family), WORDS_OF_CONFIGS)
    )
)
def test_configs_of_models(content: bytes) -> None:
    folder = FOLDER / "config"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_bytes(content)
    cfg = Config.model_validate({"device": "cpu", "model": {"path": str(folder), "dtype": "fp32"}})
    with read_or_refused():
        describe_model(cfg, 1, torch.device("cpu"))
        ConversionTable(folder)


def header_of(family: str) -> dict[str, Any]:
    data = (model(family) / "model.safetensors").read_bytes()
    return json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])


DTYPES = ["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F4", "I64", "I32", "U8", "BOOL", "C64", "F7"]
WORDS_OF_HEADERS = [*DTYPES, "dtype", "shape", "data_offsets", "__metadata__", "format", "pt"]
WORDS_OF_HEADERS += ["model.layers.0.mlp.experts.gate_up_proj", "model.layers.{e}.mlp.experts.down_proj"]
WORDS_OF_HEADERS += ["model.layers.0.self_attn.q_proj.weight_scale_inv", "lm_head.weight", "x.rotary_emb.inv_freq"]


def read_weights(folder: Path) -> None:
    with read_or_refused():
        source = SafetensorsFolder(folder)
        source.check_tied()
        for name in source.names:
            source.shape(name), source.dtype(name), source.get(name)


@inputs(350)
@given(
    st.sampled_from(["qwen3", "qwen3_moe"]).flatmap(
        lambda family: st.tuples(st.just(family), json_files(lambda: header_of(family), WORDS_OF_HEADERS))
    ),
    st.sampled_from([0] * 12 + [-1, 1, 8, 2**26, 2**63]),
    st.sampled_from([0] * 12 + [1, 8, 10**9]),
)
def test_headers_of_safetensors(written: tuple[str, bytes], longer: int, cut: int) -> None:
    family, header = written
    folder = FOLDER / "header"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_bytes((model(family) / "config.json").read_bytes())
    valid = (model(family) / "model.safetensors").read_bytes()
    tensors = valid[8 + struct.unpack("<Q", valid[:8])[0] :]
    length = struct.pack("<Q", (len(header) + longer) % 2**64)
    (folder / "model.safetensors").write_bytes(length + header + tensors[: max(0, len(tensors) - cut)])
    read_weights(folder)


@functools.cache
def sharded() -> Path:
    """Return a folder with the weights in two files and an index."""
    folder, tensors = FOLDER / "sharded", load_file(model("qwen3") / "model.safetensors")
    folder.mkdir()
    (folder / "config.json").write_bytes((model("qwen3") / "config.json").read_bytes())
    for file in ("a.safetensors", "b.safetensors"):
        names = sorted(tensors)[file == "b.safetensors" :: 2]
        save_file({name: tensors[name] for name in names}, folder / file, {"format": "pt"})
    return folder


def index() -> dict[str, Any]:
    names = sorted(load_file(model("qwen3") / "model.safetensors"))
    weight_map = {name: "ab"[place % 2] + ".safetensors" for place, name in enumerate(names)}
    return {"metadata": {"total_size": 5}, "weight_map": weight_map}


@inputs(250)
@given(json_files(index, ["a.safetensors", "b.safetensors", "config.json", INDEX, "weight_map", "lm_head.weight"]))
def test_indexes_of_safetensors(content: bytes) -> None:
    (sharded() / INDEX).write_bytes(content)
    read_weights(sharded())


# Saved rollouts

ROUTING = RoutingShape(num_layers=2, moe_layers=(0, 1), num_experts=8, topk=2)


def group() -> dict[str, Any]:
    """Return a line of a replay file. The encoded arrays are those of ``save_groups``."""
    made = Sample.from_response(
        [1, 2],
        [3, 4, 5],
        [-0.5, -0.25, -1.0],
        text="7",
        finish_reason="stop",
        policy_version=1,
        reward=1.0,
        routed_experts=np.arange(16).reshape(4, 2, 2) % 8,
        version_spans=[[2, 0], [4, 1]],
    )
    other = Sample.from_response(
        [1, 2], [3], [-0.5], text="8", finish_reason="length", policy_version=1, routed_experts=None
    )
    prompt = Prompt("set/1", "7", messages=[{"role": "user", "content": "3 + 4"}], input_ids=[1, 2])
    save_groups(FOLDER / "valid", 0, [SampleGroup(prompt, [made, other])])
    return json.loads((FOLDER / "valid" / "step_000000.jsonl").read_text())


WORDS_OF_GROUPS = [*asdict(Prompt("", "")), "tokens", "response_mask", "token_versions", "version_spans", "base64"]
WORDS_OF_GROUPS += ["shape", "dtype", "int16", "int32", "float32", "bool", "object", "str", "V8", "complex64", "M8[s]"]
WORDS_OF_GROUPS += ["AAAA", "AAAAAA==", "stop", "length", "abort", [1, 2], [True, False], [[0, 1]], [-1, 5], [-1, -1]]


@inputs(350)
@given(json_files(group, WORDS_OF_GROUPS), st.booleans())
def test_saved_rollouts(line: bytes, routing: bool) -> None:
    folder = FOLDER / "replay"
    folder.mkdir(exist_ok=True)
    (folder / "step_000003.jsonl").write_bytes(line)
    with read_or_refused():
        groups = load_groups(folder, 3, vocab_size=10)
        save_groups(FOLDER / "saved", 3, groups)
        make_train_batch(groups, group_advantages(groups), ROUTING if routing else None)


# The config of a run and command lines


@functools.cache
def run_config() -> dict[str, Any]:
    """Return a config with every field that has a value in TOML."""
    content = Config().model_dump(mode="json", exclude_none=True)
    content["model"]["path"] = str(model("qwen3_moe"))
    content["eval"]["sets"] = {"a": {"path": "a.jsonl", "max_prompts": 3}}
    content["algorithm"]["options"] = {"dual_clip": 3.0}
    content["megatron"] = {"moe_router_dtype": "fp32", "attention_dropout": 0.0, "moe_aux_loss_coeff": 0.1}
    return content


WORDS_OF_RUNS: list[Any] = [key.rpartition(".")[2] for key in _all_keys(Config)]
WORDS_OF_RUNS += ["gmpo", "dapo", "sglang", "embedded", "fp8", "bf16", "hybrid", "json:loads", "no_module:f", "adaptive"]
WORDS_OF_RUNS += ["num_layers", "recompute_granularity", "selective", "full", "pipeline_model_parallel_layout", "e4m3"]


@inputs(300)
@given(toml_files(run_config, WORDS_OF_RUNS))
def test_configs_of_runs(content: bytes) -> None:
    path = FOLDER / "run.toml"
    path.write_bytes(content)
    with read_or_refused():
        cfg = load_config([str(path)])
        tomli_w.dumps(cfg.model_dump(mode="json", exclude_none=True)).encode()
        make_objective(cfg.algorithm, is_moe=True, max_new_tokens=cfg.rollout.max_new_tokens)
        describe_model(cfg, 1, torch.device("cpu"))


def command_lines() -> dict[str, tuple[Callable[[list[str]], object], list[str]]]:
    """Return the parser and the keys of every command."""
    found: dict[str, tuple[Callable[[list[str]], object], list[str]]] = {}
    keys = _all_keys(Config)
    for name in commands.NAMES:
        module = import_module("megatron_gmpo.lab.__main__" if name == "lab" else f"megatron_gmpo.commands.{name}")
        schemas = [
            part
            for part in vars(module).values()
            if isinstance(part, type) and issubclass(part, Options) and part.__module__ == module.__name__
        ]
        for schema in schemas:
            own = _all_keys(schema)
            if hasattr(module, "parse_options_and_config"):
                found[name] = functools.partial(parse_options_and_config, schema, prog=name), own + keys
            else:
                found[name] = functools.partial(parse_options, schema, prog=name), own
        if not schemas or hasattr(module, "load_config"):
            found[f"{name} CONFIG"] = functools.partial(load_config, prog=name), keys
    return found


COMMAND_LINES = command_lines()


@st.composite
def arguments(draw: Callable[[st.SearchStrategy[Any]], Any]) -> tuple[str, list[str]]:
    name = draw(st.sampled_from(sorted(COMMAND_LINES)))
    keys = COMMAND_LINES[name][1]
    values = odd_values(WORDS_OF_RUNS).map(lambda value: json.dumps(value, ensure_ascii=False)) | ODD_TEXTS
    words = st.sampled_from(["", "-", "--", "-h", "--help", "-1", "None", "nan", "[1, 2]", "{a = 1}", "'", "{", "@x", "=1"])
    argv: list[str] = []
    for _ in range(draw(st.integers(0, 6))):
        kind = draw(st.sampled_from(["option", "option", "option", "equals", "word"]))
        key = draw(st.sampled_from(keys)).replace("*", draw(st.sampled_from(["a", "NAME", "*", "", "a-b"])))
        if draw(st.integers(0, 5)) == 0:
            key = draw(st.sampled_from([key[:-1], key + ".x", key.upper(), key.replace("_", "-"), "." + key, key + "="]))
        value = draw(words | values)
        argv += [f"--{key}={value}"] if kind == "equals" else [f"--{key}", value] if kind == "option" else [value]
    return name, [word.replace("\0", "") for word in argv]  # the system passes no zero bytes


@inputs(350)
@given(arguments())
def test_command_lines(line: tuple[str, list[str]]) -> None:
    name, argv = line
    with read_or_refused(), contextlib.redirect_stdout(io.StringIO()):
        try:
            COMMAND_LINES[name][0](argv)
        except SystemExit as end:
            assert not end.code
            assert {"-h", "--help"} & set(argv)


def test_every_command_is_covered() -> None:
    assert {name.partition(" ")[0] for name in COMMAND_LINES} == set(commands.NAMES)
