"""Measure the memory that log probabilities and entropies need beyond the logits and their gradient.

The input is one microbatch of 4,096 tokens with Qwen's vocabulary of 151,936, in fp32 on the CPU, forward
and backward. The benchmark also measures torch.log_softmax for comparison.

Run: python -m benchmarks.logprobs   (11 GB of memory, about a minute)

``extra_over_logits`` is the peak of resident memory minus logits and gradient, as a multiple of the logits.
The target is at most 0.3. The peer, ``log_softmax`` and ``gather``, computes only the log probabilities.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from megatron_gmpo.policy.logprobs import vocab_parallel_logprobs

TOKENS, VOCABULARY = 4096, 151_936
LIMIT = 0.3


def logprobs_and_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    return vocab_parallel_logprobs(logits, labels, vocab_size=VOCABULARY, tp_group=None)


def log_softmax(logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    return (logits.log_softmax(-1).gather(1, labels[:, None])[:, 0],)


def resident(peak: bool = False) -> int:
    """Return this process's resident memory in bytes, or its peak since ``reset_peak``."""
    name = "VmHWM:" if peak else "VmRSS:"
    fields = next(
        line.split() for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)
    )
    return int(fields[1]) * 1024


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")  # proc(5)


def measure(
    function: Callable[[Tensor, Tensor], tuple[Tensor, ...]], logits: Tensor, labels: Tensor
) -> tuple[float, float, Tensor]:
    """Return peak memory beyond logits and gradient over the logits' size, seconds, and logprobs."""
    logits.grad = None
    before = resident()
    reset_peak()
    start = time.perf_counter()
    outputs = function(logits, labels)
    torch.stack(outputs).sum().backward()
    seconds = time.perf_counter() - start
    size = logits.numel() * logits.element_size()
    return (resident(peak=True) - before - size) / size, seconds, outputs[0].detach()


def main() -> None:
    torch.manual_seed(0)
    logits = torch.randn(TOKENS, VOCABULARY).requires_grad_()
    labels = torch.randint(VOCABULARY, (TOKENS,))
    # The first call loads libraries, which must not count as the cost of the function.
    measure(logprobs_and_entropy, logits[:8].detach().requires_grad_(), labels[:8])
    extra, seconds, logprobs = measure(logprobs_and_entropy, logits, labels)
    peer_extra, peer_seconds, expected = measure(log_softmax, logits, labels)
    result = {
        "benchmark": "logprobs",
        "extra_over_logits": round(extra, 3),
        "within_limit": extra <= LIMIT,
        "seconds": round(seconds, 1),
        "log_softmax_extra_over_logits": round(peer_extra, 3),
        "log_softmax_seconds": round(peer_seconds, 1),
        "max_difference": float((logprobs - expected).abs().max()),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
