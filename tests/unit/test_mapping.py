"""Operations invert, names are canonical, and the tables of all families are complete and one-to-one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from megatron_gmpo.models import FAMILIES
from megatron_gmpo.models.description import read_hf_config
from megatron_gmpo.models.family import language_config
from megatron_gmpo.models.hub import hub_names
from megatron_gmpo.models.mapping import (
    Mapping,
    Row,
    canonical_name,
    expand,
    fused_name,
    is_expert,
    with_global_numbers,
)
from megatron_gmpo.models.operations import GateUp, QueryKeyValue, Replicated, Split, Vocabulary
from megatron_gmpo.weights.safetensors_folder import SafetensorsFolder

SIZES = st.sampled_from([1, 2, 4])
SMALL = st.integers(1, 5)


def distinct(*shape: int) -> Tensor:
    """Return a tensor whose elements all differ, so that a misplaced element changes it."""
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)


def assert_inverts(operation: Replicated, parts: list[Tensor], tp: int) -> Tensor:
    """Check Hugging Face -> full -> shards -> full -> Hugging Face, and return the full tensor."""
    full = operation.join(parts)
    shards = [operation.shard(full, rank, tp) for rank in range(tp)]
    assert len({shard.shape for shard in shards}) == 1
    assert torch.equal(operation.unshard(shards), full)
    back = operation.separate(operation.unshard(shards))
    assert len(back) == len(parts)
    for ours, theirs in zip(back, parts, strict=True):
        assert torch.equal(ours, theirs)
    return full


@settings(deadline=None)
@given(SMALL, SMALL, SIZES)
def test_replicated_and_split(rows: int, columns: int, tp: int) -> None:
    part = distinct(rows * tp, columns * tp)
    for operation in (Replicated(), Split(0), Split(1)):
        assert torch.equal(assert_inverts(operation, [part], tp), part)
    assert Split(0).shard(part, tp - 1, tp).shape == (rows, columns * tp)
    assert Split(1).shard(part, tp - 1, tp).shape == (rows * tp, columns)
    assert torch.equal(Split(1).shard(part, tp - 1, tp), part[:, -columns:])


@settings(deadline=None)
@given(st.integers(1, 40), SMALL, SIZES, st.integers(0, 3))
def test_vocabulary(size: int, hidden: int, tp: int, more: int) -> None:
    padded = (-(-size // tp) + more) * tp
    part = distinct(size, hidden) + 1
    full = assert_inverts(Vocabulary(0, size, padded), [part], tp)
    assert full.shape == (padded, hidden)
    assert torch.equal(full[:size], part)
    assert not full[size:].any()


@settings(deadline=None)
@given(SMALL, st.integers(1, 4), st.sampled_from([2, 4]), st.sampled_from([(), (6,)]), SIZES)
def test_query_key_value(groups_a_rank: int, queries: int, dim: int, rest: tuple[int, ...], tp: int) -> None:
    groups = groups_a_rank * tp
    heads = (groups * queries, groups, groups)
    parts = [distinct(count * dim, *rest) + 1000 * i for i, count in enumerate(heads)]
    operation = QueryKeyValue(0, groups, queries, dim)
    full = assert_inverts(operation, parts, tp)
    # Group g has its queries, its key and its value (get_query_key_value_tensors in attention.py of
    # megatron-core).
    query, key, value = (part.view(count, dim, *rest) for part, count in zip(parts, heads, strict=True))
    layout = full.view(groups, queries + 2, dim, *rest)
    for g in range(groups):
        assert torch.equal(
            layout[g], torch.cat([query[g * queries : (g + 1) * queries], key[g : g + 1], value[g : g + 1]])
        )
    # a rank holds complete groups, so separating its shard gives its share of each projection
    shard = operation.shard(full, tp - 1, tp)
    for part, ours in zip(parts, QueryKeyValue(0, groups_a_rank, queries, dim).separate(shard), strict=True):
        assert torch.equal(ours, part.chunk(tp, 0)[-1])


@settings(deadline=None)
@given(SMALL, SMALL, SIZES)
def test_gate_and_up(width_a_rank: int, hidden: int, tp: int) -> None:
    gate, up = distinct(width_a_rank * tp, hidden), distinct(width_a_rank * tp, hidden) + 1000
    full = assert_inverts(GateUp(), [gate, up], tp)
    for rank in range(tp):  # each rank computes silu(its gate) * its up from the halves of its own shard
        halves = GateUp().shard(full, rank, tp).chunk(2, 0)
        assert torch.equal(halves[0], gate.chunk(tp, 0)[rank])
        assert torch.equal(halves[1], up.chunk(tp, 0)[rank])


LAYER = "decoder.layers.3."


@pytest.mark.parametrize(
    ("transformer_engine", "plain"),
    [
        (LAYER + "self_attention.linear_qkv.layer_norm_weight", LAYER + "input_layernorm.weight"),
        (LAYER + "mlp.linear_fc1.layer_norm_weight", LAYER + "pre_mlp_layernorm.weight"),
        (
            LAYER + "self_attention.linear_q_up_proj.layer_norm_weight",
            LAYER + "self_attention.q_layernorm.weight",
        ),
        (
            LAYER + "self_attention.linear_kv_up_proj.layer_norm_weight",
            LAYER + "self_attention.kv_layernorm.weight",
        ),
        (LAYER + "mlp.experts.linear_fc1.weight12", LAYER + "mlp.experts.local_experts.12.linear_fc1.weight"),
        (LAYER + "mlp.experts.linear_fc2.weight0", LAYER + "mlp.experts.local_experts.0.linear_fc2.weight"),
    ],
)
def test_canonical_names(transformer_engine: str, plain: str) -> None:
    assert canonical_name(transformer_engine) == plain
    assert canonical_name(plain) == plain
    if "norm" in plain:
        assert fused_name(plain) == transformer_engine


@pytest.mark.parametrize(
    "name",
    [
        "output_layer.weight",
        LAYER + "mlp.shared_experts.linear_fc1.weight",
        LAYER + "self_attention.linear_qkv.bias",
    ],
)
def test_other_names_are_canonical_already(name: str) -> None:
    assert canonical_name(name) == name


def test_global_numbers() -> None:
    name = "decoder.layers.1.mlp.experts.local_experts.2.linear_fc1.weight"
    assert (
        with_global_numbers(name, {0: 4, 1: 9}, 6)
        == "decoder.layers.9.mlp.experts.local_experts.8.linear_fc1.weight"
    )
    assert with_global_numbers("output_layer.weight", {0: 4}, 6) == "output_layer.weight"
    assert is_expert(name)
    assert not is_expert("decoder.layers.1.mlp.router.weight")


def test_find_fills_in_the_numbers() -> None:
    mapping = Mapping(
        [Row("a.{l}.{e}.w", ("x.{l}.y.{e}", "x.{l}.z.{e}"), GateUp()), Row("a.w", ("b.w",), Split(0))],
        tied=False,
    )
    match = mapping.find("a.12.3.w")
    assert (match.megatron, match.hf, match.operation) == ("a.12.3.w", ("x.12.y.3", "x.12.z.3"), GateUp())
    assert mapping.find("a.w").hf == ("b.w",)


@pytest.mark.parametrize("name", ["a.w.extra", "pre.a.w", "aXw", "a.1.w", "a.1.2.w2"])
def test_an_unknown_parameter_is_an_error_that_names_it(name: str) -> None:
    mapping = Mapping(
        [Row("a.w", ("b.w",), Replicated()), Row("a.{l}.{e}.w", ("x.{l}.{e}",), Replicated())], tied=False
    )
    with pytest.raises(KeyError, match=f"no conversion rule.*{name}"):
        mapping.find(name)


@pytest.mark.parametrize("family", FAMILIES)
def test_tables_are_one_to_one(family: str) -> None:
    hf = SimpleNamespace(
        vocab_size=100,
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        qkv_bias=True,
    )
    rows = list(expand(FAMILIES[family].rows(hf, 128), num_layers=3, num_experts=4))
    ours = [row.megatron for row in rows]
    theirs = [name for row in rows for name in row.hf]
    assert len(set(ours)) == len(ours)
    assert len(set(theirs)) == len(theirs)
    assert not any("{" in name for name in ours + theirs)


def held_by_transformers(folder: Path) -> dict[str, Tensor]:
    with_images = (folder / "preprocessor_config.json").exists()
    auto = AutoModelForImageTextToText if with_images else AutoModelForCausalLM
    return auto.from_pretrained(folder).state_dict()


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"qwen3_vl_moe"}))
def test_hub_names_are_those_transformers_saves(tiny_model: Callable[..., Path], family: str) -> None:
    saved = load_file(tiny_model(family) / "model.safetensors").keys()
    held = held_by_transformers(tiny_model(family))
    assert {part.format(e=e) for name in held for part in hub_names(name, family) for e in range(8)} == saved
    for name in saved:
        assert hub_names(name, family) == (name,)


@pytest.mark.parametrize("layout", ["of the hub", "of transformers"])
def test_stacked_experts_are_read_in_either_layout(
    tiny_model: Callable[..., Path], tmp_path: Path, layout: str
) -> None:
    """Qwen3-VL-MoE's experts on the hub are (E, in, out), and (E, out, in) after ``save_pretrained``."""
    source = tiny_model("qwen3_vl_moe")
    held = held_by_transformers(source)
    prefix = "model.language_model.layers.2.mlp.experts."
    up_of_5 = held[prefix + "gate_up_proj"][5, 48:]  # experts have 48 channels
    stored = load_file(source / "model.safetensors")
    assert torch.equal(stored[prefix + "gate_up_proj"][5].T[48:], up_of_5)
    shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    if layout == "of transformers":
        save_file({name: held.get(name, stored[name]) for name in stored}, tmp_path / "model.safetensors")
    folder = SafetensorsFolder(tmp_path)
    assert folder.shape(prefix + "5.up_proj.weight") == (48, 64)
    assert torch.equal(folder.get(prefix + "5.up_proj.weight"), up_of_5)
    gate, down = folder.get(prefix + "0.gate_proj.weight"), folder.get(prefix + "7.down_proj.weight")
    assert torch.equal(gate, held[prefix + "gate_up_proj"][0, :48])
    assert torch.equal(down, held[prefix + "down_proj"][7])
    assert sum(".experts." in name for name in folder.names) == 4 * 8 * 3


def test_a_tower_is_found_by_the_names_of_its_parameters(tiny_model: Callable[..., Path]) -> None:
    for family, prefix in (("qwen2_5_vl", ""), ("qwen3_vl", "model."), ("qwen3_vl_moe", "model.")):
        hf = language_config(read_hf_config(str(tiny_model(family))))
        mapping = Mapping(FAMILIES[family].rows(hf, 300), tied=False)
        name = "visual.blocks.1.attn.qkv.weight"
        assert mapping.find(name).hf == (prefix + name,)
        with pytest.raises(KeyError, match="no conversion rule"):
            mapping.find("visual")
