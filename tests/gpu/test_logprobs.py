"""Log probabilities without logits on one NVIDIA GPU, with the Triton kernels, against float64.

These tests have not run yet: they were written on a machine without a GPU.
"""

from __future__ import annotations

import pytest
import torch

from megatron_gmpo.policy.logprobs import vocab_parallel_logprobs

pytestmark = pytest.mark.gpu

TOKENS, HIDDEN = 300, 64
BOUNDS = {torch.float32: 2e-3, torch.bfloat16: 2e-2}
"""Largest ||found - expected|| / ||expected||: products in tf32 at worst, and logits rounded to bf16."""


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("vocab", [500, 151_936])
@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradients_equal_float64(
    dtype: torch.dtype, vocab: int, with_entropy: bool, temperature: float
) -> None:
    draw = torch.Generator("cuda").manual_seed(0)
    inputs = [
        (2 * torch.randn(rows, HIDDEN, device="cuda", generator=draw) * scale).to(dtype).requires_grad_()
        for rows, scale in ((TOKENS, 1.0), (vocab, HIDDEN**-0.5))
    ]
    labels = torch.randint(vocab, (TOKENS,), device="cuda", generator=draw)
    weights = torch.randn(2, TOKENS, device="cuda", generator=draw)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    logp = (exact[0] @ exact[1].T / temperature).log_softmax(-1)
    expected = logp.gather(1, labels[:, None])[:, 0], -(logp.exp() * logp).sum(-1)
    found = vocab_parallel_logprobs(
        *inputs, labels, vocab_size=vocab, tp_group=None, temperature=temperature, chunk_tokens=128
    )
    results = []
    for outputs, leaves in ((found, inputs), (expected, exact)):
        loss = (weights[0] * outputs[0]).sum() + with_entropy * (weights[1] * outputs[1]).sum()
        results.append([*outputs, *torch.autograd.grad(loss, leaves)])
    for name, ours, theirs in zip(("logprobs", "entropy", "hidden", "weight"), *results, strict=True):
        assert float((ours.double() - theirs).norm() / theirs.norm()) < BOUNDS[dtype], name


def test_an_expanded_gradient() -> None:
    """The gradient of a sum has stride 0, which the kernels must not read as consecutive numbers."""
    hidden, weight = (torch.randn(rows, HIDDEN, device="cuda", requires_grad=True) for rows in (TOKENS, 500))
    labels = torch.randint(500, (TOKENS,), device="cuda")
    logprobs, _ = vocab_parallel_logprobs(hidden, weight, labels, vocab_size=500, tp_group=None)
    found = torch.autograd.grad(logprobs.sum(), hidden, retain_graph=True)[0]
    expected = torch.autograd.grad((logprobs * torch.ones_like(logprobs)).sum(), hidden)[0]
    assert torch.equal(found, expected)
