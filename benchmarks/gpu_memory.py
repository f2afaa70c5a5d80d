"""Measure the GPU memory that a trainer gives back before rollout servers take it.

Run: python -m benchmarks.gpu_memory [--out FOLDER]

The model is that of ``benchmarks.gpu_step`` with fewer layers. ``released`` compares the GPU's free memory
before and after, as another process sees it. The rows:

reference to the host        ``model.reference_offload``: the reference policy's weights leave the GPU.
reference for one pass       the weights come back for a pass; afterwards nothing of them may remain.
caches after a step          ``engine.sleep``: torch returns its cached memory to the GPU.

The second table has the memory of training steps with ``optimizer.offload_fraction`` 0 and 1.

The memory that an SGLang server releases is measured by tests/gpu/test_rollouts.py.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.gpu import Report, Row, median_seconds, peak_bytes, wait
from benchmarks.gpu_step import GpuStep, in_a_process, open_policy, random_batch, write_model
from megatron_gmpo.batch.columns import TrainBatch
from megatron_gmpo.command_line import one_line_errors, parse_options
from megatron_gmpo.config import Positive
from megatron_gmpo.losses.objective import make_objective
from megatron_gmpo.policy.build import move_to_host, on_device
from megatron_gmpo.policy.policy import Policy


class GpuMemory(GpuStep):
    """Measure the GPU memory that a trainer gives back before rollout servers take it."""

    layers: Positive = 2
    """Decoder layers."""
    sequences: Positive = 4
    """Sequences per step."""
    out: Path = Path("runs/gpu_memory")
    """Folder that receives the figures."""


def in_use(device: torch.device) -> int:
    """Return the bytes of the GPU that are not free; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    wait(device)
    free, total = torch.cuda.mem_get_info()
    return total - free


def empty_cache(device: torch.device) -> None:
    if device.type == "cuda":
        wait(device)
        torch.cuda.empty_cache()


def released(name: str, device: torch.device, work: Callable[[], object]) -> Row:
    """Run ``work`` once and return the memory that it frees."""
    before = in_use(device)
    seconds = _seconds(work, device)
    after = in_use(device)
    return {
        "what": name,
        "before GB": before / 1e9,
        "after GB": after / 1e9,
        "released GB": (before - after) / 1e9,
        "s": seconds,
    }


def measure_reference(model: Path, options: GpuMemory) -> list[Row]:
    policy = open_policy({"algorithm": {"kl_coef": 0.01}}, model, options)
    device, batch = policy.device, policy.share(random_batch(options))
    chunks = policy.reference
    assert chunks is not None
    empty_cache(device)

    def to_host() -> None:
        move_to_host(chunks)
        empty_cache(device)

    def one_pass() -> None:
        with on_device(chunks, device):
            policy.schedule.logprobs(chunks, batch)
        empty_cache(device)

    rows = [released("reference to the host", device, to_host)]
    rows.append(released("reference for one pass", device, one_pass))
    policy.set_old_logprobs(batch)
    batch.ref_logprobs = batch.old_logprobs
    train(policy, batch, options)
    rows.append(released("caches after a step", device, lambda: empty_cache(device)))
    return rows


def measure_peak(fraction: float, model: Path, options: GpuMemory) -> Row:
    """Return the peak of a second step, beyond what is allocated between steps, and what is allocated."""
    policy = open_policy({"optimizer": {"offload_fraction": fraction}}, model, options)
    device, batch = policy.device, policy.share(random_batch(options))
    policy.set_old_logprobs(batch)
    train(policy, batch, options)  # the optimizer allocates its state
    empty_cache(device)
    between = in_use(device)
    peak = peak_bytes(lambda: train(policy, batch, options), device)
    return {
        "offload_fraction": fraction,
        "between steps GB": between / 1e9,
        "more during a step GB": peak / 1e9,
        "step s": median_seconds(lambda: train(policy, batch, options), device, 2),
    }


def train(policy: Policy, batch: TrainBatch, options: GpuMemory) -> None:
    objective = make_objective(policy.cfg.algorithm, is_moe=True, max_new_tokens=options.length)
    policy.train_step(batch, objective)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - start


def main(options: GpuMemory) -> None:
    report = Report("gpu_memory", options.out)
    with tempfile.TemporaryDirectory() as folder:
        model = in_a_process(options.device, write_model, Path(folder) / "model", options)
        with report.attempt("released memory"):
            for row in in_a_process(options.device, measure_reference, model, options):
                report.add("Released memory", row)
        fractions = (0.0, 1.0)
        if options.device == "cpu":
            report.skip("released memory, and the optimizer on the host")
            fractions = ()
        for fraction in fractions:
            with report.attempt(f"memory with optimizer.offload_fraction = {fraction}"):
                row = in_a_process(options.device, measure_peak, fraction, model, options)
                report.add("Memory with the optimizer on the host", row)


if __name__ == "__main__":
    with one_line_errors():
        main(parse_options(GpuMemory, sys.argv[1:], "python -m benchmarks.gpu_memory"))
