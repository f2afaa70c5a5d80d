"""RMSNorm of the plain layer spec: torch's values, and gradients of float64."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from megatron_gmpo.models.attention import RMSNorm

EPS = 1e-2  # not small beside the mean square of a short row


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(7, 1, 24), (5, 3, 8), (0, 1, 8)])
def test_values_and_gradients(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    config: Any = SimpleNamespace(params_dtype=dtype, sequence_parallel=False)
    norm = RMSNorm(config, shape[-1], EPS)
    draw = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(shape, generator=draw).to(dtype) for _ in range(2))
    x *= 0.1
    with torch.no_grad():
        norm.weight.copy_(1 + torch.randn(shape[-1], generator=draw) / 2)
    found = norm(x.requires_grad_())
    assert torch.equal(found, torch.nn.functional.rms_norm(x, shape[-1:], norm.weight, EPS))

    exact = [tensor.detach().double().requires_grad_() for tensor in (x, norm.weight)]
    rows = exact[0] / (exact[0].square().mean(-1, keepdim=True) + EPS).sqrt() * exact[1]
    wanted = torch.autograd.grad(rows, exact, grad.double())
    atol, rtol = (5e-2, 1e-2) if dtype == torch.bfloat16 else (1e-5, 1e-5)
    for got, value in zip(torch.autograd.grad(found, (x, norm.weight), grad), wanted, strict=True):
        assert got.dtype == dtype
        assert_close(got.double(), value, atol=atol, rtol=rtol)
