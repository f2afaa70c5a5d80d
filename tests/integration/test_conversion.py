"""Conversions are exact in any number of processes and leave no complete-looking output when they fail."""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from megatron_gmpo.policy.compare_logits import compare_logits
from megatron_gmpo.testing.tiny_tokenizers import text_tokenizer
from megatron_gmpo.weights.hf_to_megatron import HFToMegatron
from megatron_gmpo.weights.inspection import inspect_checkpoint
from megatron_gmpo.weights.safetensors_folder import SafetensorsFile, SafetensorsFolder
from megatron_gmpo.weights.table import ConversionTable
from megatron_gmpo.weights.torch_dist import TorchDistReader

from ..distributed.test_checkpoint import make_config, replayed
from ..distributed.test_layouts import EP, ETP, PP, TP, config
from ..support import cases, conversion_cases
from ..support.batches import without_images
from ..support.commands import ROOT, error_lines, run_module
from ..support.ranks import RankPool

pytestmark = pytest.mark.distributed

TO_MEGATRON, TO_HF = "tools.convert_hf_to_megatron", "tools.convert_megatron_to_hf"


@pytest.fixture(scope="session")
def model(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that makes the folder of a model by name.

    The name is a family and a variant: ``qwen3``, ``qwen3 tied``, ``qwen3_moe mixed`` (MoE and dense layers),
    ``deepseek_v3 alike`` (MoE layers only).
    """
    tokenizer = text_tokenizer()  # 259 tokens, which Megatron pads
    options = {"hidden_size": 32, "ffn_hidden_size": 32, "tokenizer": tokenizer}

    def make(name: str, dtype: torch.dtype = torch.bfloat16) -> Path:
        family, _, variant = name.partition(" ")
        if "_vl" in family:  # with its own tokenizer
            return tiny_model(
                family, hidden_size=32, ffn_hidden_size=32, tie_word_embeddings=variant == "tied", dtype=dtype
            )
        changes = {"mixed": {"mlp_only_layers": [0, 2]}, "alike": {"first_k_dense_replace": 0}}
        if variant not in changes:
            return tiny_model(family, tie_word_embeddings=variant == "tied", dtype=dtype, **options)
        plain = tiny_model(family, dtype=dtype, **options)
        folder = tmp_path_factory.mktemp(variant)
        shutil.copytree(plain, folder, dirs_exist_ok=True)
        model = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(plain, **changes[variant]), dtype=torch.float32
        )
        for parameter in model.parameters():  # buffers stay fp32
            parameter.data = parameter.data.to(dtype)
        model.save_pretrained(folder)
        return folder

    return make


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same(folder: Path, expected: dict[str, Tensor] | Path) -> None:
    wanted = tensors(expected) if isinstance(expected, Path) else expected
    found = tensors(folder)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def left_over(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith((".partial", "out"))]


@pytest.mark.parametrize(
    ("name", "dtype", "writers", "readers"),
    [
        ("qwen3_moe", torch.bfloat16, 1, 1),
        ("qwen3_moe", torch.float32, 4, 2),
        ("qwen3_moe mixed", torch.bfloat16, 2, 4),
        ("qwen3", torch.bfloat16, 2, 1),
        ("qwen3 tied", torch.bfloat16, 1, 4),
        ("qwen2", torch.float32, 4, 1),
        ("llama", torch.bfloat16, 2, 2),
        ("deepseek_v3", torch.bfloat16, 2, 1),
        ("deepseek_v3 alike", torch.bfloat16, 1, 2),
        ("glm4_moe", torch.bfloat16, 1, 2),
        ("qwen2_moe", torch.bfloat16, 2, 1),
        ("qwen2_moe mixed", torch.float32, 1, 2),
        ("mixtral", torch.bfloat16, 1, 2),
        ("qwen2_5_vl", torch.bfloat16, 2, 1),
        ("qwen3_vl tied", torch.float32, 1, 2),
        ("qwen3_vl_moe", torch.bfloat16, 2, 4),
    ],
)
def test_there_and_back_is_bit_exact(
    ranks: RankPool,
    model: Callable[..., Path],
    tmp_path: Path,
    name: str,
    dtype: torch.dtype,
    writers: int,
    readers: int,
) -> None:
    source = model(name, dtype)
    nbytes = sum(tensor.nbytes for tensor in tensors(source).values())
    shares = ranks.run(writers, conversion_cases.to_megatron, source, tmp_path / "megatron")
    assert min(shares) > 0
    assert sum(shares) >= nbytes
    assert (tmp_path / "megatron/latest_checkpointed_iteration.txt").read_text() == "0"
    shares = ranks.run(readers, conversion_cases.to_hf, tmp_path / "megatron", tmp_path / "back")
    assert min(shares) > 0
    assert sum(shares) == nbytes
    assert_same(tmp_path / "back", source)
    companions = {path.name for path in source.iterdir() if not path.name.startswith("model")}
    assert {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"} <= companions
    for file in companions:
        assert (tmp_path / "back" / file).read_bytes() == (source / file).read_bytes()
    auto = AutoModelForImageTextToText if "_vl" in name else AutoModelForCausalLM
    _, loading = auto.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(loading[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))


@pytest.mark.parametrize(
    ("name", "parallel"),
    [
        ("qwen3_moe", {}),
        ("qwen3_moe", {TP: 2, EP: 2}),
        ("qwen3_moe", {TP: 2, ETP: 2, PP: 2}),
        ("qwen3_moe mixed", {PP: 2, EP: 2}),
        ("qwen3", {TP: 2, PP: 2}),
        ("qwen3 tied", {PP: 2}),
        ("deepseek_v3", {TP: 2, EP: 2}),
        ("deepseek_v3 alike", {PP: 2, EP: 2}),
        ("glm4_moe", {TP: 2, ETP: 2, PP: 2}),
        ("qwen2_moe", {TP: 2, EP: 2, PP: 2}),
        ("qwen2_moe mixed", {TP: 2, ETP: 2}),
        ("mixtral", {TP: 2, EP: 2, PP: 2}),
        ("qwen2_5_vl", {TP: 2, PP: 2}),
        ("qwen3_vl tied", {PP: 2}),
        ("qwen3_vl_moe", {TP: 2, EP: 2, PP: 2}),
    ],
)
def test_megatron_loads_it_in_every_layout(
    ranks: RankPool,
    model: Callable[..., Path],
    tmp_path: Path,
    name: str,
    parallel: dict[str, int],
) -> None:
    source = model(name)
    ranks.run(2, conversion_cases.to_megatron, source, tmp_path / "megatron")
    cfg = config(source, parallel, max_tokens=64, model={"dtype": "bf16"})
    weights = ranks.run(4, conversion_cases.weights_loaded_by_megatron, cfg, tmp_path / "megatron")[0]
    folder = SafetensorsFolder(source)  # with each expert by itself
    assert weights.keys() == folder.names
    for tensor_name in folder.names:
        assert torch.equal(weights[tensor_name], folder.get(tensor_name)), tensor_name


@pytest.mark.parametrize(
    ("name", "layout", "dtype"),
    [
        ("qwen3_moe", "one rank", "fp32"),
        ("qwen3_moe", "dp2 tp2 ep2", "bf16"),
        ("qwen3_moe", "pp2 vpp2 ep2", "bf16"),
        ("qwen3_moe mixed", "ep2", "fp32"),
        ("qwen3 tied", "pp2", "bf16"),
        ("qwen3", "tp2 pp2", "bf16"),
        ("deepseek_v3", "dp2 tp2 ep2", "bf16"),
        ("deepseek_v3 alike", "one rank", "bf16"),
        ("glm4_moe", "pp2 vpp2 ep2", "bf16"),
        ("qwen2_moe", "tp2 ep2", "fp32"),
        ("qwen2_moe mixed", "pp2", "bf16"),
        ("mixtral", "tp2 ep2", "bf16"),
        ("qwen3_vl tied", "pp2", "bf16"),
    ],
)
def test_training_checkpoint_of_any_layout(
    ranks: RankPool,
    model: Callable[..., Path],
    tmp_path: Path,
    name: str,
    layout: str,
    dtype: str,
) -> None:
    source = model(name)
    world_size, cfg = make_config(layout, source, dtype)
    batch = without_images(replayed(source)) if "_vl" in name else replayed(source)
    (trained, *_) = ranks.run(world_size, cases.run_on, cfg, batch, tmp_path / "run", 0, 2, [1, 2])
    trained = trained["weights"]
    before = tensors(source)
    assert any(not torch.equal(trained[key].bfloat16(), before[key]) for key in before)
    ranks.run(2, conversion_cases.to_hf, tmp_path / "run", tmp_path / "out")
    assert_same(tmp_path / "out", trained)
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    # config.json states the dtype of the trained model, not that of the source.
    told = {"dtype": "float32" if dtype == "fp32" else "bfloat16"}
    assert (
        json.loads((tmp_path / "out/config.json").read_text())
        == json.loads((source / "config.json").read_text()) | told
    )
    ranks.run(1, conversion_cases.to_hf, tmp_path / "run/iter_0000002", tmp_path / "out2", None, "bf16")
    bias = "e_score_correction_bias"  # stays fp32
    assert_same(
        tmp_path / "out2",
        {key: tensor if key.endswith(bias) else tensor.bfloat16() for key, tensor in trained.items()},
    )
    assert json.loads((tmp_path / "out2/config.json").read_text())["dtype"] == "bfloat16"
    assert (
        "largest difference" in ranks.run(1, compare_logits, tmp_path / "out2", tmp_path / "run", "bf16")[0]
    )
    assert (
        "is not the model"
        in ranks.run(1, conversion_cases.refusal, compare_logits, source, tmp_path / "run")[0]
    )


@pytest.mark.parametrize(
    ("name", "layout", "dtype", "optimizer_format"),
    [
        ("qwen3_moe", "one rank", "fp32", "fully_reshardable"),
        ("qwen3_moe", "ep2", "bf16", "fully_reshardable"),
        ("qwen3_moe", "dp2 tp2 ep2", "bf16", "dp_reshardable"),
        ("deepseek_v3", "tp2 etp2", "bf16", "fully_reshardable"),
    ],
)
def test_checkpoint_of_megatron_lm(
    ranks: RankPool,
    model: Callable[..., Path],
    tmp_path: Path,
    name: str,
    layout: str,
    dtype: str,
    optimizer_format: str,
) -> None:
    """Optimizer keys and random states are not taken for weights, and pickles are not loaded."""
    world_size, cfg = make_config(layout, model(name), dtype)
    batch, run, evil = replayed(model(name)), tmp_path / "run", tmp_path / "run/evil"
    weights = ranks.run(world_size, conversion_cases.save_as_megatron_lm, cfg, batch, run, optimizer_format)[
        0
    ]
    assert any("optimizer." in key for key in TorchDistReader(run / "iter_0000007").tensors)
    assert any(b"evil" in file.read_bytes() for file in run.rglob("*.distcp"))
    ranks.run(1, conversion_cases.to_hf, run, tmp_path / "out", model(name))
    assert_same(tmp_path / "out", weights)
    about = inspect_checkpoint(run)
    assert (about["step"], about["optimizer"]) == ("7", "yes")
    assert "largest difference" in ranks.run(1, compare_logits, tmp_path / "out", run)[0]
    torch.save({"args": conversion_cases.Evil(evil)}, run / "iter_0000007/common.pt")
    line = ranks.run(1, compare_logits, tmp_path / "out", run)[0]
    assert "not compared, because" in line
    assert "iter_0000007 cannot be trusted or read (it asks for " in line
    assert not evil.exists()


def test_reads_no_optimizer_state(ranks: RankPool, model: Callable[..., Path], tmp_path: Path) -> None:
    """The weights are exact although every byte of the optimizer state is overwritten."""
    source = model("qwen3")
    _, cfg = make_config("one rank", source, "bf16")
    trained = ranks.run(1, cases.run_on, cfg, replayed(source), tmp_path / "run", 0, 1, [1])[0]["weights"]
    folder = tmp_path / "run/iter_0000001"
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    spoiled = 0
    for index, info in metadata.storage_data.items():
        if index.fqn.startswith("optimizer."):
            with (folder / info.relative_path).open("r+b") as file:
                file.seek(info.offset)
                file.write(b"\xff" * info.length)
            spoiled += info.length
    assert spoiled > 0
    ranks.run(1, conversion_cases.to_hf, tmp_path / "run", tmp_path / "out")
    assert_same(tmp_path / "out", trained)


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen2_moe", "mixtral"])
def test_fused_experts(ranks: RankPool, model: Callable[..., Path], tmp_path: Path, name: str) -> None:
    """Convert folders with all experts of a layer in one tensor, the layout of transformers in memory."""
    source = model(name)
    fused = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).state_dict()
    assert fused["model.layers.0.mlp.experts.gate_up_proj"].shape == (8, 64, 32)
    folder = copied(source, tmp_path)
    save_file({name: tensor.contiguous() for name, tensor in fused.items()}, folder / "model.safetensors")
    ranks.run(2, conversion_cases.to_megatron, folder, tmp_path / "megatron")
    ranks.run(1, conversion_cases.to_hf, tmp_path / "megatron", tmp_path / "back")
    assert_same(tmp_path / "back", source)


@pytest.mark.parametrize("name", ["qwen3", "deepseek_v3"])
def test_fp8_blocks(ranks: RankPool, model: Callable[..., Path], tmp_path: Path, name: str) -> None:
    folder = copied(model(name), tmp_path)
    stored = tensors(folder)
    stored["model.embed_tokens.weight"] = stored["model.embed_tokens.weight"].clone()
    expected = dict(stored)
    for name in [name for name in stored if name.endswith(("_proj.weight", "_proj_with_mqa.weight"))]:
        rows, columns = stored[name].shape
        scale = torch.rand(-(-rows // 128), -(-columns // 128)) + 0.5
        stored[name] = (stored[name].float() * 8).to(torch.float8_e4m3fn)
        stored[f"{name}_scale_inv"] = scale
        expected[name] = torch.empty(rows, columns, dtype=torch.bfloat16)
        for row in range(rows):
            for column in range(columns):
                expected[name][row, column] = float(stored[name][row, column]) * float(
                    scale[row // 128, column // 128]
                )
    save_file(stored, folder / "model.safetensors")
    about = json.loads((folder / "config.json").read_text())
    about["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(about))
    ranks.run(1, conversion_cases.to_megatron, folder, tmp_path / "megatron")
    ranks.run(1, conversion_cases.to_hf, tmp_path / "megatron", tmp_path / "back")
    assert_same(tmp_path / "back", expected)
    assert "quantization_config" not in json.loads((tmp_path / "back/config.json").read_text())


def test_layers_for_multi_token_prediction_are_left_out(
    ranks: RankPool,
    model: Callable[..., Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Hub checkpoints of DeepSeek-V3 and GLM-4.5 have one such layer."""
    source = model("deepseek_v3")
    folder, further = copied(source, tmp_path), "model.layers.4.mlp.experts.0.up_proj.weight"
    added = {
        "model.layers.4.enorm.weight": torch.ones(32),
        further: torch.ones(32, 32),
        f"{further}_scale_inv": torch.ones(1, 1),
    }
    save_file(tensors(folder) | added, folder / "model.safetensors")
    assert "2 tensors that config.json does not require" in conversion_cases.refusal(
        conversion_cases.to_megatron, folder, tmp_path / "out"
    )
    about = json.loads((folder / "config.json").read_text()) | {"num_nextn_predict_layers": 1}
    (folder / "config.json").write_text(json.dumps(about))
    HFToMegatron(folder)
    (warning,) = caplog.messages
    assert (
        "3 tensors of layers for multi-token prediction are skipped, the first 'model.layers.4.enorm.weight'"
        in warning
    )
    ranks.run(1, conversion_cases.to_megatron, folder, tmp_path / "megatron")
    ranks.run(1, conversion_cases.to_hf, tmp_path / "megatron", tmp_path / "back")
    assert_same(tmp_path / "back", source)
    cfg = config(folder, {}, max_tokens=64, model={"dtype": "bf16"})
    assert ranks.run(1, cases.refusal, cfg) == [""]


@pytest.mark.parametrize("name", ["qwen3_moe mixed", "deepseek_v3", "deepseek_v3 alike", "glm4_moe"])
def test_has_what_the_plain_layer_spec_of_megatron_looks_for(
    ranks: RankPool,
    model: Callable[..., Path],
    tmp_path: Path,
    name: str,
) -> None:
    source = model(name)
    ranks.run(1, conversion_cases.to_megatron, source, tmp_path / "megatron")
    (wanted,) = ranks.run(1, conversion_cases.keys_of_the_plain_spec, config(source, {}, max_tokens=64))
    assert wanted <= TorchDistReader(tmp_path / "megatron/iter_0000000").tensors.keys()
    assert any(key.endswith("expert_bias") for key in wanted) == ("qwen" not in name)


def test_norms_of_latents_have_the_names_of_either_layer_spec(model: Callable[..., Path]) -> None:
    """Transformer Engine's fused names (gpt_layer_specs.py) come first. Layer 0 is dense; layer 1 is MoE."""
    table = ConversionTable(model("deepseek_v3"))
    keys = {
        entry.name: [place.key.removeprefix("decoder.layers.") for place in table.places(entry)]
        for entry in table.entries
    }
    expected = {
        "0.input_layernorm.weight": [],
        "0.pre_mlp_layernorm.weight": ["0.mlp.linear_fc1.layer_norm_weight"],
        "1.input_layernorm.weight": [],
        "1.pre_mlp_layernorm.weight": [],
        "1.self_attention.q_layernorm.weight": ["1.self_attention.linear_q_up_proj.layer_norm_weight"],
        "1.self_attention.kv_layernorm.weight": ["1.self_attention.linear_kv_up_proj.layer_norm_weight"],
    }
    for name, fused in expected.items():
        assert keys[f"decoder.layers.{name}"] == [*fused, name]


def test_shards_keep_to_their_size(ranks: RankPool, model: Callable[..., Path], tmp_path: Path) -> None:
    source = model("qwen3_moe")
    ranks.run(1, conversion_cases.to_megatron, source, tmp_path / "megatron")
    ranks.run(1, conversion_cases.to_hf, tmp_path / "megatron", tmp_path / "back", None, None, 100_000)
    files = list((tmp_path / "back").glob("*.safetensors"))
    assert len(files) > 2
    assert all(sum(tensor.nbytes for tensor in load_file(file).values()) <= 100_000 for file in files)
    assert_same(tmp_path / "back", source)


def copied(source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "copy"))


GATE = "model.layers.1.mlp.experts.3.gate_proj.weight"
Spoil = Callable[[Path], None]


def changed(**changes: Callable[[dict[str, Tensor]], Any]) -> Spoil:
    def spoil(folder: Path) -> None:
        stored = load_file(folder / "model.safetensors")
        for change in changes.values():
            change(stored)
        save_file(stored, folder / "model.safetensors", {"format": "pt"})

    return spoil


def truncated(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def indexed(**files: str) -> Spoil:
    def spoil(folder: Path) -> None:
        single = (folder / "model.safetensors").rename(folder / "model-1.safetensors")
        weight_map = dict.fromkeys(load_file(single), single.name) | {GATE: files["file"]}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return spoil


HF_PROBLEMS: dict[str, tuple[Spoil, str]] = {
    "missing": (changed(pop=lambda t: t.pop(GATE)), f"lacks the tensor '{GATE}'"),
    "extra": (
        changed(add=lambda t: t.update(surplus=torch.ones(3))),
        "1 tensors that config.json does not require, the first 'surplus'",
    ),
    "misshapen": (
        changed(cut=lambda t: t.update({GATE: t[GATE][1:].clone()})),
        f"'{GATE}' is (31, 32), config.json requires (32, 32)",
    ),
    "another dtype": (
        changed(cast=lambda t: t.update({GATE: t[GATE].float()})),
        f"'{GATE}' is torch.float32, other tensors that Megatron stores with it are torch.bfloat16",
    ),
    "NaN": (changed(nan=lambda t: t[GATE][3].fill_(float("nan"))), f"'{GATE}' holds NaN or infinite numbers"),
    "infinite": (
        changed(inf=lambda t: t[GATE][3].fill_(float("-inf"))),
        f"'{GATE}' holds NaN or infinite numbers",
    ),
    "FP8 without scales": (
        changed(cut=lambda t: t.update({GATE: t[GATE].to(torch.float8_e4m3fn)})),
        f"'{GATE}' is FP8 without a scale for each block",
    ),
    "scales of other blocks": (
        changed(
            cut=lambda t: t.update(
                {GATE: t[GATE].to(torch.float8_e4m3fn), f"{GATE}_scale_inv": torch.ones(2, 2)}
            )
        ),
        f"'{GATE}_scale_inv' (2, 2) is no scale of blocks of 128 x 128",
    ),
    "truncated": (truncated, "file not fully covered): download the model again"),
    "not safetensors": (
        lambda folder: (folder / "model.safetensors").write_text("lorem ipsum dolor") and None,
        "cannot be read as safetensors",
    ),
    "absent file": (indexed(file="model-7.safetensors"), "names 'model-7.safetensors', which is not there"),
    "pickle": (
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin") and None,
        "holds no model.safetensors, only 'pytorch_model.bin', a pickle",
    ),
    "path in the index": (indexed(file="../copy/model-1.safetensors"), "is no plain file name"),
    "1e12 layers": (
        lambda folder: (
            (folder / "config.json").write_text('{"model_type": "qwen2", "num_hidden_layers": 1000000000000}')
            and None
        ),
        "num_hidden_layers = 1000000000000, which is no number from 1 to 1000",
    ),
    "link to another folder": (
        lambda folder: (folder / "vocab.txt").symlink_to(__file__),
        "'vocab.txt' is a link to",
    ),
    "unknown family": (
        lambda folder: (folder / "config.json").write_text('{"model_type": "gpt2"}') and None,
        "is a 'gpt2' model, a family without a table",
    ),
}


@pytest.mark.parametrize("problem", HF_PROBLEMS)
def test_bad_hf_folder_is_refused(
    ranks: RankPool, model: Callable[..., Path], tmp_path: Path, problem: str
) -> None:
    spoil, expected = HF_PROBLEMS[problem]
    folder = copied(model("qwen3_moe"), tmp_path)
    spoil(folder)
    for message in ranks.run(
        2, conversion_cases.refusal, conversion_cases.to_megatron, folder, tmp_path / "out"
    ):
        assert expected in message
        assert "\n" not in message
    assert left_over(tmp_path) == []


def truncated_distcp(folder: Path) -> None:
    file = max(folder.glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-100])


MEGATRON_PROBLEMS: dict[str, tuple[Spoil, str]] = {
    "truncated": (truncated_distcp, "bytes, .metadata requires"),
    "absent file": (
        lambda folder: max(folder.glob("*.distcp")).unlink(),
        "which is not there: the checkpoint is incomplete",
    ),
    "no metadata": (lambda folder: (folder / ".metadata").unlink(), "holds no .metadata"),
    "code in the metadata": (
        lambda folder: (
            (folder / ".metadata").write_bytes(pickle.dumps(conversion_cases.Evil(folder / "evil"))) and None
        ),
        "cannot be trusted or read (it asks for pathlib.Path.touch)",
    ),
    "no config": (lambda folder: shutil.rmtree(folder.parent / "hf"), "give --template"),
}


@pytest.mark.parametrize("problem", MEGATRON_PROBLEMS)
def test_bad_megatron_folder_is_refused(
    ranks: RankPool,
    model: Callable[..., Path],
    tmp_path: Path,
    problem: str,
) -> None:
    spoil, expected = MEGATRON_PROBLEMS[problem]
    ranks.run(2, conversion_cases.to_megatron, model("qwen3_moe"), tmp_path / "megatron")
    spoil(tmp_path / "megatron/iter_0000000")
    for message in ranks.run(
        2, conversion_cases.refusal, conversion_cases.to_hf, tmp_path / "megatron", tmp_path / "out"
    ):
        assert expected in message
        assert "\n" not in message
    assert left_over(tmp_path) == []
    assert not list(tmp_path.rglob("evil"))


def test_template_of_another_model_is_refused(
    ranks: RankPool, model: Callable[..., Path], tmp_path: Path
) -> None:
    ranks.run(1, conversion_cases.to_megatron, model("qwen3_moe"), tmp_path / "megatron")
    cases_ = {
        "qwen3_moe mixed": "lacks 'decoder.layers.mlp.linear_fc2.weight'",
        "qwen3": "lacks 'decoder.layers.mlp.linear_fc2.weight'",
        "qwen3_moe tied": "1 tensors that config.json does not require, the first 'output_layer.weight'",
    }
    for template, expected in cases_.items():
        (message,) = ranks.run(
            1,
            conversion_cases.refusal,
            conversion_cases.to_hf,
            tmp_path / "megatron",
            tmp_path / "out",
            model(template),
        )
        assert expected in message
    assert left_over(tmp_path) == []


def test_kill_leaves_nothing_that_looks_whole_and_a_rerun_completes(
    model: Callable[..., Path], tmp_path: Path
) -> None:
    source, out = model("qwen3"), tmp_path / "out"
    command = [sys.executable, "-m", "tests.support.conversion_cases", str(source), str(out), "5"]
    killed = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=200)
    assert killed.returncode == -signal.SIGKILL
    assert left_over(tmp_path) == [".partial_out"]
    done = run_module(TO_MEGATRON, "--hf", source, "--megatron", out, "--verify")
    assert done.returncode == 0, done.stderr
    assert left_over(tmp_path) == ["out"]
    assert "largest difference" in done.stdout
    assert "MB/s" in done.stdout.splitlines()[-1]
    back = run_module(
        TO_HF, "--megatron", out, "--hf", tmp_path / "back", "--verify", "--max-shard-size", "20KB", ranks=2
    )
    assert back.returncode == 0, back.stderr
    assert "largest difference" in back.stdout
    assert_same(tmp_path / "back", source)


@pytest.mark.parametrize(
    ("tool", "limit"), [(TO_MEGATRON, 20), (TO_MEGATRON, 47), (TO_MEGATRON, 64), (TO_HF, 64)]
)
def test_full_disk(
    ranks: RankPool, model: Callable[..., Path], tmp_path: Path, tool: str, limit: int
) -> None:
    """A limit on the file size makes a write fail in the middle, like a full disk."""
    source, out = model("qwen3_moe"), tmp_path / "out"
    ranks.run(1, conversion_cases.to_megatron, source, tmp_path / "megatron")
    arguments = (
        ["--hf", source, "--megatron", out]
        if tool == TO_MEGATRON
        else ["--megatron", tmp_path / "megatron", "--hf", out]
    )
    line = f"ulimit -f {limit}; exec {sys.executable} -m {tool} {' '.join(map(str, arguments))}"
    failed = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert failed.returncode == 2, failed.stderr
    (error,) = error_lines(failed.stderr)
    assert "free space or choose another disk" in error
    assert left_over(tmp_path) == []


def test_a_head_of_its_own_under_tied_embeddings_is_refused(
    ranks: RankPool, model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = copied(model("qwen3 tied"), tmp_path)
    changed(add=lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))(folder)
    assert "set tie_word_embeddings = false" in conversion_cases.refusal(
        conversion_cases.to_megatron, folder, tmp_path / "out"
    )
    changed(add=lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))(folder)
    ranks.run(1, conversion_cases.to_megatron, folder, tmp_path / "out")


def test_config_tells_the_dtype_of_weights_saved_in_another(
    ranks: RankPool, model: Callable[..., Path], tmp_path: Path
) -> None:
    ranks.run(1, conversion_cases.to_megatron, model("qwen3", torch.float32), tmp_path / "megatron")
    ranks.run(
        1, conversion_cases.to_hf, tmp_path / "megatron", tmp_path / "back", model("qwen3", torch.bfloat16)
    )
    assert json.loads((tmp_path / "back/config.json").read_text())["dtype"] == "float32"
    assert_same(tmp_path / "back", model("qwen3", torch.float32))


def test_too_small_a_disk_is_refused_before_writing(model: Callable[..., Path], tmp_path: Path) -> None:
    """A sparse file holds a vocabulary larger than the free space of this disk."""
    folder = copied(model("qwen3 tied"), tmp_path)
    about = json.loads((folder / "config.json").read_text())
    about["hidden_size"] = 2**20
    about["vocab_size"] = (2 * shutil.disk_usage(tmp_path).free + 10**9) // (2 * about["hidden_size"])
    (folder / "config.json").write_text(json.dumps(about))
    entries = ConversionTable(folder).entries
    shapes = [
        (name, torch.bfloat16, shape)
        for entry in entries
        for name, shape in zip(entry.hf, entry.hf_shapes, strict=True)
    ]
    with suppress(AssertionError), SafetensorsFile(folder / "model.safetensors", shapes):
        pass  # writes the header only
    file = folder / "model.safetensors"
    os.truncate(file, file.stat().st_size + sum(2 * math.prod(shape) for _, _, shape in shapes))
    message = conversion_cases.refusal(conversion_cases.to_megatron, folder, tmp_path / "out")
    assert re.search(r"needs \d+\.\d\d GB and its disk has \d+\.\d\d GB free: choose another disk", message)
    assert left_over(tmp_path) == []


def test_existing_folder_is_refused(model: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/precious").touch()
    failed = run_module(TO_MEGATRON, "--hf", model("qwen3"), "--megatron", tmp_path / "out", ranks=2)
    assert failed.returncode != 0
    assert error_lines(failed.stderr) == [
        f"error: '{tmp_path}/out' exists: choose another folder or remove it"
    ]
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "precious"]


def test_dry_run_prints_the_table(model: Callable[..., Path], tmp_path: Path) -> None:
    source = model("qwen3_moe")
    done = run_module(TO_MEGATRON, "--hf", source, "--megatron", tmp_path / "out", "--dry-run")
    assert done.returncode == 0, done.stderr
    expected = (
        "model.layers.1.mlp.experts.3.gate_proj.weight + model.layers.1.mlp.experts.3.up_proj.weight"
        " <-> decoder.layers.mlp.experts.experts.linear_fc1.weight[1, 3] <-> (64, 32) bfloat16"
    )
    assert expected in done.stdout.splitlines()
    named = [name for line in done.stdout.splitlines() for name in line.split(" <-> ")[0].split(" + ")]
    assert sorted(named) == sorted(tensors(source))
    assert left_over(tmp_path) == []


def test_inspection(ranks: RankPool, model: Callable[..., Path], tmp_path: Path) -> None:
    source = model("qwen3_moe")
    ranks.run(2, conversion_cases.to_megatron, source, tmp_path / "megatron")
    total = sum(tensor.numel() for tensor in tensors(source).values())
    routed = sum(tensor.numel() for name, tensor in tensors(source).items() if ".experts." in name)
    for folder in (source, tmp_path / "megatron", tmp_path / "megatron/iter_0000000"):
        about = inspect_checkpoint(folder)
        assert about["family"] == "qwen3_moe"
        assert about["parameters"] == f"{total:,} in all, {total - routed * 6 // 8:,} active"
        assert about["dtypes"].startswith("bfloat16")
        assert about["whole"] == "yes"
    truncated_distcp(tmp_path / "megatron/iter_0000000")
    assert inspect_checkpoint(tmp_path / "megatron")["whole"].startswith("no: ")
    refused = run_module("tools.inspect_checkpoint", tmp_path)
    assert refused.returncode == 2
    assert len(error_lines(refused.stderr)) == 1


def test_table_order_and_sizes(model: Callable[..., Path]) -> None:
    """The table names every tensor once, layer by layer."""
    table = ConversionTable(model("qwen3_moe mixed"))
    names = list(table.hf_names)
    assert len(names) == len(set(names))
    layers = [int(name.split(".")[2]) for name in names if name.startswith("model.layers.")]
    assert layers == sorted(layers)
