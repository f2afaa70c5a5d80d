"""Compare the Triton kernels with float64, in Triton's interpreter, in a process of their own.

tests/unit/test_logprob_kernels.py runs it with TRITON_INTERPRET=1, which Triton reads when it is imported.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.testing import assert_close

from megatron_gmpo.policy import logprob_kernels
from megatron_gmpo.policy.logprobs import ChunkTokens

BLOCK = 64
CASES = [(7, 200), (3, BLOCK), (5, BLOCK - 1), (4, BLOCK + 1), (2, 1)]
"""Numbers of tokens and columns: several blocks, one block, and blocks that are not full."""


def check(tokens: int, columns: int, dtype: torch.dtype, temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(tokens, columns, generator=generator) * 4 + 30).to(dtype)
    labels = torch.randint(columns, (tokens,), generator=generator)
    upstream = torch.randn(2, tokens, generator=generator)
    exact = logits.double().requires_grad_()
    logp = (exact / temperature).log_softmax(-1)
    expected = logp.gather(1, labels[:, None])[:, 0], -(logp.exp() * logp).sum(-1)

    highest, total, weighted, at_label = logprob_kernels.statistics(logits, labels, temperature)
    log_z = total.log()
    entropy = log_z - weighted / total
    assert_close((at_label - log_z).double(), expected[0].detach(), atol=2e-5, rtol=1e-5)
    assert_close(entropy.double(), expected[1].detach(), atol=2e-5, rtol=1e-5)

    mine = torch.arange(tokens) % 2 == 0  # the label of every other token lies on another rank
    expanded = upstream[0, :1].expand(tokens)  # stride 0, as the gradient of a sum
    for grad_logprobs, grad_entropy in (
        (upstream[0], upstream[1]),
        (upstream[0], None),
        (expanded, expanded),
    ):
        # without its label a token's gradient is that of -log z
        loss = (
            grad_logprobs * (expected[0] * mine + (expected[0] - _at(exact, labels, temperature)) * ~mine)
        ).sum()
        if grad_entropy is not None:
            loss = loss + (grad_entropy * expected[1]).sum()
        (wanted,) = torch.autograd.grad(loss, exact, retain_graph=True)
        known = ChunkTokens(labels, mine, highest, log_z, entropy, grad_logprobs, grad_entropy)
        found = logprob_kernels.gradient_(logits.clone(), known, temperature)
        assert found.dtype == dtype
        # the interpreter truncates to bf16, a GPU rounds to the nearest
        rounding = 2**-7 if dtype == torch.bfloat16 else 1e-5
        assert_close(found.double(), wanted, atol=2e-5, rtol=rounding)


def _at(logits: Tensor, labels: Tensor, temperature: float) -> Tensor:
    return logits.gather(1, labels[:, None])[:, 0] / temperature


def main() -> None:
    logprob_kernels._BLOCK = BLOCK
    for tokens, columns in CASES:
        for dtype in (torch.float32, torch.bfloat16):
            for temperature in (1.0, 0.7):
                check(tokens, columns, dtype, temperature)


if __name__ == "__main__":
    main()
