"""Log probability and entropy, compared with float64 autograd through torch's own log_softmax."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from megatron_gmpo.policy.logprobs import vocab_parallel_logprobs

VOCAB, PADDED = 50, 64


def make(tokens: int = 23, dtype: torch.dtype = torch.float32, garbage: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return logits with garbage in the columns beyond VOCAB, and labels at both ends of the vocabulary."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(tokens, PADDED, generator=generator) * 4
    logits[:, VOCAB:] = torch.randn(tokens, PADDED - VOCAB, generator=generator) + garbage
    labels = torch.randint(0, VOCAB, (tokens,), generator=generator)
    if tokens:
        labels[0], labels[-1] = 0, VOCAB - 1
    return logits.to(dtype), labels


def reference(
    logits: Tensor, labels: Tensor, temperature: float, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return log probabilities, entropy and the gradient of their weighted sum, in float64.

    Args:
        weights: (2, T) weights of both outputs.
    """
    logits = logits.double().requires_grad_()
    logp = torch.log_softmax(logits[:, :VOCAB] / temperature, -1)
    logprobs, entropy = logp.gather(1, labels[:, None])[:, 0], -(logp.exp() * logp).sum(-1)
    (gradient,) = torch.autograd.grad((weights.double() * torch.stack([logprobs, entropy])).sum(), logits)
    return logprobs.detach(), entropy.detach(), gradient


def compute(
    logits: Tensor, labels: Tensor, weights: Tensor, **options: float
) -> tuple[Tensor, Tensor, Tensor]:
    logits = logits.clone().requires_grad_()
    logprobs, entropy = vocab_parallel_logprobs(  # pyright: ignore
        logits, labels, vocab_size=VOCAB, tp_group=None, **options
    )
    (gradient,) = torch.autograd.grad(
        (weights.to(logprobs.dtype) * torch.stack([logprobs, entropy])).sum(), logits
    )
    return logprobs.detach(), entropy.detach(), gradient


def mixture(tokens: int) -> Tensor:
    """Return weights of both outputs. Some tokens use only one output; one uses none, like masked tokens."""
    weights = torch.randn(2, tokens, generator=torch.Generator().manual_seed(1))
    if tokens > 3:
        weights[0, 1] = weights[1, 2] = 0
        weights[:, 3] = 0
    return weights


@pytest.mark.parametrize("chunk_tokens", [1, 7, 23, 128])
@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_values_and_gradient(temperature: float, chunk_tokens: int) -> None:
    logits, labels = make()
    weights = mixture(len(labels))
    ours = compute(logits, labels, weights, temperature=temperature, chunk_tokens=chunk_tokens)
    for got, wanted in zip(ours, reference(logits, labels, temperature, weights), strict=True):
        assert got.dtype == torch.float32
        assert_close(got.double(), wanted, atol=1e-5, rtol=1e-5)


def test_gradcheck_in_float64() -> None:
    logits, labels = make(5, torch.float64)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: vocab_parallel_logprobs(
            x, labels, vocab_size=VOCAB, tp_group=None, temperature=0.8, chunk_tokens=2
        ),
        logits,
    )


@pytest.mark.parametrize("garbage", [0.0, 1e4, -1e4, 3e38, float("inf"), float("nan")])
def test_padding_columns_take_no_probability_and_get_no_gradient(garbage: float) -> None:
    logits, labels = make(garbage=garbage)
    weights = mixture(len(labels))
    ours = compute(logits, labels, weights)
    for got, wanted in zip(ours, reference(make()[0], labels, 1.0, weights), strict=True):
        assert_close(got.double(), wanted, atol=1e-5, rtol=1e-5)
    assert (ours[2][:, VOCAB:] == 0).all()


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_large_logits_do_not_overflow(offset: float) -> None:
    logits, labels = make()
    logits = (logits + offset).float()
    for got, wanted in zip(
        compute(logits, labels, mixture(23)), reference(logits, labels, 1.0, mixture(23)), strict=True
    ):
        assert_close(got.double(), wanted, atol=1e-5, rtol=1e-5)


def test_certain_tokens() -> None:
    """The distribution is one-hot: log probabilities of 0 and far below, entropy 0, and a finite gradient."""
    logits = torch.zeros(2, PADDED)
    logits[:, 3] = 200.0
    logprobs, entropy, gradient = compute(logits, torch.tensor([3, 4]), torch.ones(2, 2))
    assert_close(logprobs, torch.tensor([0.0, -200.0]))
    assert_close(entropy, torch.zeros(2))
    assert gradient.isfinite().all()


def test_bf16_logits_are_computed_in_fp32() -> None:
    logits, labels = make(dtype=torch.bfloat16)
    weights = mixture(len(labels))
    logprobs, entropy, gradient = compute(logits, labels, weights, temperature=0.9, chunk_tokens=4)
    wanted = reference(logits, labels, 0.9, weights)
    assert logprobs.dtype == entropy.dtype == torch.float32
    assert gradient.dtype == torch.bfloat16
    assert_close(logprobs.double(), wanted[0], atol=1e-5, rtol=1e-5)
    assert_close(entropy.double(), wanted[1], atol=1e-5, rtol=1e-5)
    assert_close(gradient.double(), wanted[2], atol=1e-6, rtol=2**-8)  # rounded only once, at the end


def test_logits_are_left_as_they_were() -> None:
    logits, labels = make()
    before = logits.clone()
    compute(logits, labels, mixture(len(labels)))
    assert torch.equal(logits, before)


def test_no_tokens() -> None:
    logits, labels = make(0)
    logprobs, entropy, gradient = compute(logits, labels, mixture(0))
    assert logprobs.shape == entropy.shape == (0,)
    assert gradient.shape == (0, PADDED)


def test_only_a_few_chunks_live_beside_the_logits() -> None:
    """No intermediate tensor except the gradient is larger than a chunk."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0
        whole = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            fresh = isinstance(out, Tensor) and not any(
                isinstance(a, Tensor) and a.untyped_storage().data_ptr() == out.untyped_storage().data_ptr()
                for a in args
            )
            if fresh:
                full = out.shape == (512, PADDED)
                self.whole += full
                self.elements = max(self.elements, 0 if full else out.numel())
            return out

    logits, labels = make(512)
    logits.requires_grad_()
    with Largest() as largest:
        logprobs, entropy = vocab_parallel_logprobs(
            logits, labels, vocab_size=VOCAB, tp_group=None, chunk_tokens=16
        )
        (logprobs + entropy).sum().backward()
    assert largest.whole == 1
    assert largest.elements <= max(16 * PADDED, 3 * 512)
