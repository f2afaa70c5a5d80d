"""Describe the GPU, its libraries and its measured ceilings.

Run: python -m benchmarks.gpu_machine [--out FOLDER]

The ceilings are a copy within the GPU's memory, which counts bytes read and bytes written, and a square
product of random bf16 matrices. Data sheets give higher figures than any program reaches.
"""

from __future__ import annotations

import importlib
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Literal

import torch

from benchmarks.gpu import Report, device_name, hardware_of, median_seconds
from megatron_gmpo.command_line import Options, one_line_errors, parse_options
from megatron_gmpo.config import Positive
from megatron_gmpo.platform import choose_device

PACKAGES = ("torch", "triton", "transformer_engine", "megatron-core", "transformers", "flash-attn", "numpy")


class Machine(Options):
    """Describe the GPU, its libraries and its measured ceilings."""

    copied: Positive = 4 * 10**9
    """Bytes to copy."""
    width: Positive = 8192
    """Rows and columns of the matrices."""
    rounds: Positive = 10
    """Measured repetitions."""
    device: Literal["cuda", "cpu"] = "cuda"
    """``cpu`` only tests the benchmark."""
    out: Path = Path("runs/gpu_machine")
    """Folder that receives the figures."""


def versions() -> dict[str, str]:
    found = {"Python": platform.python_version(), "CUDA of torch": torch.version.cuda or "none"}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def main(options: Machine) -> None:
    report = Report("gpu_machine", options.out)
    device = choose_device(options.device)
    for name, version in versions().items():
        report.add("Versions", {"package": name, "version": version})
    facts = {"GPU": device_name(device), "CPU threads of torch": torch.get_num_threads()}
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        facts |= {
            "compute capability": f"{found.major}.{found.minor}",
            "multiprocessors": found.multi_processor_count,
            "memory GB": found.total_memory / 1e9,
            "L2 MB": found.L2_cache_size / 1e6,
        }
        with report.attempt("driver"):
            query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm", "--format=csv,noheader"]
            facts["driver, highest clock"] = subprocess.check_output(query, text=True, timeout=20).strip()
        with report.attempt("import of Transformer Engine"):
            importlib.import_module("transformer_engine.pytorch")
    else:
        report.skip("properties of the GPU")
    for name, value in facts.items():
        report.add("Machine", {"property": name, "value": value})

    hardware = hardware_of(device)
    source = torch.randint(256, (options.copied,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = median_seconds(lambda: target.copy_(source), device, options.rounds)
    speed = 2 * options.copied / seconds
    report.add(
        "Ceilings", {"of": "copy, TB/s", "measured": speed / 1e12, "share": speed / hardware.bandwidth}
    )
    a, b = (torch.randn(options.width, options.width, dtype=torch.bfloat16, device=device) for _ in range(2))
    seconds = median_seconds(lambda: a @ b, device, options.rounds)
    speed = 2 * options.width**3 / seconds
    report.add(
        "Ceilings",
        {"of": "bf16 product, TFLOP/s", "measured": speed / 1e12, "share": speed / hardware.flops},
    )


if __name__ == "__main__":
    with one_line_errors():
        main(parse_options(Machine, sys.argv[1:], "python -m benchmarks.gpu_machine"))
