"""Measure log probabilities and entropies on one GPU: with and without logits, in plain torch and in Triton.

Run: python -m benchmarks.gpu_logprobs [--out FOLDER]

Paths, all from hidden states and the output matrix in bf16, with the logits of a chunk in bf16:

logits, torch       all logits are stored; the arithmetic on a chunk is plain torch (the former path).
logits, Triton      all logits are stored; one kernel per chunk and pass (``policy.logprob_kernels``).
no logits, torch    logits exist for one tile, a chunk of tokens times a block of the vocabulary, and are
                    computed again in the backward pass.
no logits, Triton   the same with the kernels: the path of ``policy.logprobs`` on a GPU.

floor               the three matrix products that every path needs, 6 T H V FLOPs, at the GPU's bf16 peak.
of the FLOPs        share of that peak, with the FLOPs that the path computes: 8 T H V without logits.
of the bandwidth    share of the memory bandwidth, with the bytes that the path must move: bf16 logits are
                    written and read once per pass and product. Without logits, every chunk also reads the
                    matrix three times, and reads and writes its fp32 gradient; every block does the same with
                    the hidden states.
off                 distance from float64, ||found - expected|| / ||expected||, the largest of log
                    probabilities, entropies, and gradients of the hidden states and of the matrix, on
                    ``--checked`` tokens. bf16 logits give 1e-3 to 1e-2.

The table of chunk sizes shows which ``train.logprob_chunk_tokens`` the last path needs. The table of kernels
counts 2 bytes per logit for the statistics and 4 for the gradient.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from benchmarks.gpu import Report, Row, hardware_of, median_seconds, peak_bytes
from megatron_gmpo.command_line import Options, one_line_errors, parse_options
from megatron_gmpo.config import Positive
from megatron_gmpo.platform import choose_device
from megatron_gmpo.policy import logprobs as policy_logprobs
from megatron_gmpo.policy.logprobs import ChunkTokens, TorchArithmetic, vocab_parallel_logprobs

KERNEL_TOKENS = (1024, 8192)
"""Chunks of the kernels' table; their logits are several times as large as the L2 cache."""


class GpuLogprobs(Options):
    """Measure log probabilities with and without logits on one GPU."""

    tokens: Positive = 16_384
    """Tokens of a microbatch."""
    hidden: Positive = 2048
    """Width of the hidden states."""
    vocab: Positive = 151_936
    """Vocabulary size."""
    chunks: tuple[Positive, ...] = (128, 256, 512, 1024, 2048, 4096, 8192)
    """Values of ``train.logprob_chunk_tokens``."""
    checked: Positive = 256
    """Tokens that are compared with float64."""
    rounds: Positive = 5
    """Measured repetitions."""
    device: Literal["cuda", "cpu"] = "cuda"
    """``cpu`` only tests the benchmark: it measures no kernel, and reports shares of an H100's peaks."""
    out: Path = Path("runs/gpu_logprobs")
    """Folder that receives the figures."""


class Inputs(NamedTuple):
    hidden: Tensor
    weight: Tensor
    labels: Tensor


class Way(NamedTuple):
    """One way to compute log probabilities."""

    logits: bool
    arithmetic: Any
    chunk_tokens: int

    def __call__(self, hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return logprobs and entropy, both (T,), as ``vocab_parallel_logprobs`` does."""
        if self.logits:
            found: Any = _FromLogits.apply(hidden @ weight.T, labels, self.arithmetic, self.chunk_tokens)
            return found
        return vocab_parallel_logprobs(
            hidden, weight, labels, vocab_size=len(weight), tp_group=None, chunk_tokens=self.chunk_tokens
        )

    def run(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Compute forward and backward; only the log probabilities have a gradient, as in training."""
        inputs.hidden.grad = inputs.weight.grad = None
        # the device decides the arithmetic; the benchmark also measures the one that it does not choose
        with mock.patch.object(policy_logprobs, "_arithmetic", return_value=self.arithmetic):
            logprobs, entropy = self(*inputs)
            logprobs.sum().backward()
        return logprobs.detach(), entropy.detach()

    @torch.no_grad()
    def forward(self, inputs: Inputs) -> None:
        with mock.patch.object(policy_logprobs, "_arithmetic", return_value=self.arithmetic):
            self(*inputs)

    def flops(self, options: GpuLogprobs) -> int:
        return (6 if self.logits else 8) * options.tokens * options.hidden * options.vocab

    def nbytes(self, options: GpuLogprobs) -> int:
        matrix, logits = options.hidden * options.vocab, options.tokens * options.vocab
        if self.logits:  # products and their inputs: 3 reads of the matrix, 1 write of its gradient
            return 6 * 2 * logits + 4 * 2 * matrix
        chunks = -(-options.tokens // self.chunk_tokens)
        blocks = -(-options.vocab // policy_logprobs.tile_columns(torch.device(options.device)))
        hidden = options.tokens * options.hidden
        return 7 * 2 * logits + (3 * 2 + 2 * 4) * (chunks * matrix + blocks * hidden)


class _FromLogits(torch.autograd.Function):
    """Log probability and entropy from stored logits, which the backward pass replaces by their gradient."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, arithmetic: Any, chunk_tokens: int
    ) -> tuple[Tensor, Tensor]:
        parts = [
            arithmetic.statistics(some, of_some, 1.0)
            for some, of_some in zip(logits.split(chunk_tokens), labels.split(chunk_tokens), strict=True)
        ]
        highest, total, weighted, at_label = torch.cat(parts, 1)
        log_z = total.log()
        entropy = log_z - weighted / total
        ctx.save_for_backward(logits, labels, highest, log_z, entropy)
        ctx.arithmetic, ctx.chunk_tokens = arithmetic, chunk_tokens
        return at_label - log_z, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        logits, labels, highest, log_z, entropy = ctx.saved_tensors
        mine = torch.ones_like(labels, dtype=torch.bool)
        columns = (labels, mine, highest, log_z, entropy, grads[0])
        for some, *of_some in zip(
            logits.split(ctx.chunk_tokens), *(c.split(ctx.chunk_tokens) for c in columns), strict=True
        ):
            some.copy_(ctx.arithmetic.gradient_(some, ChunkTokens._make([*of_some, None]), 1.0))
        return logits, None, None, None


def make(tokens: int, options: GpuLogprobs, device: torch.device) -> Inputs:
    hidden = torch.randn(tokens, options.hidden, dtype=torch.bfloat16, device=device)
    weight = torch.randn(options.vocab, options.hidden, dtype=torch.bfloat16, device=device)
    weight.mul_(2 * options.hidden**-0.5)
    labels = torch.randint(options.vocab, (tokens,), device=device)
    return Inputs(hidden.requires_grad_(), weight.requires_grad_(), labels)


def expected(inputs: Inputs) -> list[Tensor]:
    """Return log probabilities, entropies and both gradients in float64."""
    hidden, weight = (tensor.detach().double().requires_grad_() for tensor in inputs[:2])
    logp = (hidden @ weight.T).log_softmax(-1)
    logprobs = logp.gather(1, inputs.labels[:, None])[:, 0]
    entropy = -(logp.detach().exp() * logp.detach()).sum(-1)
    return [logprobs.detach(), entropy, *torch.autograd.grad(logprobs.sum(), (hidden, weight))]


def off(way: Way, inputs: Inputs, wanted: list[Tensor]) -> float:
    found = [*way.run(inputs), inputs.hidden.grad, inputs.weight.grad]
    distances = [
        float((a.double() - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True) if a is not None
    ]
    return max(distances)


def measure(way: Way, inputs: Inputs, options: GpuLogprobs, device: torch.device) -> Row:
    hardware = hardware_of(device)
    forward = median_seconds(lambda: way.forward(inputs), device, options.rounds)
    both = median_seconds(lambda: way.run(inputs), device, options.rounds)
    inputs.hidden.grad = inputs.weight.grad = None
    extra = peak_bytes(lambda: way.run(inputs), device) - inputs.hidden.nbytes - inputs.weight.nbytes
    floor = 6 * options.tokens * options.hidden * options.vocab / hardware.flops
    return {
        "chunk": way.chunk_tokens,
        "forward ms": 1e3 * forward,
        "both ms": 1e3 * both,
        "floor ms": 1e3 * floor,
        "over floor": both / floor,
        "of the FLOPs": way.flops(options) / both / hardware.flops,
        "of the bandwidth": way.nbytes(options) / both / hardware.bandwidth,
        "extra GB": max(0, extra) / 1e9,
    }


def measure_kernels(name: str, arithmetic: Any, options: GpuLogprobs, device: torch.device) -> list[Row]:
    """Return the speed of the arithmetic on the logits of a chunk."""
    rows = []
    for tokens in sorted({min(tokens, options.tokens) for tokens in KERNEL_TOKENS}):
        logits = torch.randn(tokens, options.vocab, dtype=torch.bfloat16, device=device)
        labels = torch.randint(options.vocab, (tokens,), device=device)
        highest, total, weighted, _ = arithmetic.statistics(logits, labels, 1.0)
        log_z, ones = total.log(), torch.ones_like(total)
        known = ChunkTokens(labels, ones.bool(), highest, log_z, log_z - weighted / total, ones, None)
        work: dict[str, Callable[[], object]] = {
            "statistics": lambda logits=logits, labels=labels: arithmetic.statistics(logits, labels, 1.0),
            "gradient": lambda logits=logits, known=known: arithmetic.gradient_(logits, known, 1.0),
        }
        for (kind, call), factor in zip(work.items(), (1, 2), strict=True):
            seconds = median_seconds(call, device, options.rounds)
            speed = factor * logits.nbytes / seconds
            rows.append(
                {
                    "arithmetic": name,
                    "kernel": kind,
                    "tokens": tokens,
                    "ms": 1e3 * seconds,
                    "TB/s": speed / 1e12,
                    "of the bandwidth": speed / hardware_of(device).bandwidth,
                }
            )
    return rows


def main(options: GpuLogprobs) -> None:
    report = Report("gpu_logprobs", options.out)
    device = choose_device(options.device)
    torch.manual_seed(0)
    arithmetics: dict[str, Any] = {"torch": TorchArithmetic}
    if device.type == "cuda":
        from megatron_gmpo.policy import logprob_kernels  # CPU builds of torch come without Triton

        arithmetics["Triton"] = logprob_kernels
    else:
        report.skip("Triton kernels")
    few, inputs = make(options.checked, options, device), make(options.tokens, options, device)
    wanted = expected(few)
    for logits in (False, True):  # the policy's path first
        for name, arithmetic in reversed(arithmetics.items()):
            title = f"{'logits' if logits else 'no logits'}, {name}"
            way = Way(logits, arithmetic, min(2048, options.tokens))
            with report.attempt(title):
                figures = measure(way, inputs, options, device)
                report.add("Log probabilities", {"path": title, **figures, "off": off(way, few, wanted)})
    name, arithmetic = list(arithmetics.items())[-1]
    for chunk in options.chunks:
        with report.attempt(f"chunks of {chunk} tokens"):
            row = measure(Way(False, arithmetic, chunk), inputs, options, device)
            report.add(f"Chunk sizes without logits, {name}", row)
    del inputs, few, wanted
    for name, arithmetic in arithmetics.items():
        with report.attempt(f"arithmetic in {name}"):
            for row in measure_kernels(name, arithmetic, options, device):
                report.add("Arithmetic on the logits of a chunk", row)


if __name__ == "__main__":
    with one_line_errors():
        main(parse_options(GpuLogprobs, sys.argv[1:], "python -m benchmarks.gpu_logprobs"))
