"""Log probability and entropy, compared with float64 autograd through torch's own log_softmax."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from megatron_gmpo.losses.gmpo import gmpo
from megatron_gmpo.losses.tokens import LossTokens
from megatron_gmpo.policy.logprobs import vocab_parallel_logprobs

from ..support.memory import peak_of_allocations

VOCAB, PADDED, HIDDEN = 50, 64, 12
Inputs = tuple[Tensor, Tensor, Tensor]
Outputs = tuple[Tensor, Tensor, Tensor, Tensor]


def make(tokens: int = 23, dtype: torch.dtype = torch.float32, garbage: float = 0.0) -> Inputs:
    """Return hidden states (T, H), an output matrix and labels at both ends of the vocabulary.

    The rows of the matrix beyond VOCAB contain garbage.
    """
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, HIDDEN, generator=generator)
    weight = torch.randn(PADDED, HIDDEN, generator=generator)
    weight[VOCAB:] += garbage
    labels = torch.randint(0, VOCAB, (tokens,), generator=generator)
    if tokens:
        labels[0], labels[-1] = 0, VOCAB - 1
    return hidden.to(dtype), weight.to(dtype), labels


def reference(inputs: Inputs, temperature: float, weights: Tensor, vocab: int = VOCAB) -> Outputs:
    """Return log probabilities, entropy and the gradients of their weighted sum, in float64.

    Args:
        weights: (2, T) weights of both outputs.
    """
    hidden, weight = (tensor.double().requires_grad_() for tensor in inputs[:2])
    logp = torch.log_softmax(hidden @ weight[:vocab].T / temperature, -1)
    logprobs, entropy = logp.gather(1, inputs[2][:, None])[:, 0], -(logp.exp() * logp).sum(-1)
    loss = (weights.double() * torch.stack([logprobs, entropy])).sum()
    return logprobs.detach(), entropy.detach(), *torch.autograd.grad(loss, (hidden, weight))


def compute(inputs: Inputs, weights: Tensor, **options: Any) -> Outputs:
    """Return what ``reference`` returns, from the function under test."""
    hidden, weight = (tensor.clone().requires_grad_() for tensor in inputs[:2])
    options = {"vocab_size": VOCAB, "tp_group": None} | options
    logprobs, entropy = vocab_parallel_logprobs(hidden, weight, inputs[2], **options)
    loss = (weights.to(logprobs.dtype) * torch.stack([logprobs, entropy])).sum()
    return logprobs.detach(), entropy.detach(), *torch.autograd.grad(loss, (hidden, weight))


def mixture(tokens: int) -> Tensor:
    """Return weights of both outputs. Some tokens use only one output; one uses none, like masked tokens."""
    weights = torch.randn(2, tokens, generator=torch.Generator().manual_seed(1))
    if tokens > 3:
        weights[0, 1] = weights[1, 2] = 0
        weights[:, 3] = 0
    return weights


@pytest.mark.parametrize("chunk_tokens", [1, 7, 23, 128])
@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_values_and_gradients(temperature: float, chunk_tokens: int) -> None:
    inputs, weights = make(), mixture(23)
    ours = compute(inputs, weights, temperature=temperature, chunk_tokens=chunk_tokens)
    for got, wanted in zip(ours, reference(inputs, temperature, weights), strict=True):
        assert got.dtype == torch.float32
        assert_close(got.double(), wanted, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("chunk_tokens", [5, 128])
@pytest.mark.parametrize("vocab", [512, 513, 1300])
def test_blocks_of_the_vocabulary(vocab: int, chunk_tokens: int) -> None:
    """Blocks of 512 columns differ much in their largest logit; labels lie at the borders of blocks."""
    hidden, weight, labels = make(dtype=torch.float32)
    weight = torch.randn(vocab, HIDDEN, generator=torch.Generator().manual_seed(2))
    weight[:, 0] += torch.linspace(-30, 30, vocab)
    labels = labels % vocab
    labels[:5] = torch.tensor([0, 511, 512, 1024, vocab - 1]).clamp(max=vocab - 1)
    weights, options = mixture(23), {"vocab_size": vocab, "temperature": 0.9}
    ours = compute((hidden, weight, labels), weights, chunk_tokens=chunk_tokens, **options)
    wanted = reference((hidden, weight, labels), 0.9, weights, vocab)
    logits = (hidden @ weight.T / 0.9).abs().max()  # their rounding is that of the largest, above 60
    assert logits > 60
    for got, exact in zip(ours, wanted, strict=True):
        assert_close(got.double(), exact, atol=1e-6 * float(logits), rtol=3e-5)


@pytest.mark.parametrize("used", [0, 1])
def test_a_loss_of_one_output(used: int) -> None:
    """The other output has no gradient, instead of a gradient of zeros."""
    inputs, weights = make(), mixture(23)
    hidden, weight = (tensor.clone().requires_grad_() for tensor in inputs[:2])
    outputs = vocab_parallel_logprobs(
        hidden, weight, inputs[2], vocab_size=VOCAB, tp_group=None, chunk_tokens=4
    )
    gradients = torch.autograd.grad((weights[used] * outputs[used]).sum(), (hidden, weight))
    weights[1 - used] = 0
    for got, wanted in zip(gradients, reference(inputs, 1.0, weights)[2:], strict=True):
        assert_close(got.double(), wanted, atol=2e-5, rtol=1e-5)


@pytest.mark.slow
def test_gradcheck_in_float64() -> None:
    hidden, weight, labels = make(5, torch.float64)
    assert torch.autograd.gradcheck(
        lambda hidden, weight: vocab_parallel_logprobs(
            hidden, weight, labels, vocab_size=VOCAB, tp_group=None, temperature=0.8, chunk_tokens=2
        ),
        (hidden.requires_grad_(), weight.requires_grad_()),
    )


@pytest.mark.parametrize("garbage", [0.0, 1e4, -1e4, 3e38, float("inf"), float("nan")])
def test_padding_rows_take_no_probability_and_get_no_gradient(garbage: float) -> None:
    weights = mixture(23)
    ours = compute(make(garbage=garbage), weights)
    for got, wanted in zip(ours, reference(make(), 1.0, weights), strict=True):
        assert_close(got.double(), wanted, atol=2e-5, rtol=1e-5)
    assert (ours[3][VOCAB:] == 0).all()


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_large_logits_do_not_overflow(offset: float) -> None:
    """A constant column of the hidden states adds ``offset`` to every logit."""
    hidden, weight, labels = make()
    hidden[:, 0], weight[:, 0] = 64.0, offset / 64.0
    inputs = (hidden, weight, labels)
    logits = (hidden @ weight.T).double()  # rounded to fp32, like ours
    logp = logits[:, :VOCAB].log_softmax(-1)
    logprobs, entropy, *gradients = compute(inputs, mixture(23))
    assert_close(logprobs.double(), logp.gather(1, labels[:, None])[:, 0], atol=1e-5, rtol=1e-5)
    assert_close(entropy.double(), -(logp.exp() * logp).sum(-1), atol=1e-5, rtol=1e-5)
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_certain_tokens() -> None:
    """The distribution is one-hot: log probabilities of 0 and far below, entropy 0, and finite gradients."""
    weight = torch.zeros(PADDED, HIDDEN)
    weight[3, 0] = 200.0
    inputs = (torch.eye(HIDDEN)[:1].repeat(2, 1), weight, torch.tensor([3, 4]))
    logprobs, entropy, *gradients = compute(inputs, torch.ones(2, 2))
    assert_close(logprobs, torch.tensor([0.0, -200.0]))
    assert_close(entropy, torch.zeros(2))
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_bf16_logits_are_rounded_once_and_computed_in_fp32() -> None:
    hidden, weight, labels = make(dtype=torch.bfloat16)
    weights = mixture(23)
    logprobs, entropy, grad_hidden, grad_weight = compute(
        (hidden, weight, labels), weights, temperature=0.9, chunk_tokens=4
    )
    assert logprobs.dtype == entropy.dtype == torch.float32
    assert grad_hidden.dtype == grad_weight.dtype == torch.bfloat16
    logits = (hidden @ weight.T).double().requires_grad_()
    logp = (logits[:, :VOCAB] / 0.9).log_softmax(-1)
    expected = torch.stack([logp.gather(1, labels[:, None])[:, 0], -(logp.exp() * logp).sum(-1)])
    (gradient,) = torch.autograd.grad((weights.double() * expected).sum(), logits)
    assert_close(torch.stack([logprobs, entropy]).double(), expected.detach(), atol=1e-5, rtol=1e-5)
    # the gradient of the logits is rounded to bf16, and each product once more
    for got, factors in ((grad_hidden, (gradient, weight)), (grad_weight, (gradient.T, hidden))):
        wanted = factors[0] @ factors[1].double()
        bound = 2**-7 * (factors[0].abs() @ factors[1].double().abs())
        assert ((got.double() - wanted).abs() <= bound + 1e-6).all()


def test_logits_of_bf16_inputs_in_fp32() -> None:
    """The logits are those of exact products, and only the products of the backward pass round to bf16."""
    hidden, weight, labels = make(dtype=torch.bfloat16)
    hidden[:, 0], weight[:, 0] = 8.0, 5.0  # logits around 40
    weights = mixture(23)
    options = {"temperature": 0.9, "chunk_tokens": 4}
    exact = reference((hidden, weight, labels), 0.9, weights)
    ours = compute((hidden, weight, labels), weights, fp32_head=True, **options)
    rounded = compute((hidden, weight, labels), weights, **options)
    for got, worse, wanted in zip(ours[:2], rounded[:2], exact[:2], strict=True):
        assert got.dtype == torch.float32
        assert_close(got.double(), wanted, atol=2e-5, rtol=1e-5)
        assert (worse - wanted).abs().max() > 0.05
    (gradient,) = torch.autograd.grad(*_loss_and_logits(hidden, weight, labels, weights, 0.9))
    for got, wanted, factors in zip(
        ours[2:], exact[2:], ((gradient, weight[:VOCAB]), (gradient.T, hidden)), strict=True
    ):
        # the gradient of the logits is rounded to bf16, and each product once more
        assert got.dtype == torch.bfloat16
        bound = 2**-7 * (factors[0].abs() @ factors[1].double().abs())
        assert ((got.double() - wanted)[: len(bound)].abs() <= bound + 1e-6).all()


def _loss_and_logits(
    hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    logits = (hidden.double() @ weight[:VOCAB].double().T).requires_grad_()
    logp = (logits / temperature).log_softmax(-1)
    outputs = torch.stack([logp.gather(1, labels[:, None])[:, 0], -(logp.exp() * logp).sum(-1)])
    return (weights.double() * outputs).sum(), logits


def test_fp32_and_float64_inputs_keep_their_dtype_with_a_head_in_fp32() -> None:
    for dtype in (torch.float32, torch.float64):
        inputs, weights = make(dtype=dtype), mixture(23)
        for got, plain in zip(
            compute(inputs, weights, fp32_head=True), compute(inputs, weights), strict=True
        ):
            assert torch.equal(got, plain)


def test_inputs_are_left_as_they_were() -> None:
    hidden, weight, labels = make()
    before = hidden.clone(), weight.clone()
    compute((hidden, weight, labels), mixture(23))
    assert torch.equal(hidden, before[0])
    assert torch.equal(weight, before[1])


def test_no_tokens() -> None:
    logprobs, entropy, grad_hidden, grad_weight = compute(make(0), mixture(0))
    assert logprobs.shape == entropy.shape == (0,)
    assert grad_hidden.shape == (0, HIDDEN)
    assert torch.equal(grad_weight, torch.zeros(PADDED, HIDDEN))


def test_the_logits_of_a_few_tiles_exist_at_a_time() -> None:
    """No tensor is larger than a tile of logits, except the matrix and what has the shape of an input."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and HIDDEN not in out.shape:
                self.elements = max(self.elements, out.numel())
            return out

    hidden, _, labels = make(512)
    weight = torch.randn(1200, HIDDEN)
    with Largest() as largest:
        logprobs, entropy = vocab_parallel_logprobs(
            hidden.requires_grad_(),
            weight.requires_grad_(),
            labels,
            vocab_size=1200,
            tp_group=None,
            chunk_tokens=60,
        )
        (logprobs + entropy).sum().backward()
    assert largest.elements == 60 * 512


@pytest.mark.slow
@pytest.mark.parametrize("entropy_coef", [0.0, 0.1])
def test_memory_of_head_and_loss(entropy_coef: float) -> None:
    """Beyond the inputs and their gradients it is below 0.02 of the logits.

    A tile is 1/256 of the logits. For 16,384 tokens and a vocabulary of 151,936 it is 1/2,374.
    """
    tokens, vocab, sequences = 2048, 8192, 16
    # of width 2, so that gradients that do not exist yet in the forward pass hardly count
    hidden, weight = (torch.randn(rows, 2, requires_grad=True) for rows in (tokens, vocab))
    labels = torch.randint(0, vocab, (tokens,))
    mask = torch.ones(tokens, dtype=torch.bool)
    owners = torch.arange(sequences).repeat_interleave(tokens // sequences)

    def head_and_loss() -> None:
        logprobs, entropy = vocab_parallel_logprobs(
            hidden, weight, labels, vocab_size=vocab, tp_group=None, chunk_tokens=tokens // 16
        )
        packed = LossTokens(
            logprobs,
            logprobs.detach(),
            mask,
            owners,
            torch.ones(sequences),
            entropy=entropy if entropy_coef else entropy.detach(),
            entropy_coef=entropy_coef,
        )
        gmpo(packed, clip_low=0.4, clip_high=0.4).loss.backward()

    extra = peak_of_allocations(head_and_loss) - hidden.nbytes - weight.nbytes
    assert hidden.grad is not None
    assert weight.grad is not None
    logits = 4 * tokens * vocab
    assert logits / 256 < extra < 0.02 * logits
