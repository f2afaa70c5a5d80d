"""describe_model: the TransformerConfig it builds from config.json and layout, and the errors it raises."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import NoneType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from megatron.core.transformer import MLATransformerConfig, TransformerConfig
from megatron.core.transformer.enums import AttnBackend

from megatron_gmpo.batch.columns import RoutingShape
from megatron_gmpo.config import Config
from megatron_gmpo.errors import InputError
from megatron_gmpo.models.description import ModelDescription, describe_model
from megatron_gmpo.models.fusions import FUSIONS, describe_fusions, fusions_off
from megatron_gmpo.models.layout import check_layout
from megatron_gmpo.rollout.embedded_model import check_embedded_fits

CPU = torch.device("cpu")
TP, PP, VPP = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
)
CP, EP, ETP = "context_parallel_size", "expert_model_parallel_size", "expert_tensor_parallel_size"
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 2048}
Describe = Callable[..., ModelDescription]


@pytest.fixture
def describe(tiny_model: Callable[..., Path], tmp_path: Path) -> Describe:
    """Return ``describe(family, world_size, hf={changes of config.json}, **sections)``.

    The models have 4 layers, 4 heads in 2 groups and 8 experts.
    """

    def make(
        family: str = "qwen3_moe", world_size: int = 1, *, hf: dict[str, Any] | None = None, **sections: Any
    ) -> ModelDescription:
        source = tiny_model(family)
        path = tmp_path / "model"
        path.mkdir(exist_ok=True)
        written = json.loads((source / "config.json").read_text()) | (hf or {})
        (path / "config.json").write_text(json.dumps(written))
        tree = {"device": "cpu", "model": {"path": str(path), "dtype": "fp32"}} | sections
        return describe_model(Config.model_validate(tree), world_size, CPU)

    return make


def mistake(describe: Describe, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(InputError) as caught:
        describe(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_moe_model(describe: Describe) -> None:
    description = describe("qwen3_moe", 8, parallel={TP: 2, PP: 2, EP: 2})
    transformer = description.transformer
    assert description.is_moe
    assert (
        transformer.num_layers,
        transformer.num_attention_heads,
        transformer.num_query_groups,
        transformer.kv_channels,
    ) == (4, 4, 2, 32)
    assert (transformer.num_moe_experts, transformer.moe_router_topk, transformer.moe_ffn_hidden_size) == (
        8,
        2,
        64,
    )
    assert (transformer.tensor_model_parallel_size, transformer.expert_model_parallel_size) == (2, 2)
    assert transformer.sequence_parallel
    assert transformer.qk_layernorm
    assert description.rope == {"rotary_base": 1e6, "rotary_percent": 1.0}
    assert not description.use_transformer_engine


ALL_ON = "apply_rope_fusion on, bias_activation_fusion on, moe_permute_fusion on"


@pytest.mark.parametrize(
    ("fields", "off"),
    [
        ({"num_moe_experts": 8}, {}),
        ({"num_moe_experts": 8, "context_parallel_size": 2}, {}),
        ({}, {"moe_permute_fusion": "the model has no experts"}),
        (
            {"num_moe_experts": 8, "multi_latent_attention": True},
            {"apply_rope_fusion": "the kernel of latent attention is experimental"},
        ),
        (
            {"num_moe_experts": 8, "rotary_interleaved": True},
            {"apply_rope_fusion": "Megatron passes rotary_interleaved to no kernel for packed sequences"},
        ),
        (
            {"num_moe_experts": 8, "use_te_activation_func": True},
            {"bias_activation_fusion": "use_te_activation_func fuses it otherwise"},
        ),
    ],
)
def test_fusions_are_on_unless_something_forbids_them(fields: dict[str, Any], off: dict[str, str]) -> None:
    assert fusions_off(fields) == off
    said = describe_fusions(fields | {name: name not in off for name in FUSIONS})
    expected = ALL_ON
    for name, reason in off.items():
        expected = expected.replace(f"{name} on", f"{name} off ({reason})")
    assert said == expected


def test_fusions_that_the_config_turns_off() -> None:
    fields = {"num_moe_experts": 8} | dict.fromkeys(FUSIONS, True) | {"apply_rope_fusion": False}
    said = describe_fusions(fields)
    assert said == ALL_ON.replace("apply_rope_fusion on", "apply_rope_fusion off (in the config)")


def test_no_fusion_without_transformer_engine(describe: Describe) -> None:
    description = describe()
    assert [getattr(description.transformer, name) for name in FUSIONS] == [False, False, False]
    assert description.fusions == ""


def test_a_shared_expert(describe: Describe) -> None:
    transformer = describe("qwen2_moe").transformer
    assert (transformer.moe_shared_expert_intermediate_size, transformer.moe_ffn_hidden_size) == (128, 64)
    assert transformer.moe_shared_expert_gate
    assert transformer.moe_router_pre_softmax
    assert transformer.add_qkv_bias
    assert not describe("qwen2_moe", hf={"norm_topk_prob": True}).transformer.moe_router_pre_softmax
    assert not describe("qwen2_moe", hf={"qkv_bias": False}).transformer.add_qkv_bias
    assert describe("qwen2_moe", hf={"mlp_only_layers": [0, 3]}).transformer.moe_layer_freq == [0, 1, 1, 0]


def test_mixtral(describe: Describe) -> None:
    transformer = describe("mixtral").transformer
    assert (transformer.num_moe_experts, transformer.moe_router_topk, transformer.moe_ffn_hidden_size) == (
        8,
        2,
        64,
    )
    assert not transformer.moe_router_pre_softmax
    assert transformer.moe_shared_expert_intermediate_size is None


def test_a_dense_model(describe: Describe) -> None:
    description = describe("qwen2")
    assert not description.is_moe
    assert description.transformer.add_qkv_bias
    assert not description.transformer.add_bias_linear
    assert description.transformer.params_dtype is torch.float32


def test_latent_attention(describe: Describe) -> None:
    rope = {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 30,
    }
    transformer = describe("deepseek_v3", hf={"rope_parameters": rope}).transformer
    assert isinstance(transformer, MLATransformerConfig)
    assert (transformer.qk_head_dim, transformer.qk_pos_emb_head_dim, transformer.v_head_dim) == (32, 16, 32)
    assert (transformer.q_lora_rank, transformer.kv_lora_rank) == (48, 32)
    assert (transformer.rope_type, transformer.rotary_base, transformer.rotary_scaling_factor) == (
        "yarn",
        1e4,
        40,
    )
    assert (transformer.beta_fast, transformer.beta_slow) == (30, 1)
    assert describe("deepseek_v3", hf={"q_lora_rank": None}).transformer.q_lora_rank is None


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe"])
def test_a_router_with_a_bias(describe: Describe, family: str) -> None:
    transformer = describe(family, hf={"n_shared_experts": 2, "first_k_dense_replace": 3}).transformer
    assert transformer.moe_layer_freq == [0, 0, 0, 1]
    assert (transformer.moe_ffn_hidden_size, transformer.moe_shared_expert_intermediate_size) == (64, 128)
    assert (transformer.moe_router_num_groups, transformer.moe_router_group_topk) == (2, 1)
    assert transformer.moe_router_score_function == "sigmoid"
    assert transformer.moe_router_enable_expert_bias
    assert transformer.moe_router_bias_update_rate == 0
    # With every group chosen, group routing is off.
    assert describe(family, hf={"topk_group": 2}).transformer.moe_router_num_groups is None


def test_uneven_stages_are_left_to_megatron(describe: Describe) -> None:
    table = {"num_layers_in_last_pipeline_stage": 2}
    assert (
        describe(
            "deepseek_v3", 3, parallel={PP: 3}, megatron=table
        ).transformer.num_layers_in_last_pipeline_stage
        == 2
    )
    message = mistake(
        describe,
        "deepseek_v3",
        3,
        parallel={PP: 3},
        megatron=table | {"num_layers_in_first_pipeline_stage": 2},
    )
    assert "TransformerConfig refuses" in message


def test_only_some_channels_rotate(describe: Describe) -> None:
    description = describe("glm4_moe")
    assert description.rope["rotary_percent"] == 0.5
    assert description.transformer.add_qkv_bias
    assert description.transformer.qk_layernorm


@pytest.mark.parametrize(("vocab_size", "padded"), [(128, 128), (129, 256), (16, 128), (1000, 1024)])
def test_the_vocabulary_is_padded_to_128(describe: Describe, vocab_size: int, padded: int) -> None:
    assert describe("qwen3", hf={"vocab_size": vocab_size}).padded_vocab_size == padded


def test_layers_of_a_mixed_model(describe: Describe) -> None:
    assert describe().transformer.moe_layer_freq == 1
    assert describe(hf={"mlp_only_layers": [0, 3]}).transformer.moe_layer_freq == [0, 1, 1, 0]
    assert describe(hf={"decoder_sparse_step": 2}).transformer.moe_layer_freq == [0, 1, 0, 1]


def test_routing_of_a_mixed_model(describe: Describe) -> None:
    assert describe().routing == RoutingShape(num_layers=4, moe_layers=(0, 1, 2, 3), num_experts=8, topk=2)
    assert describe(hf={"mlp_only_layers": [0, 3]}).routing.moe_layers == (1, 2)
    assert describe(megatron={}).transformer.moe_enable_routing_replay is False
    assert describe(algorithm={"moe_routing_replay": "policy"}).transformer.moe_enable_routing_replay
    assert describe(rollout={"routed_experts": True}).transformer.moe_enable_routing_replay
    assert describe(algorithm={"loss": "rspo"}).transformer.moe_enable_routing_replay


@pytest.mark.parametrize(
    ("family", "megatron", "words"),
    [
        ("qwen3", {}, "no experts"),
        ("qwen3_moe", {"moe_expert_capacity_factor": 1.0}, "megatron.moe_expert_capacity_factor = 1.0"),
        ("qwen3_moe", {"moe_router_load_balancing_type": "sinkhorn"}, "sinkhorn"),
        ("qwen3_moe", {"moe_enable_routing_replay": True}, "set algorithm.moe_routing_replay instead"),
    ],
)
def test_routing_that_cannot_be_replayed_is_refused(
    describe: Describe, family: str, megatron: dict[str, Any], words: str
) -> None:
    assert words in mistake(describe, family, algorithm={"moe_routing_replay": "policy"}, megatron=megatron)


def test_rspo_needs_experts(describe: Describe) -> None:
    assert mistake(describe, "qwen3", algorithm={"loss": "rspo"}).startswith(
        "algorithm.loss = 'rspo' but this model has no experts"
    )
    assert mistake(describe, "qwen3", train={"freeze_router": True}).startswith(
        "train.freeze_router = true but this model has no experts"
    )


def test_load_balancing_of_sequences_needs_each_alone(describe: Describe) -> None:
    table = {"moe_router_load_balancing_type": "seq_aux_loss", "moe_aux_loss_coeff": 0.01}
    transformer = describe(megatron=table, train={"max_tokens_per_microbatch": 1}).transformer
    assert transformer.moe_router_load_balancing_type == "seq_aux_loss"


def test_router_noise_needs_experts(describe: Describe) -> None:
    message = mistake(describe, "qwen3", rollout={"router_noise": 0.5})
    assert message == "rollout.router_noise = 0.5 but this model has no experts: change it"


def test_megatron_fields_pass_through(describe: Describe) -> None:
    table = {
        "moe_aux_loss_coeff": 0.01,
        "moe_router_load_balancing_type": "aux_loss",
        "recompute_granularity": "selective",
    }
    transformer = describe(megatron=table).transformer
    assert {name: getattr(transformer, name) for name in table} == table


def settable(describe: Describe) -> dict[str, Any]:
    """Return the fields of Megatron's config that the [megatron] table may set, with their annotations."""
    kinds = get_type_hints(TransformerConfig)
    names = [field.name for field in dataclasses.fields(TransformerConfig)]
    refusals = {name: mistake(describe, megatron={name: {}}) for name in names}  # no field holds a table
    return {name: kinds[name] for name, line in refusals.items() if "Input should be" in line}


@pytest.mark.slow
def test_text_has_the_type_of_its_field(describe: Describe) -> None:
    """The text of each value in Megatron's config gives this value again, and not a text."""
    kinds, transformer = settable(describe), describe().transformer
    values = {name: getattr(transformer, name) for name in kinds}
    plain = {name: value for name, value in values.items() if isinstance(value, bool | int | float | str)}
    assert {"moe_router_force_load_balancing", "moe_aux_loss_coeff", "moe_token_drop_policy"} <= plain.keys()
    assert len(plain) > 120
    found = describe(megatron={name: str(value) for name, value in plain.items()}).transformer
    for name, value in plain.items():
        kind = float if kinds[name] is float else type(value)
        assert (type(getattr(found, name)), getattr(found, name)) == (kind, value), name


@pytest.mark.parametrize(
    ("name", "written", "value"),
    [
        ("moe_router_force_load_balancing", "False", False),
        ("moe_router_force_load_balancing", "false", False),
        ("moe_router_force_load_balancing", "True", True),
        ("moe_aux_loss_coeff", ".001", 0.001),
        ("moe_aux_loss_coeff", "1.e-3", 0.001),
        ("moe_aux_loss_coeff", 1, 1.0),
        ("moe_z_loss_coeff", "1e-3", 0.001),
        ("moe_z_loss_coeff", None, None),
        ("cuda_graph_warmup_steps", "4", 4),
        ("moe_router_load_balancing_type", "none", "none"),
        ("moe_router_load_balancing_type", ["aux_loss"], ["aux_loss"]),
        ("mrope_section", [1, 2], [1, 2]),
        ("window_size", [4, 0], (4, 0)),
        ("attention_backend", "flash", AttnBackend.flash),
        ("config_logger_dir", "True", "True"),
    ],
)
def test_values_of_megatron_fields(describe: Describe, name: str, written: Any, value: Any) -> None:
    """A value gets the type of the field's annotation in Megatron's transformer_config.py."""
    table = {name: written} | (
        {"moe_aux_loss_coeff": [0.1]} if written == ["aux_loss"] else {}
    )  # Megatron wants a coefficient for each kind
    found = getattr(describe(megatron=table).transformer, name)
    assert (type(found), found) == (type(value), value)


WRONG = {
    bool: [1, 0, "maybe", 0.5, "", []],
    int: [True, 1.5, "1.5", "x", "nan", [1]],
    float: [True, "x", math.nan, math.inf, "inf", "-inf", [0.5]],
    str: [True, 3, 0.5, ["x"]],
    list: [True, 3, "x"],
    tuple: [True, 3, "x", ["x", 1]],
    Literal: ["no such choice", True, 3, []],
}
"""Type -> values that do not have it. Text has the type that it can be parsed as."""


@pytest.mark.slow
def test_values_of_a_wrong_type_are_refused(describe: Describe) -> None:
    one_of_each = {str(kind): (name, kind) for name, kind in settable(describe).items()}
    refused = set()
    for name, kind in one_of_each.values():
        parts = (
            [part for part in get_args(kind) if part is not NoneType] if get_origin(kind) is Union else [kind]
        )
        if len(parts) == 1 and (origin := get_origin(parts[0]) or parts[0]) in WRONG:
            refused.add(origin)
            for value in WRONG[origin]:
                line = mistake(describe, megatron={name: value})
                assert line.startswith(f"megatron.{name} = {value!r}: Input should be "), line
    assert refused == WRONG.keys()


@pytest.mark.parametrize("name", ["init_method", "timers", "autocast_dtype", "quant_recipe"])
@pytest.mark.parametrize("value", ["torch.nn.init:zeros_", "bf16", 3, {"a": 1}])
def test_fields_that_hold_python_objects_are_refused(describe: Describe, name: str, value: Any) -> None:
    line = mistake(describe, megatron={name: value})
    assert line == f"megatron.{name} = {value!r}: a config cannot set this field; remove it"


@pytest.mark.parametrize(
    ("family", "world_size", "parallel", "words"),
    [
        ("qwen3", 3, {TP: 2}, ["tensor 2 x pipeline 1 x context 1 = 2", "world size 3", "multiple of 2"]),
        ("qwen3", 4, {TP: 2, CP: 4}, ["= 8", "world size 4"]),
        ("qwen3", 3, {TP: 3}, [f"parallel.{TP} = 3", "num_attention_heads = 4"]),
        ("qwen3", 4, {TP: 4}, [f"parallel.{TP} = 4", "num_key_value_heads = 2"]),
        ("qwen3", 3, {PP: 3}, ["= 3", "num_layers = 4"]),
        ("qwen3", 2, {PP: 2, VPP: 4}, ["= 8", "num_layers = 4"]),
        ("qwen3", 2, {EP: 2}, [f"parallel.{EP} = 2", "no experts", "1"]),
        ("qwen3", 2, {TP: 2, ETP: 2}, [f"parallel.{ETP} = 2", "no experts"]),
        ("qwen3", 4, {EP: 2, ETP: 4}, [f"parallel.{EP} = 2", "no experts"]),
        ("qwen3_moe", 3, {EP: 3}, [f"parallel.{EP} = 3", "num_experts = 8"]),
        ("qwen3_moe", 3, {ETP: 3, EP: 1}, [f"parallel.{ETP} = 3", "moe_intermediate_size = 64"]),
        (
            "qwen3_moe",
            4,
            {EP: 8},
            ["expert 8 x expert tensor 1 x pipeline 1 = 8", "world size 4", f"set {EP} to a divisor of 4"],
        ),
        (
            "qwen3_moe",
            4,
            {PP: 2, EP: 4},
            ["expert 4 x expert tensor 1 x pipeline 2 = 8", "world size 4", f"set {EP} to a divisor of 2"],
        ),
        ("qwen3_moe", 12, {TP: 2, EP: 8, ETP: 2}, ["= 16", f"world size 12: set {EP} to a divisor of 2"]),
        ("qwen3_moe", 2, {EP: 2, ETP: 4}, ["= 8", f"world size 2: set {ETP} to a divisor of 2"]),
        (
            "qwen3_moe",
            2,
            {TP: 2, EP: 2, "sequence_parallel": False},
            ["parallel.sequence_parallel = false", "true"],
        ),
        ("qwen3_moe", 2, {TP: 2}, [f"parallel.{ETP} = 1", f"{TP} = 2", f"set {ETP} = 2"]),
        ("qwen3_moe", 2, {ETP: 2}, [f"parallel.{ETP} = 2", f"{TP} = 1", f"set {ETP} = 1"]),
    ],
)
def test_refused_layouts(
    describe: Describe, family: str, world_size: int, parallel: dict[str, Any], words: list[str]
) -> None:
    message = mistake(describe, family, world_size, parallel=parallel)
    assert message.startswith("parallel")
    for word in words:
        assert word in message


def tensor_parallel(size: int, dimensions: dict[str, int]) -> str:
    """Return the error of a dense model's layout on ``size`` ranks, or an empty text."""
    try:
        check_layout(Config.model_validate({"parallel": {TP: size}}), {"num_layers": 1} | dimensions, size)
    except InputError as error:
        return str(error)
    return ""


@given(
    groups=st.integers(1, 12), per_group=st.integers(1, 8), ffn=st.integers(1, 400), size=st.integers(2, 24)
)
@example(groups=3, per_group=3, ffn=1536, size=2)  # SmolLM2-135M: 9 heads, 3 key-value heads
def test_the_remedy_holds_for_every_dimension(groups: int, per_group: int, ffn: int, size: int) -> None:
    """The remedy names exactly the sizes that work: those that divide the heads, the groups and the MLP."""
    dimensions = {
        "num_attention_heads": groups * per_group,
        "num_query_groups": groups,
        "ffn_hidden_size": ffn,
    }
    works = [n for n in range(1, groups + 1) if all(number % n == 0 for number in dimensions.values())]
    line = tensor_parallel(size, dimensions)
    assert bool(line) is (size not in works)
    if line:
        remedy = re.search(r"choose a divisor of (\d+)$|set it to 1$", line)
        assert remedy, line
        named = int(remedy[1] or 1)
        assert [n for n in range(1, named + 1) if named % n == 0] == works


def test_the_intermediate_size_is_divided(describe: Describe) -> None:
    message = mistake(describe, "qwen3", 2, hf={"intermediate_size": 65}, parallel={TP: 2})
    assert f"parallel.{TP} = 2" in message
    assert "intermediate_size = 65" in message


def test_the_shared_experts_size_is_divided(describe: Describe) -> None:
    message = mistake(
        describe, "qwen2_moe", 2, hf={"shared_expert_intermediate_size": 65}, parallel={TP: 2, ETP: 2}
    )
    assert f"parallel.{TP} = 2" in message
    assert "shared_expert_intermediate_size = 65" in message


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"moe_aux_loss_coef": 0.1}, ["'megatron.moe_aux_loss_coef'", "'megatron.moe_aux_loss_coeff'"]),
        (
            {"context_parallel_size": 2},
            ["megatron.context_parallel_size = 2", "parallel.context_parallel_size"],
        ),
        ({"sequence_parallel": True}, ["megatron.sequence_parallel = True", "parallel.sequence_parallel"]),
        ({"bf16": True}, ["megatron.bf16 = True", "model.dtype"]),
        ({"params_dtype": "bf16"}, ["megatron.params_dtype", "model.dtype"]),
        ({"num_layers": 2}, ["megatron.num_layers = 2", "config.json already says 4"]),
        ({"calculate_per_token_loss": True}, ["megatron.calculate_per_token_loss = True", "remove it"]),
        ({"variable_seq_lengths": False}, ["megatron.variable_seq_lengths = False", "remove it"]),
        (
            {"moe_router_bias_update_rate": 0.001},
            ["megatron.moe_router_bias_update_rate = 0.001", "no bias", "remove it"],
        ),
        ({"moe_router_enable_expert_bias": True}, ["TransformerConfig refuses", "sigmoid"]),
        (
            {"moe_router_load_balancing_type": "seq_aux_loss"},
            ["'seq_aux_loss'", "train.max_tokens_per_microbatch = 1"],
        ),
        (
            {"moe_router_load_balancing_type": ["seq_aux_loss"], "moe_aux_loss_coeff": [0.1]},
            ["'seq_aux_loss'"],
        ),
        ({"fp8": "hybrid"}, ["megatron.fp8 = 'hybrid'", "set fp8.recipe instead"]),
        ({"moe_router_padding_for_fp8": True}, ["set fp8.moe_router_padding_for_quantization instead"]),
        ({"fp4": "e2m1"}, ["megatron.fp4 = 'e2m1'", "not padded", "remove it"]),
        ({"tp_comm_overlap": True}, ["megatron.tp_comm_overlap = True", "differ", "remove it"]),
        (
            {"moe_grouped_gemm": True},
            ["megatron.moe_grouped_gemm = True needs Transformer Engine, and a GPU:", "docs/install_gpu.md"],
        ),
        (
            {"gradient_accumulation_fusion": True},
            ["Transformer Engine and NVIDIA apex built from source", "docs/install_gpu.md"],
        ),
        (
            {"moe_token_dispatcher_type": "flex"},
            ["megatron.moe_token_dispatcher_type = 'flex'", "and DeepEP"],
        ),
        (
            {"recompute_granularity": "ful"},
            ["megatron.recompute_granularity = 'ful'", "'full' or 'selective'"],
        ),
        ({"moe_router_load_balancing_type": 3}, ["= 3: Input should be a valid string or ", "array"]),
        ({"moe_aux_loss_coeff": [0.1, True]}, ["= [0.1, True]: Input should be a valid number"]),
        ({"attention_backend": 1}, ["= 1: Input should be 'flash', 'fused', 'unfused', 'local' or 'auto'"]),
    ],
)
def test_refused_megatron_fields(describe: Describe, table: dict[str, Any], words: list[str]) -> None:
    message = mistake(describe, megatron=table)
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("family", "hf", "words"),
    [
        ("qwen3", {"hidden_act": "gelu"}, ["hidden_act = 'gelu'", "silu"]),
        ("qwen3", {"attention_bias": True}, ["attention_bias = True"]),
        ("llama", {"attention_bias": True}, ["attention_bias = True"]),
        ("llama", {"mlp_bias": True}, ["mlp_bias = True"]),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0},
            ["sliding_window = 16"],
        ),
        ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 16}, ["sliding_window = 16"]),
        ("mixtral", {"sliding_window": 4096}, ["sliding_window = 4096"]),
        (
            "llama",
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
            ["rope_parameters", "yarn", "llama3"],
        ),
        (
            "llama",
            {
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 1e4,
                    "factor": 8.0,
                    "low_freq_factor": 2.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8192,
                }
            },
            ["rope_parameters", "'low_freq_factor': 2.0"],
        ),
        ("deepseek_v3", {"rope_interleave": False}, ["rope_interleave = False"]),
        ("deepseek_v3", {"attention_bias": True}, ["attention_bias = True"]),
        (
            "deepseek_v3",
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
            ["rope_parameters", "yarn"],
        ),
        (
            "deepseek_v3",
            {"rope_parameters": YARN | {"attention_factor": 1.5}},
            ["rope_parameters", "attention_factor is not supported"],
        ),
        (
            "deepseek_v3",
            {"rope_parameters": YARN | {"truncate": False}},
            ["rope_parameters", "truncate = false"],
        ),
        (
            "deepseek_v3",
            {"rope_parameters": YARN | {"mscale_all_dim": 1.0}},
            ["rope_parameters", "mscale_all_dim without mscale"],
        ),
        ("glm4_moe", {"rope_parameters": YARN}, ["rope_parameters", "llama3"]),
        ("glm4_moe", {"first_k_dense_replace": 4}, ["first_k_dense_replace = 4"]),
        ("glm4_moe", {"n_shared_experts": 0}, ["n_shared_experts = 0"]),
        ("glm4_moe", {"norm_topk_prob": False}, ["norm_topk_prob = False"]),
        (
            "glm4_moe",
            {"num_experts_per_tok": 4},
            ["topk_group = 1", "num_experts_per_tok = 4", "n_group = 2"],
        ),
    ],
)
def test_refused_models(describe: Describe, family: str, hf: dict[str, Any], words: list[str]) -> None:
    message = mistake(describe, family, hf=hf)
    assert message.startswith(f"config.json of this {family} model has")
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("path", "text", "words"),
    [
        ("", None, ["model.path is empty"]),
        ("nowhere", None, ["nowhere", "no config.json"]),
        ("empty", "", ["config.json cannot be read"]),
        ("broken", "{", ["config.json cannot be read"]),
        ("untyped", "{}", ["config.json"]),
        ("gpt2", '{"model_type": "gpt2"}', ["'gpt2'", "qwen3_moe"]),
        ("new", '{"model_type": "of_tomorrow"}', ["of_tomorrow"]),
    ],
)
def test_refused_folders(tmp_path: Path, path: str, text: str | None, words: list[str]) -> None:
    folder = tmp_path / path
    if text is not None:
        folder.mkdir()
        (folder / "config.json").write_text(text)
    cfg = Config.model_validate({"device": "cpu", "model": {"path": str(folder) if path else ""}})
    message = mistake(lambda: describe_model(cfg, 1, CPU))
    assert message.startswith("model.path")
    for word in words:
        assert word in message


def test_nothing_but_config_json_is_needed(describe: Describe, tmp_path: Path) -> None:
    describe()
    assert [file.name for file in (tmp_path / "model").iterdir()] == ["config.json"]
    shutil.rmtree(tmp_path / "model")


@pytest.mark.parametrize(
    ("parameters", "world_size", "train", "fits"),
    [
        # 2 bytes on each GPU; shared by all GPUs 2 bytes, and 16 of gradients, main weights and moments
        (20 * 10**9, 8, True, False),  # 40 + 45 GB
        (20 * 10**9, 16, True, True),  # 40 + 22.5 GB
        (20 * 10**9, 8, False, True),  # 40 + 5 GB
        (41 * 10**9, 1024, False, False),  # 82 GB
    ],
)
def test_the_embedded_engine_needs_room_beside_the_policy(
    parameters: int, world_size: int, train: bool, fits: bool
) -> None:
    cfg = Config.model_validate({"model": {"path": "m", "dtype": "bf16"}})
    with (
        nullcontext() if fits else pytest.raises(InputError, match=r"rollout\.engine = 'embedded'.*'sglang'")
    ):
        check_embedded_fits(cfg, parameters, world_size, 80 * 10**9, train=train)
