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


def make(vocab_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return hidden states, output matrix, labels and weights (2, T) of the two outputs.

    The padding rows contain huge garbage. The labels lie on both sides of every shard border.
    """
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator)
    weight = torch.randn(PADDED, HIDDEN, generator=generator)
    weight[vocab_size:] = 1e6
    labels = torch.randint(0, vocab_size, (TOKENS,), generator=generator)
    labels[:6] = torch.tensor([0, 15, 16, 31, 32, vocab_size - 1]).clamp(max=vocab_size - 1)
    return hidden, weight, labels, torch.randn(2, TOKENS, generator=generator)


def outputs_and_gradients(vocab_size: int, chunk_tokens: int) -> tuple[Tensor, ...]:
    """Return log probabilities, entropy, and the gradients of the hidden states and of this rank's rows."""
    hidden, weight, labels, weights = make(vocab_size)
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
    )
    loss = (weights * torch.stack([logprobs, entropy])).sum()
    return logprobs.detach(), entropy.detach(), *torch.autograd.grad(loss, (hidden, mine))


@pytest.mark.parametrize("chunk_tokens", [4, 64])
@pytest.mark.parametrize("vocab_size", [64, 50, 33, 32, 20, 5])
@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_agree_with_one_process(
    ranks: RankPool, world_size: int, vocab_size: int, chunk_tokens: int
) -> None:
    hidden, weight, labels, weights = make(vocab_size)
    exact = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logp = torch.log_softmax(exact[0] @ exact[1][:vocab_size].T / TEMPERATURE, -1)
    logprobs, entropy = logp.gather(1, labels[:, None])[:, 0], -(logp.exp() * logp).sum(-1)
    gradients = torch.autograd.grad((weights * torch.stack([logprobs, entropy])).sum(), exact)
    results = ranks.run(world_size, outputs_and_gradients, vocab_size, chunk_tokens)
    for ours in results:
        assert_close(ours[0].double(), logprobs, atol=1e-5, rtol=1e-5)
        assert_close(ours[1].double(), entropy, atol=1e-5, rtol=1e-5)
        assert torch.equal(ours[0], results[0][0])
        assert torch.equal(ours[1], results[0][1])
    # each rank has a summand of the hidden states' gradient, and the whole gradient of its rows
    assert_close(sum(ours[2] for ours in results).double(), gradients[0], atol=2e-5, rtol=1e-5)
    assert_close(torch.cat([ours[3] for ours in results]).double(), gradients[1], atol=2e-5, rtol=1e-5)
