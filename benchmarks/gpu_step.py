"""Measure the training step of a Qwen3-MoE with 2.0 B random parameters on one GPU, in bf16 and FP8.

Run: python -m benchmarks.gpu_step [--recipes bf16 tensorwise ...] [--out FOLDER]

The run takes a few minutes on a GPU with Transformer Engine. Each precision is measured in its own process.
The table shows:

floor      lower bound for a step: its FLOPs at the GPU's bf16 peak plus the optimizer's bytes at its
           memory bandwidth. The FLOPs are those of three forward passes, without recomputation. A forward
           pass takes 2 x (parameters that multiply a token, without the input embedding) x tokens, plus
           2 x heads x head width x length^2 per layer and sequence (causal attention: half of both
           products). The optimizer reads gradient, main weight and two moments (fp32) and writes the last
           three and the bf16 weight: 30 bytes per parameter.
MFU        these FLOPs over the measured time and the bf16 peak, for every recipe. Target in bf16: at least
           0.40.
speedup    relative to bf16 in the same run. Target for FP8: at least 1.2.

FOLDER/kernels_RECIPE.txt lists the kernels that take most of the time (torch.profiler).
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3MoeConfig

from megatron_gmpo.batch.columns import TrainBatch
from megatron_gmpo.command_line import Options, one_line_errors, parse_options
from megatron_gmpo.config import Config, Positive
from megatron_gmpo.losses.objective import make_objective
from megatron_gmpo.models.description import describe_model
from megatron_gmpo.planning.hardware import HARDWARE, Hardware
from megatron_gmpo.platform import choose_device, prepare_megatron, seed_everything, start_process_group
from megatron_gmpo.platform.capabilities import capabilities_of
from megatron_gmpo.policy.fp8 import check_fp8
from megatron_gmpo.policy.parallel import start_model_parallel
from megatron_gmpo.policy.policy import Policy
from megatron_gmpo.testing.tiny_tokenizers import arithmetic_tokenizer

Recipe = Literal["bf16", "delayed", "tensorwise", "blockwise", "mxfp8"]
OPTIMIZER_BYTES = 30
WARM_UP_STEPS = 3
PROMPT = 128


class GpuStep(Options):
    """Measure training steps of a Qwen3-MoE with random weights on one GPU, in bf16 and FP8."""

    recipes: tuple[Recipe, ...] = ("bf16", "delayed", "tensorwise", "blockwise")
    """Precisions to measure; mxfp8 needs a Blackwell GPU."""
    layers: Positive = 8
    """Decoder layers."""
    hidden: Positive = 2048
    """Width of the residual stream."""
    experts: Positive = 32
    """Experts per layer."""
    vocab: Positive = 151_936
    """Vocabulary size."""
    length: Positive = 4096
    """Tokens per sequence."""
    sequences: Positive = 16
    """Sequences per step."""
    max_tokens: Positive = 16_384
    """Tokens per microbatch."""
    steps: Positive = 5
    """Measured steps; three unmeasured steps come before them."""
    device: Literal["cuda", "cpu"] = "cuda"
    """``cpu`` only tests the benchmark: it relates the times to the peak of an H100."""
    out: Path = Path("runs/gpu_step")
    """Folder that receives the figures and the profiles."""


@dataclass(frozen=True)
class Figures:
    """Measurement of one precision.

    Attributes:
        step: seconds of a training step.
        logprobs: seconds to compute the log probabilities of the same batch.
        export: seconds to export all weights.
        peak_memory: bytes on the GPU.
    """

    recipe: str
    step: float
    logprobs: float
    export: float
    peak_memory: int


def forward_flops(hf: Any, lengths: list[int], *, causal: bool = True) -> int:
    """Return the FLOPs of a Qwen3-MoE's forward pass over such sequences, with logits for every token."""
    heads, groups, width = hf.num_attention_heads, hf.num_key_value_heads, hf.head_dim
    attention = hf.hidden_size * width * (2 * heads + 2 * groups)
    experts = (
        3 * hf.hidden_size * hf.moe_intermediate_size * hf.num_experts_per_tok
        + hf.hidden_size * hf.num_experts
    )
    matrices = hf.num_hidden_layers * (attention + experts) + hf.hidden_size * hf.vocab_size
    products = 2 * heads * width * hf.num_hidden_layers * (1 if causal else 2)
    return 2 * matrices * sum(lengths) + products * sum(length**2 for length in lengths)


def write_model(folder: Path, options: GpuStep) -> Path:
    """Write a Hugging Face folder with random weights in bf16 and return it."""
    tokenizer = arithmetic_tokenizer()
    config = Qwen3MoeConfig(
        vocab_size=options.vocab,
        hidden_size=options.hidden,
        intermediate_size=3 * options.hidden,
        moe_intermediate_size=options.hidden * 3 // 8,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 64,
        num_key_value_heads=max(1, options.hidden // 512),
        head_dim=128,  # pyright: ignore[reportCallIssue]
        num_experts=options.experts,
        num_experts_per_tok=min(8, options.experts // 2),
        max_position_embeddings=max(options.length, 4096),
        tie_word_embeddings=False,
        dtype="bfloat16",
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    seed_everything(0)
    with torch.device(options.device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def random_batch(options: GpuStep) -> TrainBatch:
    draw = torch.Generator().manual_seed(0)
    lengths = torch.full((options.sequences,), options.length)
    tokens = torch.randint(options.vocab, (int(lengths.sum()),), generator=draw)
    mask = (torch.arange(len(tokens)) % options.length) >= min(PROMPT, options.length // 2)
    advantages = torch.randn(options.sequences, generator=draw)
    return TrainBatch(tokens, lengths, mask, advantages, torch.zeros(len(tokens)))


def measure(recipe: Recipe, model: Path, options: GpuStep) -> Figures:
    """Build the policy in this process, measure it, and write the profile of one step."""
    device = choose_device(options.device)
    fp8 = {} if recipe == "bf16" else {"fp8": {"recipe": recipe}}
    cfg = Config.model_validate(
        {
            "model": {"path": str(model), "dtype": "bf16"},
            "train": {"max_tokens_per_microbatch": options.max_tokens},
            "device": options.device,
            **fp8,
        }
    )
    start_process_group(device, 600)
    prepare_megatron(device)
    groups = start_model_parallel(cfg.parallel, cfg.seed, cfg.distributed_timeout_s)
    description = describe_model(cfg, 1, device)
    check_fp8(cfg, description.transformer, capabilities_of(device))
    policy = Policy(cfg, description, groups, device)
    batch = random_batch(options)
    objective = make_objective(cfg.algorithm, is_moe=True, max_new_tokens=options.length)

    def seconds(work: Callable[[], object], times: int = 1) -> float:
        _wait(device)
        start = time.perf_counter()
        for _ in range(times):
            work()
        _wait(device)
        return (time.perf_counter() - start) / times

    batch.old_logprobs = policy.logprobs(batch)
    logprobs = seconds(lambda: policy.logprobs(batch))
    for _ in range(WARM_UP_STEPS):
        policy.train_step(batch, objective)
    step = seconds(lambda: policy.train_step(batch, objective), options.steps)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    export = seconds(lambda: sum(tensor.nbytes for _, tensor in policy.export_hf()))
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=activities) as kernels:
        policy.train_step(batch, objective)
        _wait(device)
    order = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    (options.out / f"kernels_{recipe}.txt").write_text(
        kernels.key_averages().table(sort_by=order, row_limit=20)
    )
    return Figures(recipe, step, logprobs, export, peak)


def report(found: list[Figures], model: Path, options: GpuStep, console: Console) -> dict[str, Any]:
    """Print the floor and the table, and return their figures for JSON."""
    hf = AutoConfig.from_pretrained(model)
    lengths = [options.length] * options.sequences
    flops, tokens = 3 * forward_flops(hf, lengths), sum(lengths)
    parameters = _parameters(model)
    name = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    hardware = _hardware(name)
    computing, updating = flops / hardware.flops, OPTIMIZER_BYTES * parameters / hardware.bandwidth
    floor = computing + updating
    console.print(
        f"{name}, torch {torch.__version__}: {parameters / 1e9:.2f} B parameters, {tokens} tokens and "
        f"{flops / 1e12:.1f} TFLOP a step.\n"
        f"Floor: {computing:.4f} s for the FLOPs at {hardware.flops / 1e12:.0f} TFLOP/s, "
        f"{updating:.4f} s for the optimizer's bytes at {hardware.bandwidth / 1e12:.2f} TB/s."
    )
    table = Table(
        *(
            "precision",
            "step s",
            "over floor",
            "tokens/s",
            "TFLOP/s",
            "MFU",
            "speedup",
            "logprobs s",
            "export s",
            "peak GB",
        )
    )
    base = next((figures.step for figures in found if figures.recipe == "bf16"), None)
    rows = []
    for figures in found:
        row = {
            **asdict(figures),
            "over_floor": figures.step / floor,
            "tokens_per_second": tokens / figures.step,
            "tflops": flops / figures.step / 1e12,
            "mfu": flops / figures.step / hardware.flops,
            "speedup": base / figures.step if base else None,
        }
        rows.append(row)
        speedup = f"{row['speedup']:.2f}" if base else ""
        table.add_row(
            figures.recipe,
            f"{figures.step:.4f}",
            f"{row['over_floor']:.2f}",
            f"{row['tokens_per_second']:.0f}",
            f"{row['tflops']:.0f}",
            f"{row['mfu']:.3f}",
            speedup,
            f"{figures.logprobs:.4f}",
            f"{figures.export:.3f}",
            f"{figures.peak_memory / 1e9:.1f}",
        )
    console.print(table)
    return {
        "benchmark": "gpu_step",
        "device": name,
        "parameters": parameters,
        "flops": flops,
        "floor_s": floor,
        "precisions": rows,
    }


def in_a_process(function: Callable[..., Any], *arguments: object) -> Any:
    """Call ``function`` in a new process, which frees all GPU memory when it ends."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _hardware(name: str) -> Hardware:
    """Return the data sheet of a GPU; for a CPU or an unknown GPU, return that of an H100."""
    return next(
        (hardware for key, hardware in HARDWARE.items() if key.upper() in name.upper()), HARDWARE["h100"]
    )


def _parameters(model: Path) -> int:
    total = 0
    for file in model.glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            total += sum(
                torch.Size(weights.get_slice(name).get_shape()).numel()
                for name in weights.keys()  # noqa: SIM118
            )
    return total


def main(options: GpuStep) -> None:
    options.out.mkdir(parents=True, exist_ok=True)
    console = Console(width=140)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        model = in_a_process(write_model, Path(folder) / "model", options)
        for recipe in options.recipes:
            try:
                found.append(in_a_process(measure, recipe, model, options))
            except Exception as error:  # continue with the other precisions
                console.print(f"{recipe} was not measured: {error}", markup=False)
        result = report(found, model, options, console)
    (options.out / "gpu_step.json").write_text(json.dumps(result, indent=2))
    print(json.dumps({key: value for key, value in result.items() if key != "precisions"}))


if __name__ == "__main__":
    with one_line_errors():
        main(parse_options(GpuStep, sys.argv[1:], "python -m benchmarks.gpu_step"))
