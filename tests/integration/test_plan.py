"""tools/plan.py on the example configs of big models: sizes, memory, its own run time, and refusals."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_gmpo.planning.model_size import Model

from ..support.commands import CONFIG, ROOT, error_lines, options, run_module

pytestmark = pytest.mark.distributed

BIG = "examples/moe/qwen3_30b_a3b.toml"
# Billions of parameters on the model cards; the active ones have two digits there.
PUBLISHED = [
    ("moe/qwen3_30b_a3b", 32, 30.5, 3.3),
    ("moe/qwen3_235b_a22b", 64, 235, 22),
    ("moe/deepseek_r1_distill_qwen_7b", 8, 7.6, None),
    ("agents/alfworld_qwen2_5_1_5b", 8, 1.54, None),
    ("vision/qwen2_5_vl_7b_geometry3k", 8, 8.29, None),
    ("vision/qwen2_5_vl_7b_geometry3k", 8, 8.29, None),
]
SAVED_BYTES = 2 + 4 + 4 + 4
"""Of a parameter: the weight in bf16, and in fp32 the main weight and both moments."""


@pytest.mark.parametrize(("name", "world_size", "total", "active"), PUBLISHED)
def test_a_big_model_fits_and_has_the_published_size(
    name: str, world_size: int, total: float, active: float | None, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    with log.open("w") as out:
        command = [
            sys.executable,
            "-m",
            "tools.plan",
            f"examples/{name}.toml",
            "--world_size",
            str(world_size),
            "--checkpoint.async_save",
            "true",
        ]
        process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    text = log.read_text()
    assert os.waitstatus_to_exitcode(status) == 0, text
    assert usage.ru_maxrss < 4 * 2**20  # KiB
    found = re.search(r"([\d.]+) B parameters(?:, ([\d.]+) B of them active)?", text)
    assert found
    assert float(found[1]) == pytest.approx(total, rel=0.01)
    if active:
        assert float(found[2]) == pytest.approx(active, rel=0.02)
    saved = re.search(r"a save\D+([\d.]+) GB\W+in the host memory of each node", text)
    assert saved
    assert float(saved[1]) == pytest.approx(total * SAVED_BYTES / (world_size / 8), rel=0.01)
    for words in ("Memory of a rank", "Sent by a rank in a step", "tokens per second and GPU"):
        assert words in text


@pytest.mark.parametrize(
    ("config", "values", "line"),
    [
        (CONFIG, {}, r"required: --world_size; --help"),
        (CONFIG, {"world_size": 2, "train__num_step": 1}, r"unknown config key 'train\.num_step'"),
        (
            CONFIG,
            {"world_size": 3, "parallel__expert_model_parallel_size": 3},
            r"expert_model_parallel_size = 3 does not divide",
        ),
        (
            CONFIG,
            {"world_size": 1, "response_tokens": 10**6},
            r"response_tokens = 1000000 is above rollout\.max_new_tokens",
        ),
        (
            CONFIG,
            {"world_size": 1, "prompt_tokens": 8, "image_tokens": 9},
            r"image_tokens = 9 is above prompt_tokens = 8",
        ),
        (
            CONFIG,
            {"world_size": 1, "algorithm__clip": "adaptive", "train__minibatches_per_step": 1},
            r"adaptive",
        ),
        (
            BIG,
            {"world_size": 8},
            r"rank 0 \(pipeline stage 0\) needs [\d.]+ GiB of 79\.0: [\d.]+ too much; raise parallel\.",
        ),
        (
            BIG,
            {"world_size": 32, "train__max_tokens_per_microbatch": 65536},
            r"needs [\d.]+ GiB .* too much; .*max_tokens_per_microbatch",
        ),
        (
            BIG,
            {"world_size": 32, "sglang__args__mem_fraction_static": 0.72},
            r"colocated servers take 56\.9 GiB .*mem_fraction_static",
        ),
        (
            BIG,
            {"world_size": 32, "sglang__args__mem_fraction_static": 0.15},
            r"a server's 4 GPUs give it 47\.4 GiB, too little",
        ),
        (
            BIG,
            {"world_size": 32, "rollout__engine": "embedded", "rollout__placement": "disaggregated"},
            # 30.5 B parameters in bf16 are 56.9 GiB, and 64 sequences of 9,216 tokens of 96 KiB are 54 GiB
            r"rollout\.engine = 'embedded' needs 110\.9 GiB beside the 39\.5 GiB of rank 0: .*'sglang'",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(
    tiny_model: Callable[..., Path], config: str, values: dict[str, object], line: str
) -> None:
    model = options(model__path=tiny_model("qwen3_moe")) if config == CONFIG else []
    done = run_module("tools.plan", config, *model, *options(**values))
    assert done.returncode == 2, done.stdout + done.stderr
    (error,) = error_lines(done.stderr)
    assert re.search(line, error), error


def test_a_run_on_a_cpu_with_the_embedded_engine(tiny_model: Callable[..., Path]) -> None:
    model = tiny_model("qwen3_moe")
    done = run_module(
        "tools.plan",
        CONFIG,
        *options(model__path=model, world_size=4, parallel__pipeline_model_parallel_size=2),
    )
    assert done.returncode == 0, done.stderr
    assert f"{model} (qwen3_moe)" in done.stdout
    assert "4 ranks on CPUs: PP 2 DP 2" in done.stdout
    assert "send and receive" in done.stdout
    assert re.search(r"embedded engine +│ 4 ranks │ 256 responses at a time on each rank", done.stdout)
    for words in ("h100", "GPU", "of memory", "rollout servers", "Estimated time"):
        assert words not in done.stdout


def test_a_gpu_is_named_for_a_cpu_config(tiny_model: Callable[..., Path]) -> None:
    argv = options(model__path=tiny_model("qwen3_moe"), world_size=1, hardware="h200")
    done = run_module("tools.plan", CONFIG, *argv)
    assert done.returncode == 0, done.stderr
    assert "1 ranks on h200" in done.stdout
    assert "Estimated time" in done.stdout
    wrong = run_module(
        "tools.plan",
        CONFIG,
        *argv,
        *options(rollout__engine="sglang", sglang__args__mem_fraction_static="much"),
    )
    assert wrong.returncode == 2
    assert error_lines(wrong.stderr) == [
        "error: sglang.args.mem_fraction_static = 'much': Input should be a valid number, "
        "unable to parse string as a number"
    ]


def test_a_server_of_more_gpus_than_heads_repeats_the_heads() -> None:
    """A server with more GPUs than heads stores copies of heads.

    Qwen3-30B-A3B has keys and values of 4 heads of 128 in 48 layers, in bf16. DeepSeek-V3 has one latent of
    576 in 61 layers.
    """
    qwen = Model(
        0,
        0,
        0,
        kv_heads=4,
        kv_head_bytes=2 * 2 * 128 * 48,
        num_layers=48,
        vocab_size=151_936,
        num_experts=128,
        topk=8,
        served_weights=0,
    )
    assert [qwen.kv_bytes_on(gpus) for gpus in (1, 4, 8)] == [98_304, 98_304, 196_608]
    deepseek = Model(
        0,
        0,
        0,
        kv_heads=1,
        kv_head_bytes=2 * 576 * 61,
        num_layers=61,
        vocab_size=129_280,
        num_experts=256,
        topk=8,
        served_weights=0,
    )
    assert deepseek.kv_bytes_on(8) == 8 * 70_272
