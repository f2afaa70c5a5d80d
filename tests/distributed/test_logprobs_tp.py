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

TOKENS, PADDED, TEMPERATURE = 19, 64, 0.7


def make(vocab_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits, labels and weights (2, T) of the two outputs.

    The padding columns contain huge garbage. The labels lie on both sides of every shard border.
    """
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(TOKENS, PADDED, generator=generator) * 4
    logits[:, vocab_size:] = 1e6
    labels = torch.randint(0, vocab_size, (TOKENS,), generator=generator)
    labels[:6] = torch.tensor([0, 15, 16, 31, 32, vocab_size - 1]).clamp(max=vocab_size - 1)
    return logits, labels, torch.randn(2, TOKENS, generator=generator)


def outputs_and_gradient(vocab_size: int, chunk_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return log probabilities, entropy and the gradient of this rank's columns."""
    logits, labels, weights = make(vocab_size)
    mine = logits.chunk(dist.get_world_size(), 1)[dist.get_rank()].clone().requires_grad_()
    logprobs, entropy = vocab_parallel_logprobs(
        mine,
        labels,
        vocab_size=vocab_size,
        tp_group=dist.group.WORLD,
        temperature=TEMPERATURE,
        chunk_tokens=chunk_tokens,
    )
    (gradient,) = torch.autograd.grad((weights * torch.stack([logprobs, entropy])).sum(), mine)
    return logprobs.detach(), entropy.detach(), gradient


@pytest.mark.parametrize("chunk_tokens", [4, 64])
@pytest.mark.parametrize("vocab_size", [64, 50, 33, 32, 20, 5])
@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_agree_with_one_process(
    ranks: RankPool, world_size: int, vocab_size: int, chunk_tokens: int
) -> None:
    logits, labels, weights = make(vocab_size)
    exact = logits.double().requires_grad_()
    logp = torch.log_softmax(exact[:, :vocab_size] / TEMPERATURE, -1)
    logprobs, entropy = logp.gather(1, labels[:, None])[:, 0], -(logp.exp() * logp).sum(-1)
    (gradient,) = torch.autograd.grad((weights * torch.stack([logprobs, entropy])).sum(), exact)
    results = ranks.run(world_size, outputs_and_gradient, vocab_size, chunk_tokens)
    for ours in results:
        assert_close(ours[0].double(), logprobs, atol=1e-5, rtol=1e-5)
        assert_close(ours[1].double(), entropy, atol=1e-5, rtol=1e-5)
        assert torch.equal(ours[0], results[0][0])
        assert torch.equal(ours[1], results[0][1])
    assert_close(torch.cat([ours[2] for ours in results], 1).double(), gradient, atol=1e-5, rtol=1e-5)
