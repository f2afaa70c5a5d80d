"""Models quantised with ModelOpt match SGLang's expectations and compute the right values.

The values are dequantised by the formats' definitions.
"""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_gmpo.commands.export_quantized import PYTHON, export_quantized
from megatron_gmpo.errors import InputError, RunError

from ..support.commands import ROOT, run_module
from ..support.sglang_servers import PYTHON as SGLANG_PYTHON

needs_modelopt = pytest.mark.skipif(
    not (ROOT / PYTHON).exists(), reason="no .venv-modelopt: run make modelopt"
)

SHAPE = {"hidden_size": 128, "ffn_hidden_size": 128, "head_dim": 64, "num_layers": 2, "dtype": torch.bfloat16}
MLP = ["gate_proj", "up_proj", "down_proj"]
LINEAR = {
    "qwen3": [f"mlp.{x}" for x in MLP],
    "qwen3_moe": [f"mlp.experts.{e}.{x}" for e in range(8) for x in MLP],
}
# Values of the four bits (OCP microscaling formats).
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
METHOD = {"fp8": "modelopt_fp8", "nvfp4": "modelopt_fp4"}
ERROR = {
    ("qwen3", "fp8"): 0.1,
    ("qwen3", "nvfp4"): 0.3,
    ("qwen3_moe", "fp8"): 0.2,
    ("qwen3_moe", "nvfp4"): 0.5,
}
"""Maximum RMS change of the logits relative to their RMS, for random weights.

In a MoE, some tokens change experts. Measured: 0.064, 0.208, 0.129 and 0.356.
"""


def dequantize(tensors: dict[str, Tensor], name: str, kind: str) -> tuple[Tensor, Tensor]:
    """Return the dequantised weight and the maximum distance of the original from it."""
    weight, scale = tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"].float()
    if kind == "fp8":
        back = weight.float() * scale
        return back, torch.maximum(back.abs() / 15, scale * 2**-10)  # 3 bits of mantissa; subnormal numbers
    # The lower bits contain the first of two values.
    values = E2M1[torch.stack([weight & 15, weight >> 4], -1).flatten(1).long()]
    scales = scale.repeat_interleave(16, 1) * tensors[f"{name}.weight_scale_2"]
    return values * scales, scales  # half of the step from 4 to 6


@torch.no_grad()
def logits(folder: Path) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model(torch.arange(2, 16).repeat(4)[None]).logits


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "train.jsonl"
    file.write_text(
        "".join(
            json.dumps({"problem": f"{a}+{b}=", "answer": a + b}) + "\n"
            for a in range(10, 18)
            for b in range(10, 18)
        )
    )
    return file


@pytest.fixture(scope="module")
def exports(
    prompts: Path, tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], tuple[Path, str]]:
    """Export each family in each format; return the exported folder and the line that the command printed."""
    made = {}
    for family, kind in itertools.product(LINEAR, METHOD):
        out = tmp_path_factory.mktemp("export") / "out"
        model = tiny_model(family, **SHAPE)
        arguments = f"--hf {model} --out {out} --format {kind} --calibration {prompts} --num-prompts 16"
        done = run_module("tools.export_quantized", *arguments.split())
        assert done.returncode == 0, done.stderr
        made[family, kind] = out, done.stdout.strip()
    return made


@pytest.fixture(scope="module")
def read_by_sglang(
    exports: dict[tuple[str, str], tuple[Path, str]],
) -> dict[tuple[str, str], dict[str, Any]] | None:
    """Return how SGLang reads each export; one process reads all of them."""
    if not SGLANG_PYTHON.exists():
        return None
    script = ROOT / "tests/support/sglang_modelopt.py"
    folders = [out for out, _ in exports.values()]
    said = subprocess.run(
        [SGLANG_PYTHON, "-I", script, *folders], capture_output=True, text=True, timeout=120, check=True
    )
    lines = [line for line in said.stdout.splitlines() if line.startswith("{")]
    return dict(zip(exports, map(json.loads, lines), strict=True))


@needs_modelopt
@pytest.mark.parametrize("kind", METHOD)
@pytest.mark.parametrize("family", LINEAR)
def test_export(
    family: Any,
    kind: str,
    exports: dict[tuple[str, str], tuple[Path, str]],
    read_by_sglang: dict[tuple[str, str], dict[str, Any]] | None,
    tiny_model: Callable[..., Path],
    tmp_path: Path,
) -> None:
    model, (out, line) = tiny_model(family, **SHAPE), exports[family, kind]
    modules = [
        f"model.layers.{layer}.{module}"
        for layer in range(2)
        for module in [f"self_attn.{x}_proj" for x in "qkvo"] + LINEAR[family]
    ]
    assert f"{len(modules)} of " in line

    before, after = load_file(model / "model.safetensors"), load_file(out / "model.safetensors")
    code = {"fp8": torch.float8_e4m3fn, "nvfp4": torch.uint8}[kind]
    assert {name for name, tensor in after.items() if tensor.dtype == code and name.endswith(".weight")} == {
        f"{m}.weight" for m in modules
    }
    scales = {"weight_scale", "input_scale"} | ({"weight_scale_2"} if kind == "nvfp4" else set())
    assert after.keys() - before.keys() == {f"{module}.{scale}" for module in modules for scale in scales}
    stay = before.keys() - {f"{module}.weight" for module in modules}
    assert all(torch.equal(after[name], before[name]) for name in stay)

    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == [
        {"qwen3": "Qwen3ForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}[family]
    ]
    assert (
        json.loads((out / "hf_quant_config.json").read_text())["quantization"]["quant_algo"] == kind.upper()
    )
    assert {path.name for path in model.iterdir()} <= {path.name for path in out.iterdir()}

    back = {name: tensor.float() for name, tensor in after.items() if name in stay}
    for name in [f"{module}.weight" for module in modules]:
        back[name], bound = dequantize(after, name.removesuffix(".weight"), kind)
        assert ((back[name] - before[name].float()).abs() <= bound * 1.01).all(), name
    dequantized = shutil.copytree(model, tmp_path / "dequantized")
    save_file(back, dequantized / "model.safetensors")
    expected = logits(model)
    error = (logits(dequantized) - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    print(f"{family}, {kind}: relative error of the logits {error:.4f}; {line}")
    assert error < ERROR[family, kind]

    if read_by_sglang:
        sglang = read_by_sglang[family, kind]
        assert sglang["method"] == METHOD[kind]
        router = ["model.layers.1.mlp.gate"] if family == "qwen3_moe" else []
        assert [name for name in sglang["skipped"] if name != "model.embed_tokens"] == ["lm_head", *router]
        name = "model.layers.0.self_attn.o_proj"  # 128 rows, 256 columns
        found = {scale: after[f"{name}.{scale}"] for scale in {"weight"} | scales}
        assert {
            scale: [str(t.dtype).removeprefix("torch."), list(t.shape) or [1]] for scale, t in found.items()
        } == sglang["parameters"]


def test_refusals(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    model, python = tiny_model("qwen3", **SHAPE), Path(shutil.which("false") or "")
    with pytest.raises(InputError, match=r"--python 'nowhere' is not there: run make modelopt"):
        export_quantized(model, tmp_path / "out", "fp8", [[1]], Path("nowhere"))
    with pytest.raises(InputError, match=r"--out .* exists: name another folder"):
        export_quantized(model, tmp_path, "fp8", [[1]], python)
    odd = tiny_model("qwen3", **SHAPE | {"hidden_size": 72})
    with pytest.raises(
        InputError,
        match=r"--format nvfp4 groups 16 columns, but 'model\.layers\..*' is \(\d+, 72\): choose fp8",
    ):
        export_quantized(odd, tmp_path / "out", "nvfp4", [[1]], python)
    with pytest.raises(RunError, match="ModelOpt failed with exit code 1"):
        export_quantized(model, tmp_path / "out", "fp8", [[1]], python)
    assert not list(tmp_path.iterdir())
    config = json.loads((model / "config.json").read_text())
    quantised = shutil.copytree(model, tmp_path / "quantised")
    (quantised / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "fp8"}})
    )
    with pytest.raises(InputError, match="is quantized already: give the model in bf16"):
        export_quantized(quantised, tmp_path / "out", "fp8", [[1]], python)
