"""Block-wise FP8 of linear weights, the format of DeepSeek-V3's checkpoints (arXiv 2412.19437).

A weight is ``float8_e4m3fn``. The float32 tensor ``<name>_scale_inv`` holds the factor of each 128 x 128
block. The last blocks of a row or column may be smaller. SGLang (srt/layers/quantization/fp8.py) and
transformers read this format.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import NonFiniteError

BLOCK = 128
SCALE = "_scale_inv"
QUANTIZATION_CONFIG: dict[str, Any] = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [BLOCK, BLOCK],
}
"""``quantization_config`` in the config.json of such a model.

It does not list routers, embeddings and the output layer, because loaders do not quantize them."""

_LINEAR = re.compile(r"\.layers\.\d+\..*(_proj|_proj_with_mqa|\.w[123])\.weight$")
_DTYPE = torch.float8_e4m3fn
_MAX = torch.finfo(_DTYPE).max  # 448
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny


def is_quantized(name: str) -> bool:
    """Return whether the format stores the tensor with this Hugging Face name in FP8.

    These are the linear weights of attention and MLPs. Routers, the gate of a shared expert, norms, biases,
    embeddings and the output layer keep their dtype.
    """
    return _LINEAR.search(name) is not None


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of the scales of a weight of ``shape``."""
    return tuple(-(-size // BLOCK) for size in shape)


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the nearest FP8 weight and its scales.

    Args:
        weight: (rows, columns), floating point.

    Returns:
        (rows, columns) float8_e4m3fn, and (block rows, block columns) float32. A scale is the largest
        magnitude of its block divided by 448, or 1 for a block of zeros. An element of ``weight`` differs
        from the product by at most 1/16 of its value, or 2^-10 of the scale if that is larger. The scale of a
        block that contains a NaN or an infinity is not finite.
    """
    rows, columns = weight.shape
    padded = F.pad(weight.float(), (0, -columns % BLOCK, 0, -rows % BLOCK))
    # (block rows, 128, block columns, 128)
    blocks = padded.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))
    largest = blocks.abs().amax((1, 3))
    scale = torch.where(largest == 0, 1.0, (largest / _MAX).clamp_min(_SMALLEST_SCALE))
    # clamp, because a value that division rounds beyond 448 would become NaN
    values = (blocks / scale[:, None, :, None]).clamp(-_MAX, _MAX)
    return values.flatten(2).flatten(0, 1)[:rows, :columns].to(_DTYPE), scale


def dequantize(weight: Tensor, scale: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Return ``weight``, (rows, columns) float8_e4m3fn, times its blocks' scales, rounded to ``dtype``."""
    rows, columns = weight.shape
    scales = scale.float().repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
    return (weight.float() * scales).to(dtype)


def quantize_all(named_tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yield a model's tensors in this format; each quantized weight is followed by its scales.

    Raises:
        NonFiniteError: a weight contains NaN or infinite numbers.
    """
    for name, tensor in named_tensors:
        if is_quantized(name):
            weight, scale = _finite(name, tensor)
            yield name, weight
            yield name + SCALE, scale
        else:
            yield name, tensor


def rounded(named_tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yield a model's tensors in their own dtype, rounded to the values that they have in this format.

    Raises:
        NonFiniteError: a weight contains NaN or infinite numbers.
    """
    for name, tensor in named_tensors:
        yield name, dequantize(*_finite(name, tensor), tensor.dtype) if is_quantized(name) else tensor


def _finite(name: str, tensor: Tensor) -> tuple[Tensor, Tensor]:
    weight, scale = quantize(tensor)
    if not scale.isfinite().all():
        raise NonFiniteError(
            f"{name!r} is not finite and cannot be quantized: go back to an earlier checkpoint"
        )
    return weight, scale
