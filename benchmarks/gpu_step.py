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

Other tables list the kernels that take most of the time; FOLDER/kernels_RECIPE.txt has torch.profiler's own
table. FOLDER/gpu_step.json has all figures.
"""

from __future__ import annotations

import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3MoeConfig

from benchmarks.gpu import Report, Row, device_name, hardware_of, markdown, wait
from megatron_gmpo.batch.columns import TrainBatch
from megatron_gmpo.command_line import Options, one_line_errors, parse_options
from megatron_gmpo.config import Config, Positive
from megatron_gmpo.losses.objective import make_objective
from megatron_gmpo.models.description import describe_model
from megatron_gmpo.platform import choose_device, prepare_megatron, seed_everything, start_process_group
from megatron_gmpo.platform.capabilities import capabilities_of
from megatron_gmpo.policy.build import check_optimizer
from megatron_gmpo.policy.fp8 import check_fp8
from megatron_gmpo.policy.parallel import start_model_parallel
from megatron_gmpo.policy.policy import Policy
from megatron_gmpo.testing.tiny_tokenizers import arithmetic_tokenizer

Recipe = Literal["bf16", "delayed", "tensorwise", "blockwise", "mxfp8"]
OPTIMIZER_BYTES = 30
WARM_UP_STEPS = 3
PROMPT = 128
TOP_KERNELS = 15


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


def open_policy(sections: dict[str, Any], model: Path, options: GpuStep) -> Policy:
    """Build the policy of a config in this process, whose only rank it is."""
    device = choose_device(options.device)
    train = {"max_tokens_per_microbatch": options.max_tokens}
    cfg = Config.model_validate(
        {
            "model": {"path": str(model), "dtype": "bf16"},
            "train": train,
            "device": options.device,
            **sections,
        }
    )
    start_process_group(device, 600)
    prepare_megatron(device)
    groups = start_model_parallel(cfg.parallel, cfg.seed, cfg.distributed_timeout_s)
    description = describe_model(cfg, 1, device)
    check_fp8(cfg, description.transformer, capabilities_of(device))
    check_optimizer(cfg.optimizer, capabilities_of(device))
    return Policy(cfg, description, groups, device)


def measure(recipe: Recipe, model: Path, options: GpuStep) -> tuple[Row, list[Row]]:
    """Measure one precision, write the profile of one step, and return the figures and the top kernels.

    The figures are seconds of a training step, of the batch's log probabilities and of an export, exported
    bytes, and the peak of the GPU's memory in bytes.
    """
    policy = open_policy({} if recipe == "bf16" else {"fp8": {"recipe": recipe}}, model, options)
    device, whole = policy.device, random_batch(options)
    batch = policy.share(whole)
    objective = make_objective(policy.cfg.algorithm, is_moe=True, max_new_tokens=options.length)

    def seconds(work: Callable[[], object], times: int = 1) -> float:
        wait(device)
        start = time.perf_counter()
        for _ in range(times):
            work()
        wait(device)
        return (time.perf_counter() - start) / times

    policy.set_old_logprobs(batch)
    found: Row = {"logprobs": seconds(lambda: policy.logprobs(whole))}
    for _ in range(WARM_UP_STEPS):
        policy.train_step(batch, objective)
    found["step"] = seconds(lambda: policy.train_step(batch, objective), options.steps)
    found["peak"] = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    exported = []
    found["export"] = seconds(lambda: exported.extend(tensor.nbytes for _, tensor in policy.export_hf()))
    found["exported"] = sum(exported)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=activities) as profiled:
        policy.train_step(batch, objective)
        wait(device)
    events = profiled.key_averages()
    order = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    (options.out / f"kernels_{recipe}.txt").write_text(events.table(sort_by=order, row_limit=40))
    return found, top_kernels(events, device)


def top_kernels(events: Any, device: torch.device) -> list[Row]:
    """Return the kernels (on a CPU: the operators) that take most of the profiled time."""
    on_gpu = device.type == "cuda"
    taken = [
        (event.self_device_time_total if on_gpu else event.self_cpu_time_total, event)
        for event in events
        if not on_gpu or event.device_type == DeviceType.CUDA
    ]
    total = sum(microseconds for microseconds, _ in taken) or 1
    taken.sort(key=lambda pair: -pair[0])
    return [
        {
            "kernel": event.key[:80],
            "calls": event.count,
            "ms": microseconds / 1e3,
            "share": microseconds / total,
        }
        for microseconds, event in taken[:TOP_KERNELS]
    ]


def row_of(recipe: Recipe, found: Row, base: float | None, flops: int, floor: float, options: GpuStep) -> Row:
    """Return the table's row; ``base`` is the time of a bf16 step of the same run."""
    step, hardware = found["step"], hardware_of(options.device)
    return {
        "precision": recipe,
        "step s": step,
        "over floor": step / floor,
        "tokens/s": options.length * options.sequences / step,
        "TFLOP/s": flops / step / 1e12,
        "MFU": flops / step / hardware.flops,
        "speedup": base / step if base else None,
        "log probabilities s": found["logprobs"],
        "export s": found["export"],
        "export GB/s": found["exported"] / found["export"] / 1e9,
        "peak GB": found["peak"] / 1e9,
    }


def floor_of(model: Path, options: GpuStep, report: Report) -> tuple[int, float]:
    """Return the FLOPs of a step and its lower bound in seconds, and add them to the report."""
    hf, hardware = AutoConfig.from_pretrained(model), hardware_of(options.device)
    flops = 3 * forward_flops(hf, [options.length] * options.sequences)
    parameters = _parameters(model)
    computing, updating = flops / hardware.flops, OPTIMIZER_BYTES * parameters / hardware.bandwidth
    report.figures |= {
        "device": device_name(options.device),
        "parameters": parameters,
        "flops": flops,
        "floor_s": computing + updating,
    }
    print(
        f"{device_name(options.device)}, torch {torch.__version__}: {parameters / 1e9:.2f} B parameters, "
        f"{options.length * options.sequences} tokens and {flops / 1e12:.1f} TFLOP a step.\n"
        f"Floor: {computing:.4f} s for the FLOPs at {hardware.flops / 1e12:.0f} TFLOP/s, "
        f"{updating:.4f} s for the optimizer's bytes at {hardware.bandwidth / 1e12:.2f} TB/s."
    )
    return flops, computing + updating


def in_a_process(device: Literal["cuda", "cpu"], function: Callable[..., Any], *arguments: object) -> Any:
    """Call ``function`` in a new process, which frees all GPU memory when it ends."""
    method = "spawn" if device == "cuda" else "fork"  # a fork starts faster, but cannot use CUDA
    with ProcessPoolExecutor(1, multiprocessing.get_context(method)) as process:
        return process.submit(function, *arguments).result()


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
    report, base = Report("gpu_step", options.out), None
    with tempfile.TemporaryDirectory() as folder:
        model = in_a_process(options.device, write_model, Path(folder) / "model", options)
        flops, floor = floor_of(model, options, report)
        for recipe in options.recipes:
            if recipe != "bf16" and options.device == "cpu":
                report.skip(f"training step, FP8 {recipe}")
                continue
            with report.attempt(f"training step, {recipe}"):
                found, kernels = in_a_process(options.device, measure, recipe, model, options)
                base = found["step"] if recipe == "bf16" else base
                report.add("Training step", row_of(recipe, found, base, flops, floor, options))
                for kernel in kernels:
                    report.add(f"Kernels of a training step, {recipe}", kernel)
    for rows in report.figures["tables"].values():
        print(markdown(rows))


if __name__ == "__main__":
    with one_line_errors():
        main(parse_options(GpuStep, sys.argv[1:], "python -m benchmarks.gpu_step"))
