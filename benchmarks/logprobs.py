"""Measure memory and time of the head and GMPO's loss without logits.

Run: python -m benchmarks.logprobs   (about three minutes)

memory: one microbatch of 16,384 tokens with Qwen's vocabulary of 151,936, in fp32 on the CPU, forward and
backward. ``extra_over_logits`` is the peak of resident memory beyond hidden states, output matrix and their
gradients, as a multiple of the logits, which would take 10 GB. The target is at most 0.02. A hidden size of
64 keeps the run short; the memory beyond the inputs does not depend on it.

time: 1,024 tokens with a hidden size of 1,024, against a peer that computes all logits, ``log_softmax`` and
``gather``, and no entropy. The backward pass of this project computes the logits again, which is one matrix
product more than the peer's three. The target is at most 1.3 times the peer's time. Times are CPU times of
one thread. Both sides take turns, and each figure is the median of five rounds; ``ratios`` are those of the
rounds, in ascending order.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from megatron_gmpo.losses.gmpo import gmpo
from megatron_gmpo.losses.tokens import LossTokens
from megatron_gmpo.policy.logprobs import vocab_parallel_logprobs

VOCABULARY, ROUNDS, SEQUENCES = 151_936, 5, 16
MEMORY_LIMIT, TIME_LIMIT = 0.02, 1.3

Inputs = tuple[Tensor, Tensor, Tensor]


def make(tokens: int, hidden_size: int) -> Inputs:
    """Return hidden states, output matrix and labels."""
    hidden = torch.randn(tokens, hidden_size, requires_grad=True)
    weight = (torch.randn(VOCABULARY, hidden_size) * hidden_size**-0.5).requires_grad_()
    return hidden, weight, torch.randint(VOCABULARY, (tokens,))


def without_logits(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return vocab_parallel_logprobs(hidden, weight, labels, vocab_size=VOCABULARY, tp_group=None)[0]


def with_logits(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return (hidden @ weight.T).log_softmax(-1).gather(1, labels[:, None])[:, 0]


def resident(peak: bool = False) -> int:
    """Return this process's resident memory in bytes, or its peak since ``reset_peak``."""
    name = "VmHWM:" if peak else "VmRSS:"
    fields = next(
        line.split() for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)
    )
    return int(fields[1]) * 1024


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")  # proc(5)


def measure(function: Callable[..., Tensor], inputs: Inputs) -> tuple[float, int, Tensor]:
    """Return CPU seconds, bytes at the peak beyond inputs and their gradients, and log probabilities."""
    hidden, weight, labels = inputs
    hidden.grad = weight.grad = None
    before = resident()
    reset_peak()
    start = time.process_time()
    logprobs = function(hidden, weight, labels)
    loss(logprobs).backward()
    seconds = time.process_time() - start
    extra = resident(peak=True) - before - hidden.nbytes - weight.nbytes
    return seconds, extra, logprobs.detach()


def loss(logprobs: Tensor) -> Tensor:
    """Return GMPO's loss of ``SEQUENCES`` sequences of equal length."""
    tokens = LossTokens(
        logprobs,
        logprobs.detach(),
        torch.ones(len(logprobs), dtype=torch.bool),
        torch.arange(SEQUENCES).repeat_interleave(len(logprobs) // SEQUENCES),
        torch.ones(SEQUENCES),
    )
    return gmpo(tokens, clip_low=0.4, clip_high=0.4).loss


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    measure(without_logits, make(16, 8))  # loads libraries, which must not count
    tokens = 16_384
    _, extra, _ = measure(without_logits, make(tokens, 64))
    share = extra / (4 * tokens * VOCABULARY)
    inputs = make(1024, 1024)
    ours, peer = [], []
    for _ in range(ROUNDS):
        ours.append(measure(without_logits, inputs))
        peer.append(measure(with_logits, inputs))
    seconds, peer_seconds = ([taken for taken, _, _ in rounds] for rounds in (ours, peer))
    ratios = sorted(own / other for own, other in zip(seconds, peer_seconds, strict=True))
    result = {
        "benchmark": "logprobs",
        "extra_over_logits": round(share, 4),
        "seconds": round(median(seconds), 2),
        "peer_seconds": round(median(peer_seconds), 2),
        "ratio": round(median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "within_limit": share <= MEMORY_LIMIT and median(ratios) <= TIME_LIMIT,
        "max_difference": float((ours[0][2] - peer[0][2]).abs().max()),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
