"""Vision-language models: what is read of their config.json, their sizes, and what is refused."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForImageTextToText

from megatron_gmpo.checkpoint import checkpoint_size
from megatron_gmpo.commands.export_quantized import export_quantized
from megatron_gmpo.config import Config
from megatron_gmpo.errors import InputError
from megatron_gmpo.models.description import ModelDescription, describe_model, read_hf_config
from megatron_gmpo.models.family import language_config
from megatron_gmpo.models.identity import model_identity
from megatron_gmpo.testing import VisionFamily
from megatron_gmpo.testing.tiny_models import make_tiny_model
from megatron_gmpo.weights.companions import copy_companions
from megatron_gmpo.weights.safetensors_folder import SafetensorsFolder
from megatron_gmpo.weights.table import ConversionTable

CPU = torch.device("cpu")
FAMILIES = get_args(VisionFamily)
Changes = dict[str, Any]

QWEN2_5_TOWER = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "out_hidden_size": 3584,
}
QWEN2_5_VL_7B: Changes = {
    "model_type": "qwen2_5_vl",
    # like the folder on the hub, without a text_config
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "max_position_embeddings": 128000,
    "use_sliding_window": False,
    "sliding_window": 32768,
    "tie_word_embeddings": False,
    "rope_theta": 1e6,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vision_config": QWEN2_5_TOWER,
}
QWEN3_TOWER = {
    "depth": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_heads": 16,
    "num_position_embeddings": 2304,
    "deepstack_visual_indexes": [8, 16, 24],
}
MROPE = {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"}
QWEN3_VL_8B: Changes = {
    "model_type": "qwen3_vl",
    "tie_word_embeddings": False,
    "text_config": {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "rope_scaling": MROPE,
    },
    "vision_config": QWEN3_TOWER | {"out_hidden_size": 4096},
}
QWEN3_VL_30B_A3B: Changes = {
    "model_type": "qwen3_vl_moe",
    "tie_word_embeddings": False,
    "text_config": {
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": 151936,
        "norm_topk_prob": True,
        "rope_scaling": MROPE,
    },
    "vision_config": QWEN3_TOWER | {"out_hidden_size": 2048},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "nbytes"),
    [
        # total_size in model.safetensors.index.json of the folders on the hub, in bf16
        (QWEN2_5_VL_7B, 16_584_333_312),
        (QWEN3_VL_8B, 17_534_247_392),
        # Qwen3-30B-A3B and the tower of the 8B model, whose four mergers are half as wide at their end
        (QWEN3_VL_30B_A3B, 61_064_245_248 + 2 * (576_388_336 - 4 * (4 * 1152 + 1) * 2048)),
    ],
)
def test_sizes_of_published_models(tmp_path: Path, config: Changes, nbytes: int) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    table = ConversionTable(tmp_path)
    assert 2 * table.numel == nbytes
    if config is QWEN3_VL_30B_A3B:  # 120 of 128 experts are idle
        assert table.active_numel == 61_064_245_248 // 2 - 48 * 120 * 3 * 2048 * 768
    cfg = Config.model_validate({"device": "cpu", "model": {"path": str(tmp_path)}})
    description = describe_model(cfg, 1, CPU)
    assert description.vision
    assert description.vision.deepstack == ((0, 1, 2) if "qwen3" in config["model_type"] else ())
    assert description.transformer.mrope_section == list(description.vision.mrope_section)
    assert description.rope["rotary_base"] == (1e6 if config is QWEN2_5_VL_7B else 5e5)


Describe = Callable[..., ModelDescription]


@pytest.fixture
def describe(tiny_model: Callable[..., Path], tmp_path: Path) -> Describe:
    """Return ``describe(family, whole={...}, text={...}, tower={...})``, with changes of config.json."""

    def make(
        family: str, whole: Changes | None = None, text: Changes | None = None, tower: Changes | None = None
    ) -> ModelDescription:
        about = json.loads((tiny_model(family) / "config.json").read_text()) | (whole or {})
        about["text_config"] |= text or {}
        about["vision_config"] |= tower or {}
        (tmp_path / "config.json").write_text(json.dumps(about))
        cfg = Config.model_validate({"device": "cpu", "model": {"path": str(tmp_path)}})
        return describe_model(cfg, 1, CPU)

    return make


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tower_is_that_of_transformers(
    describe: Describe, tiny_model: Callable[..., Path], family: str
) -> None:
    vision = describe(family).vision
    assert vision
    stored = load_file(tiny_model(family) / "model.safetensors")
    names = {name.partition("visual.")[2]: tuple(x.shape) for name, x in stored.items() if "visual." in name}
    assert vision.parameters() == names
    assert {name: tuple(x.shape) for name, x in vision.build().state_dict().items()} == names
    assert (vision.merge_size, vision.feature_size) == (2, 64)
    assert vision.numel == sum(x.numel() for name, x in stored.items() if "visual." in name)
    tokenizer = json.loads((tiny_model(family) / "tokenizer.json").read_text())
    (token,) = (each["id"] for each in tokenizer["added_tokens"] if each["content"] == "<|image_pad|>")
    assert vision.image_token == token


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_of_the_tower(describe: Describe, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    """Features and gradients are those of transformers' own attention, with fewer kernels."""
    vision = describe(family).vision
    assert vision
    torch.manual_seed(0)
    tower: Any = vision.build().double()
    # two equal images; windows of Qwen2.5-VL at the edges are smaller than the others
    grids = torch.tensor([[1, 6, 10], [1, 4, 4], [1, 6, 10], [1, 10, 14]])
    weight = tower.patch_embed.proj.weight
    pixels = torch.randn(int(grids.prod(1).sum()), weight[0].numel(), dtype=weight.dtype)
    kernel = Mock(wraps=torch.nn.functional.scaled_dot_product_attention)  # counts calls of the real kernel
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", kernel)

    def found() -> tuple[int, list[torch.Tensor]]:
        kernel.reset_mock()
        tower.zero_grad()
        features = tower(pixels, grid_thw=grids).pooler_output
        (features * torch.arange(features.shape[1])).sum().backward()
        gradients = [x.grad.clone() for x in tower.parameters() if x.grad is not None]
        return kernel.call_count, [features.detach(), *gradients]

    kernels, ours = found()
    tower.config._attn_implementation = "sdpa"
    before, theirs = found()
    assert kernels < before
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("hidden_size", [16, 32, 48, 64, 96, 128])
def test_tiny_models_of_any_width_are_described(
    tmp_path: Path, family: VisionFamily, hidden_size: int
) -> None:
    make_tiny_model(
        tmp_path,
        family=family,
        num_layers=2,
        hidden_size=hidden_size,
        ffn_hidden_size=hidden_size,
        head_dim=16,
    )
    cfg = Config.model_validate({"device": "cpu", "model": {"path": str(tmp_path)}})
    assert describe_model(cfg, 1, CPU).vision


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("outer", "inner"), [(True, False), (False, True), (True, True)])
def test_embeddings_are_tied_as_in_transformers(
    describe: Describe, tmp_path: Path, family: str, outer: bool, inner: bool
) -> None:
    """Either part of config.json may say it; transformers' own model decides."""
    found = describe(family, {"tie_word_embeddings": outer}, {"tie_word_embeddings": inner})
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(tmp_path))
    assert found.mapping.tied == (model.lm_head.weight is model.get_input_embeddings().weight)


@pytest.mark.parametrize(
    ("family", "text", "tower", "words"),
    [
        ("qwen2_5_vl", {"hidden_act": "gelu"}, {}, "qwen2_5_vl_text model has hidden_act = 'gelu'"),
        ("qwen3_vl", {"attention_bias": True}, {}, "has attention_bias = True"),
        ("qwen3_vl", {"head_dim": 24}, {}, "mrope_section does not divide the 12 pairs"),
        ("qwen2_5_vl", {"num_attention_heads": 8}, {}, "mrope_section does not divide the 4 pairs"),
        (
            "qwen3_vl",
            {},
            {"out_hidden_size": 48},
            "has out_hidden_size = 48: the language model's hidden_size",
        ),
        ("qwen3_vl", {}, {"deepstack_visual_indexes": [0, 1, 2, 0, 1]}, "there may be 3 different ones"),
        ("qwen3_vl", {}, {"deepstack_visual_indexes": [0, 3]}, "there may be 3 different ones below 3"),
        ("qwen3_vl", {}, {"num_heads": 5}, "has num_heads = 5: a head needs a multiple of 4 channels"),
        ("qwen2_5_vl", {}, {"window_size": 27}, "has window_size = 27: an image token has 28 pixels"),
        ("qwen3_vl_moe", {"norm_topk_prob": False}, {}, "has norm_topk_prob = False"),
        (
            "qwen3_vl_moe",
            {"moe_intermediate_size": 64},
            {},
            "has moe_intermediate_size = 64: the orientation",
        ),
        (
            "qwen3_vl_moe",
            {"moe_intermediate_size": 32},
            {},
            "has moe_intermediate_size = 32: the orientation",
        ),
        *(
            (family, {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0}}, {}, "mRoPE")
            for family in FAMILIES
            for kind in ("linear", "dynamic", "yarn")
        ),
        (
            "qwen3_vl",
            {"rope_parameters": {"rope_theta": 1e4, "mrope_section": [6, 5, 5], "mrope_interleaved": False}},
            {},
            "mrope_interleaved is True in this family",
        ),
        (
            "qwen3_vl",
            {"rope_parameters": {"rope_theta": 1e4, "mrope_section": [4, 6, 6]}},
            {},
            "mrope_section does not divide the 16 pairs",
        ),
        (
            "qwen2_5_vl",
            {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1, "layer_types": None},
            {},
            "has sliding_window = 4",
        ),
    ],
)
def test_refused_models(describe: Describe, family: str, text: Changes, tower: Changes, words: str) -> None:
    with pytest.raises(InputError) as caught:
        describe(family, text=text, tower=tower)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_pipeline_stage_has_a_layer(tiny_model: Callable[..., Path]) -> None:
    """A stage without decoder layers could not pass deepstack features on."""

    def described(layout: str) -> ModelDescription:
        options = {
            "model": {"path": str(tiny_model("qwen3_vl"))},
            "parallel": {"pipeline_model_parallel_size": 2},
            "megatron": {"pipeline_model_parallel_layout": layout},
        }
        return describe_model(Config.model_validate(options), 2, CPU)

    with pytest.raises(InputError, match=r"^megatron\.pipeline_model_parallel_layout = .* without decoder l"):
        described("E|ttttL")
    assert described("Et|tttL").transformer.num_layers == 4


def test_identity_tells_towers_apart(describe: Describe) -> None:
    def identity(family: str, **tower: Any) -> Changes:
        return model_identity(copy.copy(describe(family, tower=tower).whole), "bf16")

    same = identity("qwen3_vl")
    assert identity("qwen3_vl") == same
    assert json.loads(json.dumps(same)) == same
    assert identity("qwen3_vl", depth=2) != same
    assert identity("qwen3_vl", deepstack_visual_indexes=[1, 2]) != same
    assert identity("qwen2_5_vl")["model_type"] != same["model_type"]


def test_a_frozen_tower_takes_only_its_weights_in_a_checkpoint() -> None:
    # trained: fp32 main weights and two moments, and the bf16 weights beside them
    assert checkpoint_size(100, torch.bfloat16, frozen=10) == 90 * (2 + 3 * 4) + 10 * 2
    assert checkpoint_size(100, torch.float32, frozen=10) == 90 * 3 * 4 + 10 * 4


def test_every_part_of_config_tells_the_dtype(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    copy_companions(tiny_model("qwen3_vl"), tmp_path, torch.bfloat16)
    about = json.loads((tmp_path / "config.json").read_text())
    assert about["dtype"] == about["text_config"]["dtype"] == about["vision_config"]["dtype"] == "bfloat16"
    assert (tmp_path / "preprocessor_config.json").is_file()


def test_quantization_is_refused(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--hf .* is a vision-language model"):
        export_quantized(tiny_model("qwen3_vl"), tmp_path / "out", "fp8", [], Path(sys.executable))


def test_the_language_model_of_a_text_model_is_the_model(tiny_model: Callable[..., Path]) -> None:
    whole = read_hf_config(str(tiny_model("qwen3")))
    assert language_config(whole) is whole


def test_experts_of_another_shape_are_named(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model("qwen3_vl_moe"), tmp_path / "model"))
    about = json.loads((folder / "config.json").read_text())
    about["text_config"]["hidden_size"] = 80
    (folder / "config.json").write_text(json.dumps(about))
    names = SafetensorsFolder(folder).names
    assert "model.language_model.layers.0.mlp.experts.0.gate_proj.weight" in names


@pytest.mark.slow
def test_text_models_import_nothing_of_vision(tiny_model: Callable[..., Path]) -> None:
    script = (
        "import sys, torch\n"
        "from megatron_gmpo.config import Config\n"
        "from megatron_gmpo.models.description import describe_model\n"
        "from megatron_gmpo.weights.safetensors_folder import SafetensorsFolder\n"
        f"path = {str(tiny_model('qwen3'))!r}\n"
        "cfg = Config.model_validate({'device': 'cpu', 'model': {'path': path}})\n"
        "describe_model(cfg, 1, torch.device('cpu'))\n"
        "SafetensorsFolder(path).names\n"
        "bad = ('transformers.vision_utils', 'megatron_gmpo.models.vision')\n"
        "print([name for name in sys.modules if name.startswith(bad) or '_vl' in name])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1] == "['megatron_gmpo.models.qwen_vl']", done.stderr
