"""Files that hypothesis makes out of valid ones: each is read, or refused with one line.

Every reader may use 10 s of CPU time and 1 GB of memory for an input. With the
inputs of ``test_fuzz_command_lines.py`` there are more than 2,000, the same in every run of CI; ``make fuzz``
draws a hundred times as many new ones. An input that once failed is an ``example``.
"""

from __future__ import annotations

import contextlib
import functools
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from megatron_gmpo.batch.columns import RoutingShape
from megatron_gmpo.batch.samples import Episode, Prompt, Sample, SampleGroup
from megatron_gmpo.checkpoint import check_model
from megatron_gmpo.config import CollapseConfig, Config
from megatron_gmpo.data.stream import PromptStream
from megatron_gmpo.errors import InputError
from megatron_gmpo.losses.adaptive_clip import AdaptiveClip, make_adaptive_clip
from megatron_gmpo.losses.advantages import group_advantages
from megatron_gmpo.losses.objective import make_objective
from megatron_gmpo.metrics.collapse import CollapseDetector
from megatron_gmpo.models import FAMILIES
from megatron_gmpo.models.description import describe_model
from megatron_gmpo.rollout.replay import load_groups, save_groups
from megatron_gmpo.run import _check_resume
from megatron_gmpo.supervision.records import LATEST
from megatron_gmpo.weights.run_checkpoint import read_state, write_state
from megatron_gmpo.weights.safetensors_folder import SafetensorsFolder
from megatron_gmpo.weights.table import ConversionTable
from megatron_gmpo.weights.weight_files import INDEX

from ..support.fuzzing import (
    FOLDER,
    SINGLE,
    inputs,
    json_files,
    model,
    read_or_refused,
)
from ..support.groups import index_of, step_batch
from ..support.run_states import newest

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def config_of(family: str) -> dict[str, Any]:
    return json.loads((model(family) / "config.json").read_text())


# Model folders

WORDS_OF_CONFIGS = """
    head_dim layer_types pad_token_id quantization_config quant_method fp8 rope_scaling rope_parameters
    rope_type rope_theta factor type partial_rotary_factor yarn llama3 dynamic default linear full_attention
    sliding_attention sliding_window use_sliding_window mlp_only_layers moe_layer_freq silu gelu float32
    bfloat16 dtype torch_dtype architectures attn_implementation auto_map
"""


def read_config(content: bytes) -> None:
    folder = FOLDER / "config"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_bytes(content)
    cfg = Config.model_validate({"device": "cpu", "model": {"path": str(folder), "dtype": "fp32"}})
    describe_model(cfg, 1, torch.device("cpu"))
    ConversionTable(folder)


@inputs(400)
@given(
    st.sampled_from(sorted(FAMILIES)).flatmap(
        lambda family: json_files(lambda: config_of(family), WORDS_OF_CONFIGS)
    )
)
def test_configs_of_models(content: bytes) -> None:
    with read_or_refused():
        read_config(content)


@pytest.mark.parametrize(("family", "changes"), [("qwen2_moe", {"num_attention_heads": 3})])
def test_found_configs_of_models(family: str, changes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="it must divide the 3 heads"):
        read_config(json.dumps(config_of(family) | changes).encode())


def header_of(family: str) -> dict[str, Any]:
    data = (model(family) / SINGLE).read_bytes()
    return json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])


WORDS_OF_HEADERS = """
    F64 F32 F16 BF16 F8_E4M3 F8_E5M2 F4 I64 I32 U8 BOOL C64 F7 dtype shape data_offsets __metadata__ format pt
    model.layers.0.mlp.experts.gate_up_proj model.layers.{e}.mlp.experts.down_proj lm_head.weight
    model.layers.0.self_attn.q_proj.weight_scale_inv x.rotary_emb.inv_freq
"""


def read_weights(folder: Path) -> None:
    source = SafetensorsFolder(folder)
    if json.loads((folder / "config.json").read_text())["tie_word_embeddings"]:
        source.check_tied()
    for name in source.names:
        source.shape(name), source.dtype(name), source.get(name)


def read_header(family: str, header: bytes, longer: int = 0, cut: int = 0) -> None:
    folder = FOLDER / "header"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_bytes((model(family) / "config.json").read_bytes())
    valid = (model(family) / SINGLE).read_bytes()
    tensors = valid[8 + struct.unpack("<Q", valid[:8])[0] :]
    length = struct.pack("<Q", (len(header) + longer) % 2**64)
    (folder / SINGLE).write_bytes(length + header + tensors[: max(0, len(tensors) - cut)])
    read_weights(folder)


@inputs(350)
@given(
    st.sampled_from(["qwen3", "qwen3_moe"]).flatmap(
        lambda family: st.tuples(st.just(family), json_files(lambda: header_of(family), WORDS_OF_HEADERS))
    ),
    st.sampled_from([0] * 12 + [-1, 1, 8, 2**26, 2**63]),
    st.sampled_from([0] * 12 + [1, 8, 10**9]),
)
def test_headers_of_safetensors(written: tuple[str, bytes], longer: int, cut: int) -> None:
    with read_or_refused():
        read_header(*written, longer, cut)


@functools.cache
def sharded() -> Path:
    """Return a folder with the weights in two files and an index."""
    folder, tensors = FOLDER / "sharded", load_file(model("qwen3") / SINGLE)
    folder.mkdir()
    (folder / "config.json").write_bytes((model("qwen3") / "config.json").read_bytes())
    for file in ("a.safetensors", "b.safetensors"):
        names = sorted(tensors)[file == "b.safetensors" :: 2]
        save_file({name: tensors[name] for name in names}, folder / file, {"format": "pt"})
    return folder


def index() -> dict[str, Any]:
    names = sorted(load_file(model("qwen3") / SINGLE))
    weight_map = {name: "ab"[place % 2] + ".safetensors" for place, name in enumerate(names)}
    return {"metadata": {"total_size": 5}, "weight_map": weight_map}


def read_index(content: bytes) -> None:
    (sharded() / INDEX).write_bytes(content)
    read_weights(sharded())


@inputs(250)
@given(json_files(index, f"a.safetensors b.safetensors config.json weight_map lm_head.weight {INDEX}"))
def test_indexes_of_safetensors(content: bytes) -> None:
    with read_or_refused():
        read_index(content)


# The state of a run

IDENTITY = {"model_type": "qwen3", "hidden_size": 64, "dtype": "fp32"}
PROMPTS = [Prompt(str(number), "7", text="3 + 4", input_ids=[1, 2]) for number in range(5)]
CLIPPED = Config.model_validate({"train": {"minibatches_per_step": 2}, "algorithm": {"clip": "adaptive"}})


def state() -> dict[str, Any]:
    """Return the state of step 6 as ``TrainingState.start_save`` writes it."""
    detector = CollapseDetector(CollapseConfig(window=2))
    for step in range(4):
        detector.update(step, {"policy/entropy": 1.0, "grad_norm": 1.0, "reward/mean": 0.5})
    return {
        "step": 6,
        "world_size": 1,
        "model": IDENTITY,
        "updates": 12,
        "prompts": PromptStream(PROMPTS, 1, True).state_dict(),
        "clip": clip().state_dict(),
        "collapse": detector.state_dict(),
        "config": {"train": {"freeze_router": False}, "seed": 1},
        "files": {".metadata": [5, "0123456789abcdef"]},
    }


def clip() -> AdaptiveClip:
    made = make_adaptive_clip(
        CLIPPED.algorithm, make_objective(CLIPPED.algorithm, is_moe=True, max_new_tokens=8)
    )
    assert made
    return made


WORDS_OF_STATES = """
    scheduler num_steps rollbacks window signals history streak best steps squares policy/entropy grad_norm
    low high loss start gmpo seed epoch position num_prompts shuffle fingerprint any_order .. ../x random
"""


def with_part(name: str, *, remove: str = "", **changes: Any) -> bytes:
    """Return a state.json in which a part has other fields."""
    whole = state()
    whole[name] = {field: value for field, value in whole[name].items() if field != remove} | changes
    return json.dumps(whole).encode()


def with_rewards(**changes: Any) -> bytes:
    """Return a state.json in which the signal of the reward has other fields."""
    signals = state()["collapse"]["signals"]
    signals["reward/mean"] |= changes
    return with_part("collapse", signals=signals)


def resume(content: bytes, signed: bool) -> None:
    """Read what a resume reads of state.json. ``signed`` adds the checksum of the content."""
    checkpoint = FOLDER / "checkpoints" / "iter_0000006"
    checkpoint.mkdir(parents=True, exist_ok=True)
    (checkpoint.parent / LATEST).write_text("6")
    (checkpoint / ".metadata").write_bytes(b"12345")
    (checkpoint / "state.json").write_bytes(content)
    if signed:
        with contextlib.suppress(ValueError, AttributeError, RecursionError):
            write_state(checkpoint, json.loads(content))
    assert newest(checkpoint.parent) == checkpoint
    check_model(checkpoint, IDENTITY)
    _check_resume(Config(), checkpoint)
    saved = read_state(checkpoint)
    torch.tensor(float(saved.updates)), saved.world_size + 1
    if saved.prompts:
        PromptStream(PROMPTS, 1, True).load_state_dict(saved.prompts)
    if saved.clip:
        clip().load_state_dict(saved.clip)
    detector = CollapseDetector(CollapseConfig(window=2))
    detector.load_state_dict(saved.collapse)
    detector.update(7, {"policy/entropy": 1.0, "grad_norm": 1.0, "reward/mean": 0.5})


@inputs(250)
@example(b'{"step": 6}', False)
@example(with_part("files", x=5), True)
@example(with_part("config", train=[]), True)
@example(with_part("collapse", remove="rollbacks"), True)
@example(with_part("collapse", signals=None), True)
@example(with_part("collapse", rollbacks=10**400), True)
@example(with_rewards(squares=-5.0), True)
@example(with_part("clip", low="x"), True)
@example(with_part("clip", remove="high"), True)
@example(with_part("clip", start=[]), True)
@given(json_files(state, WORDS_OF_STATES), st.sampled_from([True, True, True, False]))
def test_states_of_runs(content: bytes, signed: bool) -> None:
    with read_or_refused():
        resume(content, signed)


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
    said = [{"role": "assistant", "content": "8"}, {"role": "user", "content": "No."}]
    other = Sample.from_response(
        [1, 2],
        [3],
        [-0.5],
        text="8",
        finish_reason="length",
        policy_version=1,
        routed_experts=None,
        episode=Episode("turns", "sums", 0.5, False, 1, 0, 0.25, said),
    )
    prompt = Prompt("set/1", "7", messages=[{"role": "user", "content": "3 + 4"}], input_ids=[1, 2])
    save_groups(FOLDER / "valid", 0, {0: SampleGroup(prompt, [made, other])})
    record = json.loads((FOLDER / "valid" / "step_000000" / "rank_00000.jsonl").read_text())
    columns = {
        "tokens": [1, 2, 3],
        "response_mask": [False, False, True],
        "rollout_logprobs": [0.0, 0.0, -0.5],
    }
    record["samples"][1] |= columns | {"routed_experts": [[[0, 1], [2, 3]]] * 2, "version_spans": [[2, 1]]}
    return record


WORDS_OF_GROUPS = """
    id answer text messages input_ids role content tokens response_mask token_versions version_spans base64
    shape dtype int16 int32 float32 bool object str V8 complex64 M8[s] AAAA AAAAAA== stop length abort
    episode ended name reward success tool_calls tool_errors seconds error done turns
"""
ARRAYS: list[Any] = [[1, 2], [True, False], [0.5, -1e300], [[0, 1]], [-1, 5], [-1, -1], [[[0, 0]]], 2**31 - 1]


def train_on(line: bytes, routing: bool) -> None:
    folder = FOLDER / "replay"
    folder.mkdir(exist_ok=True)
    (folder / "step_000003.jsonl").write_bytes(line)
    groups = load_groups(folder, 3, vocab_size=10)
    save_groups(FOLDER / "saved", 3, dict(enumerate(groups)))
    step_batch(groups, group_advantages(index_of(groups)), ROUTING if routing else None)


def with_versions(versions: Any) -> bytes:
    """Return a line in the format of earlier versions, with one version per token."""
    record = group()
    record["samples"][0]["token_versions"] = versions
    return json.dumps(record).encode()


@inputs(350)
@example(with_versions("7"), False)
@given(json_files(group, WORDS_OF_GROUPS, ARRAYS), st.booleans())
def test_saved_rollouts(line: bytes, routing: bool) -> None:
    with read_or_refused():
        train_on(line, routing)


def test_the_unchanged_files_are_read() -> None:
    """Otherwise each change would be refused for the same reason."""
    for family in FAMILIES:
        read_config(json.dumps(config_of(family)).encode())
        read_header(family, json.dumps(header_of(family)).encode())
    read_index(json.dumps(index()).encode())
    resume(json.dumps(state()).encode(), signed=True)
    train_on(json.dumps(group()).encode(), routing=True)
