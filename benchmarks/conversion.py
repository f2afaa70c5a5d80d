"""Measure speed and memory of both conversions against a plain copy and mbridge, on a synthetic Qwen3-MoE.

Run: python -m benchmarks.conversion --folder /data/conversion [--gigabytes 3]
         [--mbridge_python ENVIRONMENT/bin/python]

Every measurement runs in its own process. Peak memory is the high-water mark of the process minus its
memory after the imports; it includes pages of mapped files. mbridge converts a dense model, because its MoE
models do not run on a CPU. It needs its own environment, which also contains this project's dependencies:

    python -m venv ENVIRONMENT
    ENVIRONMENT/bin/pip install -c constraints.txt -e . mbridge==0.15.1 einops
"""

from __future__ import annotations

import filecmp
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoConfig

from megatron_gmpo.command_line import Options, one_line_errors, parse_options
from megatron_gmpo.commands.conversion_job import processes
from megatron_gmpo.config import Positive
from megatron_gmpo.weights.hf_to_megatron import HFToMegatron
from megatron_gmpo.weights.megatron_to_hf import MegatronToHF
from megatron_gmpo.weights.safetensors_folder import SafetensorsFile
from megatron_gmpo.weights.table import ConversionTable

BLOCK = 16 * 2**20
SHAPE: dict[str, Any] = {
    "vocab_size": 32768,
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "dtype": "bfloat16",
}
FAMILIES = {
    "qwen3_moe": SHAPE
    | {
        "moe_intermediate_size": 384,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "architectures": ["Qwen3MoeForCausalLM"],
    },
    "qwen3": SHAPE
    | {"intermediate_size": 8192, "tie_word_embeddings": False, "architectures": ["Qwen3ForCausalLM"]},
}


def write_model(folder: Path, family: str, gigabytes: float) -> None:
    """Write a bf16 model with random weights in one file."""
    shape = FAMILIES[family]
    width = shape.get("intermediate_size") or shape["num_experts"] * shape["moe_intermediate_size"]
    layers = max(1, round(gigabytes * 1e9 / (width * 3 * shape["hidden_size"] * 2)))
    config = AutoConfig.for_model(family, num_hidden_layers=layers, **shape)
    config.save_pretrained(folder)
    table = ConversionTable(folder)
    tensors = [
        (name, torch.bfloat16, shape)
        for entry in table.entries
        for name, shape in zip(entry.hf, entry.hf_shapes, strict=True)
    ]
    noise = torch.randn(2 * 32768 * 1024).mul_(0.02).bfloat16()
    with SafetensorsFile(folder / "model.safetensors", tensors) as file:
        for place, (name, _, shape) in enumerate(tensors):
            size = torch.Size(shape).numel()
            start = place * 4099 % (len(noise) - size)
            file.write(name, noise[start : start + size].view(shape))


def plain_copy(folder: Path, out: Path) -> None:
    out.mkdir()
    with (
        (folder / "hf/model.safetensors").open("rb", buffering=0) as reader,
        (out / "copy").open("wb", buffering=0) as writer,
    ):
        while block := reader.read(BLOCK):
            writer.write(block)
        os.fsync(writer.fileno())


def memory(field: str) -> int:
    """Return a field of /proc/self/status in bytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


def to_megatron(folder: Path, out: Path) -> None:
    HFToMegatron(folder / "hf").convert(out, verify=False, advance=lambda _: None)


def to_hf(folder: Path, out: Path) -> None:
    conversion = MegatronToHF(folder / "to_megatron", None, None)
    conversion.convert(out, verify=False, advance=lambda _: None)


def measure(name: str, folder: Path) -> None:
    """Run one measurement in this process and print ``seconds peak-bytes``."""
    if name.startswith("mbridge"):
        from benchmarks import mbridge_conversion

        conversion = getattr(mbridge_conversion, name.removeprefix("mbridge_"))
    else:
        conversion = {"plain": plain_copy, "to_megatron": to_megatron, "to_hf": to_hf}[name]
    out = folder / name
    shutil.rmtree(out, ignore_errors=True)
    os.sync()  # flush earlier writes, which would slow down this measurement
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before, started = memory("VmRSS"), time.perf_counter()
    with processes():
        conversion(folder, out)
    print(time.perf_counter() - started, memory("VmHWM") - before)


def in_its_own_process(name: str, folder: Path, python: str | Path = sys.executable) -> tuple[float, int]:
    command = [python, "-m", "benchmarks.conversion", "--folder", folder, "--only", name]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=1800)
    seconds, peak = done.stdout.splitlines()[-1].split()
    return float(seconds), int(peak)


def compare(folder: Path, repeats: int, python: dict[str, str | Path]) -> None:
    """Run the measurements and print a table.

    A plain copy runs before each measurement, because other work on the machine slows down both.

    Args:
        python: measurement -> the interpreter to use.
    """
    nbytes = (folder / "hf/model.safetensors").stat().st_size
    print(
        f"{nbytes / 1e9:.2f} GB\n{'':<28}{'seconds':>8}{'plain':>8}{'MB/s':>8}{'of plain':>10}{'peak MB':>9}"
    )
    for name, interpreter in python.items():
        rows: list[tuple[float, float, int]] = []
        for _ in range(repeats):
            plain, _peak = in_its_own_process("plain", folder)
            rows.append((plain, *in_its_own_process(name, folder, interpreter)))
        plains, times, peaks = zip(*rows, strict=True)
        for label, pick in (("median", median), ("best", min)):
            plain, seconds = pick(plains), pick(times)
            speed = f"{seconds:>8.1f}{plain:>8.1f}{nbytes / 1e6 / seconds:>8.0f}{plain / seconds:>10.2f}"
            print(f"{f'{name}, {label}':<28}{speed}{max(peaks) / 1e6:>9.0f}", flush=True)
    same = filecmp.cmp(folder / "hf/model.safetensors", folder / "to_hf/model.safetensors", shallow=False)
    print("round trip: " + ("the same file, byte for byte" if same else "a different file"))


class Benchmark(Options):
    """Measure both conversions, print tables, and remove the written folders."""

    folder: Path
    """Folder to create and remove; its disk needs room for four times the model."""
    gigabytes: float = 3.0
    """Size of the model in GB."""
    repeats: Positive = 5
    """Number of measurements of each conversion."""
    mbridge_python: Path | None = None
    """Interpreter of mbridge's environment; None skips the comparison with mbridge."""
    only: str | None = None
    """Name of the one measurement that this process runs; the benchmark sets it for its subprocesses."""


def main(options: Benchmark) -> None:
    folder, mbridge_python = options.folder, options.mbridge_python
    if options.only:
        measure(options.only, folder)
        return
    ours: dict[str, str | Path] = dict.fromkeys(("to_megatron", "to_hf"), sys.executable)
    theirs: dict[str, str | Path] = dict.fromkeys(
        ("mbridge_to_megatron", "mbridge_to_hf"), mbridge_python or ""
    )
    for family in ["qwen3_moe", *(["qwen3"] if mbridge_python else [])]:
        (folder / "hf").mkdir(parents=True)
        try:
            write_model(folder / "hf", family, options.gigabytes)
            print(f"{family}: ", end="")
            compare(folder, options.repeats, ours if family == "qwen3_moe" else ours | theirs)
        finally:
            shutil.rmtree(folder)


if __name__ == "__main__":
    with one_line_errors():
        main(parse_options(Benchmark, sys.argv[1:], "python -m benchmarks.conversion"))
