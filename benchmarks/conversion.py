"""Speed and memory of both conversions on a synthetic Qwen3-MoE, beside a plain read and write of the same bytes.

python -m benchmarks.conversion --folder /data/conversion [--gigabytes 3]

Every measurement runs in a process of its own. Peak memory is the process's high-water mark over what it had after its imports.
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

import torch
import tyro
from transformers import AutoConfig

from megatron_gmpo.checkpoint.convert import ConversionTable, HFToMegatron, MegatronToHF
from megatron_gmpo.checkpoint.safetensors_folder import SafetensorsFile
from tools.conversion import processes

BLOCK = 16 * 2**20
EXPERTS = 128


def write_model(folder: Path, gigabytes: float) -> None:
    """A bf16 Qwen3-MoE of 128 experts a layer, in files of one layer each or so; its weights are noise."""
    config = AutoConfig.for_model(
        "qwen3_moe",
        vocab_size=32768,
        hidden_size=1024,
        intermediate_size=2048,
        moe_intermediate_size=384,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=64,
        num_experts=EXPERTS,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        architectures=["Qwen3MoeForCausalLM"],
        dtype="bfloat16",
    )
    layer_bytes = EXPERTS * 3 * 1024 * 384 * 2
    config.num_hidden_layers = max(1, round(gigabytes * 1e9 / layer_bytes))
    config.save_pretrained(folder)
    table = ConversionTable(folder)
    tensors = [(name, torch.bfloat16, shape) for entry in table.entries for name, shape in zip(entry.hf, entry.hf_shapes, strict=True)]
    noise = torch.randn(2 * 32768 * 1024).mul_(0.02).bfloat16()
    with SafetensorsFile(folder / "model.safetensors", tensors) as file:
        for place, (name, _, shape) in enumerate(tensors):
            size = torch.Size(shape).numel()
            start = place * 4099 % (len(noise) - size)
            file.write(name, noise[start : start + size].view(shape))


def plain_copy(source: Path, folder: Path) -> None:
    folder.mkdir()
    with source.open("rb", buffering=0) as reader, (folder / source.name).open("wb", buffering=0) as writer:
        while block := reader.read(BLOCK):
            writer.write(block)
        os.fsync(writer.fileno())


def memory(field: str) -> int:
    """A field of this process's /proc status, in bytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


def measure(what: str, folder: Path) -> None:
    """Does one thing in this process and prints ``seconds peak-bytes``."""
    out = folder / what
    shutil.rmtree(out, ignore_errors=True)
    os.sync()  # what others left to be written is not ours to pay for
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before, started = memory("VmRSS"), time.perf_counter()
    with processes():
        if what == "plain":
            plain_copy(folder / "hf/model.safetensors", out)
        elif what == "to_megatron":
            HFToMegatron(folder / "hf").convert(out, verify=False, advance=lambda _: None)
        else:
            conversion = MegatronToHF(folder / "to_megatron", None, None)
            conversion.convert(out, max_shard_size=5 * 10**9, verify=False, advance=lambda _: None)
    print(time.perf_counter() - started, memory("VmHWM") - before)


def in_its_own_process(what: str, folder: Path) -> tuple[float, int]:
    command = [sys.executable, "-m", "benchmarks.conversion", "--folder", str(folder), "--only", what]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=1800)
    seconds, peak = done.stdout.splitlines()[-1].split()
    return float(seconds), int(peak)


def print_row(what: str, seconds: float, plain: float, nbytes: int, peak: int) -> None:
    print(f"{what:<24}{seconds:>8.1f}{plain:>8.1f}{nbytes / 1e6 / seconds:>8.0f}{plain / seconds:>10.2f}{peak / 1e6:>9.0f}", flush=True)


def main(folder: Path, gigabytes: float = 3.0, repeats: int = 5, only: str | None = None) -> None:
    """Measure, print a table, and remove what was written.

    Args:
        folder: A folder to make and remove, with room for four times the model.
        gigabytes: Size of the model.
        repeats: How often each conversion is measured, with a plain copy before each.
        only: Which measurement this process is for.
    """
    if only:
        measure(only, folder)
        return
    (folder / "hf").mkdir(parents=True)
    try:
        write_model(folder / "hf", gigabytes)
        nbytes = (folder / "hf/model.safetensors").stat().st_size
        print(f"{nbytes / 1e9:.2f} GB\n{'':<24}{'seconds':>8}{'plain':>8}{'MB/s':>8}{'of plain':>10}{'peak MB':>9}")
        for what in ("to_megatron", "to_hf"):
            rows = [(*in_its_own_process("plain", folder)[:1], *in_its_own_process(what, folder)) for _ in range(repeats)]
            for plain, seconds, peak in rows:
                print_row(what, seconds, plain, nbytes, peak)
            plains, times, peaks = zip(*rows, strict=True)
            print_row(f"{what}, median", median(times), median(plains), nbytes, max(peaks))
            print_row(f"{what}, best", min(times), min(plains), nbytes, max(peaks))
        same = filecmp.cmp(folder / "hf/model.safetensors", folder / "to_hf/model.safetensors", shallow=False)
        print("there and back: " + ("the same file, byte for byte" if same else "another file"))
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    tyro.cli(main)
