"""Block-wise FP8, compared with float64 arithmetic on the format's table of values and with transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

from megatron_gmpo.errors import NonFiniteError
from megatron_gmpo.models.fp8_blocks import dequantize, is_quantized, quantize, quantize_all, rounded
from megatron_gmpo.weights.safetensors_folder import SafetensorsFolder

# E4M3 in the OCP 8-bit floating point specification: bias 7, 3 mantissa bits, subnormals below 2^-6, no
# infinities, maximum 448
MAGNITUDES = [m * 2.0**-9 for m in range(8)] + [
    (8 + m) * 2.0 ** (e - 10) for e in range(1, 16) for m in range(8) if (e, m) != (15, 7)
]
E4M3 = torch.tensor([-x for x in reversed(MAGNITUDES)] + MAGNITUDES[1:], dtype=torch.float64)
sizes = st.integers(1, 300)


def weights(rows: int, columns: int, seed: int, spread: float) -> Tensor:
    """Return normal numbers whose magnitudes differ between rows by up to ``10 ** spread``."""
    generator = torch.Generator().manual_seed(seed)
    scales = 10 ** (spread * torch.rand(rows, 1, generator=generator))
    return (torch.randn(rows, columns, generator=generator) * scales).bfloat16()


@settings(max_examples=30, deadline=None)
@given(sizes, sizes, st.integers(0, 1000), st.sampled_from([0.0, 3.0, 9.0]))
def test_every_value_is_the_nearest_of_its_block(rows: int, columns: int, seed: int, spread: float) -> None:
    weight = weights(rows, columns, seed, spread)
    values, scales = quantize(weight)
    assert (values.dtype, values.shape, scales.dtype) == (torch.float8_e4m3fn, (rows, columns), torch.float32)
    assert scales.shape == (-(-rows // 128), -(-columns // 128))
    for top in range(0, rows, 128):
        for left in range(0, columns, 128):
            block = weight[top : top + 128, left : left + 128].double()
            scale = scales[top // 128, left // 128].double()
            torch.testing.assert_close(scale, block.abs().max() / 448, rtol=2**-23, atol=0)
            error = (values[top : top + 128, left : left + 128].double() * scale - block).abs()
            table = E4M3 * scale
            right = torch.searchsorted(table, block).clamp(1, len(table) - 1)
            least = torch.minimum((table[right] - block).abs(), (table[right - 1] - block).abs())
            assert (error <= least + 2**-22 * block.abs()).all()  # fp32 division may decide a tie
            promised = torch.maximum(block.abs() / 16, scale * 2**-10)
            assert (error <= promised * (1 + 2**-20)).all()


@pytest.mark.parametrize("seed", range(3))
def test_as_transformers(seed: int) -> None:
    weight = weights(256, 384, seed, 3.0)
    weight[:128, 128:256] = 0
    quantizer = SimpleNamespace(
        quantization_config=SimpleNamespace(weight_block_size=(128, 128), scale_fmt="float")
    )
    theirs = Fp8Quantize(quantizer)._quantize_one("x.weight", weight)
    values, scales = quantize(weight)
    torch.testing.assert_close(scales, theirs["x.weight_scale_inv"], rtol=2**-22, atol=0)
    steps = (values.view(torch.uint8).int() - theirs["x.weight"].view(torch.uint8).int()).abs()
    assert steps.max() <= 1  # transformers multiplies by 1 / scale, which decides ties differently
    assert steps.float().mean() < 5e-3
    assert torch.equal(
        dequantize(values, scales), Fp8Dequantize(quantizer)._dequantize_one(values, scales, torch.bfloat16)
    )


def test_blocks_of_zeros_and_of_the_smallest_numbers() -> None:
    weight = torch.zeros(130, 128)
    weight[128:] = 1e-44
    values, scales = quantize(weight)
    assert scales.tolist() == [[1.0], [torch.finfo(torch.float32).tiny]]
    assert not dequantize(values, scales, torch.float32).any()


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("consume", [quantize_all, rounded])
def test_weights_that_are_not_finite_are_refused(wrong: float, consume: Callable[..., object]) -> None:
    weight = torch.ones(200, 200)
    weight[190, 190] = wrong
    named = [("model.norm.weight", weight), ("model.layers.0.mlp.up_proj.weight", weight)]
    with pytest.raises(NonFiniteError, match=r"'model\.layers\.0\.mlp\.up_proj\.weight' is not finite"):
        list(consume(named))  # pyright: ignore[reportArgumentType]


def test_rounding_twice_changes_nothing() -> None:
    """The embedded engine computes with exactly the values that a server's FP8 weights represent."""
    name, weight = "model.layers.0.self_attn.q_proj.weight", weights(150, 300, 0, 3.0).float()
    ((_, once),) = rounded([(name, weight)])
    sent = dict(quantize_all([(name, weight)]))
    assert sent.keys() == {name, f"{name}_scale_inv"}
    assert torch.equal(once, dequantize(sent[name], sent[f"{name}_scale_inv"], torch.float32))
    assert not torch.equal(once, weight)
    ((_, twice),) = rounded([(name, once)])
    torch.testing.assert_close(twice, once, rtol=2**-22, atol=0)


def experts(prefix: str, count: int = 8) -> list[str]:
    return [f"{prefix}.{e}.{x}_proj" for e in range(count) for x in ("gate", "up", "down")]


MLP = [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
ATTENTION = [f"self_attn.{x}_proj" for x in "qkvo"]
LATENT = [f"self_attn.{x}" for x in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")]
QUANTIZED = {  # modules of each layer
    "qwen3": [ATTENTION + MLP] * 2,
    "qwen3_moe": [ATTENTION + experts("mlp.experts")] * 2,
    "deepseek_v3": [
        LATENT + MLP,
        LATENT + experts("mlp.experts") + [f"mlp.shared_experts.{x}_proj" for x in ("gate", "up", "down")],
    ],
}


@pytest.mark.parametrize("family", QUANTIZED)
def test_tensors_that_only_the_rollout_has_in_8_bits(family: str, tiny_model: Callable[..., Path]) -> None:
    folder = SafetensorsFolder(tiny_model(family, num_layers=2))
    trainer = {name: folder.get(name).bfloat16() for name in folder.names}
    rollout = dict(quantize_all(trainer.items()))
    expected = {
        f"model.layers.{layer}.{module}.weight"
        for layer, modules in enumerate(QUANTIZED[family])
        for module in modules
    }
    assert {name for name, tensor in rollout.items() if tensor.dtype == torch.float8_e4m3fn} == expected
    assert rollout.keys() - trainer.keys() == {f"{name}_scale_inv" for name in expected}
    assert all(rollout[name] is trainer[name] for name in trainer.keys() - expected)


@pytest.mark.parametrize("family", ["glm4_moe", "llama", "mixtral", "qwen2", "qwen2_moe"])
def test_matrices_of_other_families_that_stay(family: str, tiny_model: Callable[..., Path]) -> None:
    folder = SafetensorsFolder(tiny_model(family, num_layers=2))
    stay = {
        name.split(".layers.")[-1][2:]
        for name in folder.names
        if len(folder.shape(name)) == 2 and not is_quantized(name)
    }
    routers = {
        "glm4_moe": {"mlp.gate.weight"},
        "mixtral": {"block_sparse_moe.gate.weight"},
        "qwen2_moe": {"mlp.gate.weight", "mlp.shared_expert_gate.weight"},
    }
    assert stay == {"del.embed_tokens.weight", "_head.weight"} | routers.get(family, set())
