"""Vocabulary-parallel log probabilities equal those of one process.

Every rank has a part of the columns; the last columns are padding.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing import assert_close

from megatron_gmpo.policy.logprobs import vocab_parallel_logprobs

from ..support.ranks import RankPool

pytestmark = pytest.mark.distributed

TOKENS, PADDED, HIDDEN, TEMPERATURE = 19, 64, 12, 0.7


def make(vocab_size: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return hidden states, output matrix, labels and weights (2, T) of the two outputs.

    The padding rows contain huge garbage. The labels lie on both sides of every shard border.
    """
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator)
    weight = torch.randn(PADDED, HIDDEN, generator=generator)
    weight[vocab_size:] = 1e6
    labels = torch.randint(0, vocab_size, (TOKENS,), generator=generator)
    labels[:6] = torch.tensor([0, 15, 16, 31, 32, vocab_size - 1]).clamp(max=vocab_size - 1)
    return hidden.to(dtype), weight.to(dtype), labels, torch.randn(2, TOKENS, generator=generator)


def outputs_and_gradients(
    vocab_size: int, chunk_tokens: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, ...]:
    """Return log probabilities, entropy, and the gradients of the hidden states and of this rank's rows."""
    hidden, weight, labels, weights = make(vocab_size, dtype)
    mine = weight.chunk(dist.get_world_size())[dist.get_rank()].clone().requires_grad_()
    hidden.requires_grad_()
    logprobs, entropy = vocab_parallel_logprobs(
        hidden,
        mine,
        labels,
        vocab_size=vocab_size,
        tp_group=dist.group.WORLD,
        temperature=TEMPERATURE,
        chunk_tokens=chunk_tokens,
        fp32_head=True,
    )
    loss = (weights * torch.stack([logprobs, entropy])).sum()
    return logprobs.detach(), entropy.detach(), *torch.autograd.grad(loss, (hidden, mine))


def exact_outputs_and_gradients(vocab_size: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Return the values and gradients of one process in float64, and the gradient of the logits."""
    hidden, weight, labels, weights = make(vocab_size, dtype)
    exact = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logits = exact[0] @ exact[1][:vocab_size].T
    logp = torch.log_softmax(logits / TEMPERATURE, -1)
    logprobs, entropy = logp.gather(1, labels[:, None])[:, 0], -(logp.exp() * logp).sum(-1)
    loss = (weights * torch.stack([logprobs, entropy])).sum()
    return logprobs.detach(), entropy.detach(), *torch.autograd.grad(loss, (*exact, logits))


@pytest.mark.parametrize("chunk_tokens", [4, 64])
@pytest.mark.parametrize("vocab_size", [64, 50, 33, 32, 20, 5])
@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_agree_with_one_process(
    ranks: RankPool, world_size: int, vocab_size: int, chunk_tokens: int
) -> None:
    logprobs, entropy, *gradients = exact_outputs_and_gradients(vocab_size, torch.float32)
    results = ranks.run(world_size, outputs_and_gradients, vocab_size, chunk_tokens)
    for ours in results:
        assert_close(ours[0].double(), logprobs, atol=1e-5, rtol=1e-5)
        assert_close(ours[1].double(), entropy, atol=1e-5, rtol=1e-5)
        assert torch.equal(ours[0], results[0][0])
        assert torch.equal(ours[1], results[0][1])
    # each rank has a summand of the hidden states' gradient, and the whole gradient of its rows
    assert_close(sum(ours[2] for ours in results).double(), gradients[0], atol=2e-5, rtol=1e-5)
    assert_close(torch.cat([ours[3] for ours in results]).double(), gradients[1], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("vocab_size", [50, 20])
def test_a_head_in_fp32_of_bf16_inputs(ranks: RankPool, vocab_size: int) -> None:
    hidden, weight, _, _ = make(vocab_size, torch.bfloat16)
    logprobs, entropy, *gradients, of_logits = exact_outputs_and_gradients(vocab_size, torch.bfloat16)
    results = ranks.run(2, outputs_and_gradients, vocab_size, 4, torch.bfloat16)
    for ours in results:
        assert_close(ours[0].double(), logprobs, atol=1e-5, rtol=1e-5)
        assert_close(ours[1].double(), entropy, atol=1e-5, rtol=1e-5)
    # the gradient of the logits, each product and the sum of the ranks' summands are rounded to bf16
    bound = 2**-6 * (of_logits.abs() @ weight[:vocab_size].double().abs())
    assert ((sum(ours[2].double() for ours in results) - gradients[0]).abs() <= bound + 1e-6).all()
    bound = 2**-7 * (of_logits.T.abs() @ hidden.double().abs())
    found = torch.cat([ours[3] for ours in results]).double()
    assert ((found - gradients[1])[:vocab_size].abs() <= bound + 1e-6).all()
    assert not found[vocab_size:].any()
