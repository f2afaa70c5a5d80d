"""Linear weights in 8 bits with a scale for each block: the format of DeepSeek-V3's checkpoints (arXiv 2412.19437), in both directions.

A weight is ``float8_e4m3fn`` and comes with ``<name>_scale_inv``, float32: what each of its blocks of 128 x 128 is multiplied by. The last
blocks of a row or column may be smaller. SGLang (srt/layers/quantization/fp8.py) and transformers read it.
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
"""``quantization_config`` in the config.json of such a model. Routers, embeddings and the output layer need no mention: they are not among
the modules that a loader quantises."""

_LINEAR = re.compile(r"\.layers\.\d+\..*(_proj|_proj_with_mqa|\.w[123])\.weight$")
_DTYPE = torch.float8_e4m3fn
_MAX = torch.finfo(_DTYPE).max  # 448
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny


def is_quantized(name: str) -> bool:
    """Whether a model in this format has the tensor of this Hugging Face name in 8 bits: the linear weights of attention and MLPs.

    Routers, the gate of a shared expert, norms, biases, embeddings and the output layer stay as they are.
    """
    return _LINEAR.search(name) is not None


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of the scales that belong to a weight of ``shape``."""
    return tuple(-(-size // BLOCK) for size in shape)


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest weight in 8 bits.

    Args:
        weight: (rows, columns), floating point.

    Returns:
        (rows, columns) float8_e4m3fn, and the scales, float32: the largest magnitude of each block over 448, 1 for a block of zeros.
        ``weight`` differs from their product by at most 1/16 of itself, or 2^-10 of the scale where that is more. A block that holds a NaN
        or an infinity has such a scale.
    """
    rows, columns = weight.shape
    padded = F.pad(weight.float(), (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = padded.unflatten(1, (-1, BLOCK)).unflatten(
        0, (-1, BLOCK)
    )  # (block rows, 128, block columns, 128)
    largest = blocks.abs().amax((1, 3))
    scale = torch.where(largest == 0, 1.0, (largest / _MAX).clamp_min(_SMALLEST_SCALE))
    values = (blocks / scale[:, None, :, None]).clamp(
        -_MAX, _MAX
    )  # what is rounded beyond 448 would become NaN
    return values.flatten(2).flatten(0, 1)[:rows, :columns].to(_DTYPE), scale


def dequantize(weight: Tensor, scale: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """(rows, columns) float8_e4m3fn times one scale a block, rounded to ``dtype``."""
    rows, columns = weight.shape
    scales = scale.float().repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
    return (weight.float() * scales).to(dtype)


def quantize_all(named_tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """A model's tensors in this format, one after the other: each quantised weight is followed by its scales.

    Raises:
        NonFiniteError: a weight that is NaN or infinite.
    """
    for name, tensor in named_tensors:
        if is_quantized(name):
            weight, scale = _finite(name, tensor)
            yield name, weight
            yield name + SCALE, scale
        else:
            yield name, tensor


def rounded(named_tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """A model's tensors in their own dtype, with the values that they have in this format.

    Raises:
        NonFiniteError: a weight that is NaN or infinite.
    """
    for name, tensor in named_tensors:
        yield name, dequantize(*_finite(name, tensor), tensor.dtype) if is_quantized(name) else tensor


def _finite(name: str, tensor: Tensor) -> tuple[Tensor, Tensor]:
    weight, scale = quantize(tensor)
    if not scale.isfinite().all():
        raise NonFiniteError(
            f"{name!r} is not finite and cannot be quantised: go back to an earlier checkpoint"
        )
    return weight, scale
