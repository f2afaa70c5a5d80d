"""The mismatch command on saved rollouts: it finds known differences, and equal computations agree."""

from __future__ import annotations

import re
from collections.abc import Callable
from math import expm1
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_gmpo.batch.samples import Prompt, Sample, SampleGroup
from megatron_gmpo.commands.mismatch_sides import measure
from megatron_gmpo.config import Config
from megatron_gmpo.errors import InputError
from megatron_gmpo.rollout.replay import save_groups

from ..support import large_logits
from ..support.commands import error_lines, run_module
from ..support.sglang_servers import PYTHON, needs_sglang

OFFSET = 0.5
"""Amount that is added to the log probabilities of the saved rollouts."""


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("qwen3_moe", num_layers=2)


@pytest.fixture(scope="module")
def groups(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_groups(model, tmp_path_factory.mktemp("groups"))


def write_groups(model: Path, folder: Path) -> Path:
    """Write two prompts with two responses of different lengths each, and return their folder."""
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)

    def sample(prompt: list[int], length: int) -> Sample:
        tokens = prompt + torch.randint(2, 16, (length,), generator=generator).tolist()
        with torch.no_grad():
            logprobs = reference(torch.tensor([tokens])).logits[0, :-1].log_softmax(-1)
        found = logprobs.gather(1, torch.tensor(tokens[1:])[:, None])[len(prompt) - 1 :, 0]
        mask = [False] * len(prompt) + [True] * length
        return Sample(
            tokens=tokens,
            response_mask=mask,
            rollout_logprobs=[0.0] * len(prompt) + (found + OFFSET).tolist(),
            text="",
            finish_reason="length",
            policy_version=0,
        )

    prompts = [[5, 6, 7], [8, 9, 10, 11, 12]]
    made = [
        SampleGroup(Prompt(id=str(i), answer="", input_ids=ids), [sample(ids, 9), sample(ids, 14)])
        for i, ids in enumerate(prompts)
    ]
    save_groups(folder, 0, dict(enumerate(made)))
    return folder


def run(model: Path, groups: Path, out: Path, sides: str, *options: str) -> Any:
    about = ["--device", "cpu", "--model.path", model, "--model.dtype", "fp32", "--sglang.python", PYTHON]
    return run_module(
        "tools.mismatch",
        "--groups",
        groups,
        "--out",
        out,
        *about,
        *options,
        "--sides",
        *sides.split(),
        COLUMNS="120",
    )


def rows(stdout: str) -> dict[str, list[float]]:
    """Return side -> mean, median, 99 %, largest, k3."""
    cells = [
        [cell.strip() for cell in line.strip("│ ").split("│")]
        for line in stdout.splitlines()
        if line.startswith("│")
    ]
    return {name: [float(figure) for figure in figures] for name, *figures in cells}


def test_sides(model: Path, groups: Path, tmp_path: Path) -> None:
    out = tmp_path / "mismatch.png"
    done = run(model, groups, out, "fp32 bf16 fp8 policy recorded", "--layers", "3")
    assert done.returncode == 0, done.stderr
    assert "of 46 tokens, against fp32" in done.stdout
    found = rows(done.stdout)
    assert found["recorded"] == pytest.approx([OFFSET] * 4 + [expm1(OFFSET) - OFFSET], rel=1e-2)
    assert max(found["policy"]) < 1e-4
    assert 1e-4 < found["bf16"][0] < found["fp8"][0] < 0.1
    layers = dict(
        re.findall(r"^(\w+): hidden states after each layer differ by (.*)$", done.stdout, re.MULTILINE)
    )
    errors = {name: [float(error) for error in line.split(", ")] for name, line in layers.items()}
    assert {name: len(line) for name, line in errors.items()} == {"bf16": 2, "fp8": 2, "policy": 2}
    assert max(errors["policy"]) < 1e-5 < min(errors["bf16"]) < min(errors["fp8"]) < 0.1
    assert out.stat().st_size > 10_000


def test_policy_in_a_layout(model: Path, groups: Path, tmp_path: Path) -> None:
    layout = ["--parallel.tensor_model_parallel_size", "2", "--parallel.expert_model_parallel_size", "2"]
    about = ["--device", "cpu", "--model.path", model, "--model.dtype", "fp32", *layout]
    sides = ["--sides", "policy", "recorded"]
    done = run_module(
        "tools.mismatch", "--groups", groups, "--out", tmp_path / "m.png", *about, *sides, ranks=2
    )
    assert done.returncode == 0, done.stderr
    assert rows(done.stdout)["recorded"][0] == pytest.approx(OFFSET, rel=1e-2)


@needs_sglang
def test_a_server_of_its_own(model: Path, groups: Path, tmp_path: Path) -> None:
    done = run(model, groups, tmp_path / "m.png", "fp32 sglang", "--weight_sync.route", "tensor")
    assert done.returncode == 0, done.stderr
    assert max(rows(done.stdout)["sglang"]) < 1e-4


@pytest.mark.parametrize(
    ("sides", "temperature", "line"),
    [
        ("fp32 fp16", 1, "--sides fp16: choose from policy, recorded, fp32"),
        ("fp32", 1, "--sides fp32: name two or more, each once"),
        ("fp32 fp32", 1, "--sides fp32 fp32: name two or more, each once"),
        ("fp32 recorded", 0.5, r"--sides recorded: they were sampled at rollout\.temperature = 0\.5"),
    ],
)
def test_refusals(groups: Path, sides: str, temperature: float, line: str) -> None:
    cfg = Config.model_validate({"rollout": {"temperature": temperature}})
    with pytest.raises(InputError, match=line):
        measure(cfg, groups, sides.split())


def test_no_such_step(model: Path, groups: Path, tmp_path: Path) -> None:
    done = run(model, groups, tmp_path / "m.png", "fp32 bf16", "--step", "3")
    assert done.returncode == 2
    (said,) = error_lines(done.stderr)
    assert "has no groups for step 3, it has steps 0 to 0" in said


@needs_sglang
@pytest.mark.skipif(torch.cpu._is_amx_tile_supported(), reason="SGLang has no fp32 logits on a CPU with AMX")
def test_logits_in_fp32_agree_on_all_engines(tmp_path: Path) -> None:
    """Policy, embedded engine and SGLang in bf16, against transformers in fp32."""
    model = large_logits.make(tmp_path / "model")
    groups = write_groups(model, tmp_path / "groups")
    dtype = ["--model.dtype", "bf16"]
    done = run(model, groups, tmp_path / "a.png", "fp32 bf16 policy sglang", *dtype)
    assert done.returncode == 0, done.stderr
    kept = rows(done.stdout)
    done = run(model, groups, tmp_path / "b.png", "fp32 bf16 policy", *dtype, "--model.fp32_head", "false")
    assert done.returncode == 0, done.stderr
    rounded = rows(done.stdout)
    for name in ("bf16", "policy", "sglang"):
        assert kept[name][0] < min(rounded["bf16"][0], rounded["policy"][0]) / 2
