"""The GPU campaign and its bundle run from end to end on a CPU, and their figures count what they say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from importlib import metadata
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu import Report, markdown
from benchmarks.gpu_bundle import WHEELS, build, stand_in
from benchmarks.gpu_campaign import PARTS, Part, outcomes_of_tests, run
from benchmarks.gpu_logprobs import GpuLogprobs, Way, make
from megatron_gmpo.errors import InputError
from megatron_gmpo.policy.logprobs import TorchArithmetic
from tests.support.forks import ROOT

MACHINE = [
    "click",
    "filelock",
    "fsspec",
    "Jinja2",
    "MarkupSafe",
    "mpmath",
    "networkx",
    "numpy",
    "packaging",
    "PyYAML",
    "setuptools",
    "sympy",
    "torch",
    "tqdm",
]
"""Packages of a bare GPU machine: torch and transformers' dependencies."""

OF_TRANSFORMER_ENGINE = {"einops", "ml_dtypes", "onnx", "onnx_ir", "onnxscript"}
"""Wheels of the bundle that only Transformer Engine needs; the environment of the tests has none of them."""


def bare_python(folder: Path) -> Path:
    """Return the interpreter of an environment with the packages of a bare machine and of the bundle."""
    venv.EnvBuilder(with_pip=False, symlinks=True).create(folder)
    (site,) = folder.glob("lib/python*/site-packages")
    for name in {*MACHINE, *WHEELS} - OF_TRANSFORMER_ENGINE:
        package = metadata.distribution(name)
        for top in {file.parts[0] for file in package.files or []} - {"..", "__pycache__"}:
            if not (site / top).exists():  # "google" belongs to several packages
                (site / top).symlink_to(str(package.locate_file(top)))
    return folder / "bin/python"


def shell(
    script: str, *argv: object, python: Path | str = sys.executable
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [ROOT / "benchmarks" / script, *map(str, argv)],
        env={"PATH": os.environ["PATH"], "PYTHON": str(python), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the dry run is for machines without a GPU")
def test_the_campaign_runs_on_a_bare_machine(tmp_path: Path) -> None:
    done = shell("gpu_campaign.sh", tmp_path / "out", "--dry-run", python=bare_python(tmp_path / "bare"))
    log = tmp_path / "out/log.txt"
    assert done.returncode == 0, done.stdout + done.stderr + (log.read_text() if log.exists() else "")
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "campaign.json",
        "kernels.txt",
        "log.txt",
        "tables.md",
    }
    found = json.loads((tmp_path / "out/campaign.json").read_text())
    assert [row["outcome"] for row in found["parts"]] == ["done"] * len(PARTS)
    tables = {title: rows for part in found["figures"].values() for title, rows in part["tables"].items()}
    assert {"Ceilings", "Training step", "Log probabilities", "Weight sync between two processes"} < set(
        tables
    )
    assert {row["outcome"] for row in tables["tests"]} == {"SKIPPED"}
    assert len({row["tests"] for row in tables["tests"]}) == len(list((ROOT / "tests/gpu").glob("test_*.py")))
    assert all(row["off"] < 0.02 for row in tables["Log probabilities"])  # bf16 against float64
    assert tables["Weight sync between two processes"][0]["bytes equal"]
    for name in ("training step, FP8 blockwise", "Triton kernels", "weight sync by CUDA IPC"):
        assert f"- {name}: needs a GPU: not run" in done.stdout


@pytest.mark.slow
def test_the_bundle_is_built() -> None:
    done = shell("gpu_bundle.sh", "--dry-run")
    if "pip could not reach its index" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["MiB"] < 45  # leaves 15 MiB for Transformer Engine


def test_refusals_of_the_bundle(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no site\.txz: give a folder"):
        build(tmp_path, tmp_path / "out")
    with pytest.raises(InputError, match="exists: remove it"):
        build(stand_in(tmp_path), tmp_path)


def test_all_parts_take_less_than_nine_minutes() -> None:
    assert sum(part.seconds for part in PARTS) < 9 * 60


@pytest.mark.parametrize(
    ("command", "limit", "outcome"),
    [
        ("no_such_module", 60, "failed, exit code 1"),
        ("http.server 0 --bind 127.0.0.1", 1, "stopped after 1 s"),
        ("this", 60, "done"),
    ],
)
def test_outcomes_of_a_part(tmp_path: Path, command: str, limit: int, outcome: str) -> None:
    with (tmp_path / "log").open("w+") as log:
        row = run(Part("part", limit, command, None), tmp_path, log, dry_run=False)
    assert row["outcome"] == outcome
    assert command in (tmp_path / "log").read_text()


def test_outcomes_are_read_from_the_lines_of_pytest() -> None:
    lines = """
tests/gpu/test_fp8.py::test_a_recipe[qwen3-delayed] PASSED               [  5%]
tests/gpu/test_fp8.py::test_a_recipe[half of it on the host] FAILED      [ 10%]
tests/gpu/test_policy.py::test_a_step SKIPPED (needs an NVIDIA GPU)      [ 15%]
tests/gpu/test_policy.py::test_it_was_killed """
    assert outcomes_of_tests(lines) == [
        {"tests": "tests/gpu/test_fp8.py", "outcome": "PASSED", "count": 1},
        {"tests": "tests/gpu/test_fp8.py", "outcome": "FAILED", "count": 1},
        {"tests": "tests/gpu/test_policy.py", "outcome": "SKIPPED", "count": 1},
        {"tests": "tests/gpu/test_fp8.py::test_a_recipe[half of it on the host]", "outcome": "FAILED"},
    ]


@pytest.mark.parametrize("logits", [True, False])
def test_flops_of_log_probabilities_are_those_that_torch_counts(logits: bool) -> None:
    options = GpuLogprobs(tokens=40, hidden=32, vocab=100, device="cpu")
    way, inputs = Way(logits, TorchArithmetic, 8), make(40, options, torch.device("cpu"))
    with FlopCounterMode(display=False) as counted:
        way.run(inputs)
    assert counted.get_total_flops() == way.flops(options)


def test_an_error_does_not_stop_the_other_measurements(tmp_path: Path) -> None:
    report = Report("example", tmp_path)
    with report.attempt("first"):
        raise ValueError("too large")
    with report.attempt("second"):
        report.add("Table", {"seconds": 1.5, "what": "a|b"})
        report.add("Table", {"bytes": 3})
    written = json.loads((tmp_path / "example.json").read_text())
    assert written["not_run"] == {"first": "was not measured: ValueError: too large"}
    assert markdown(written["tables"]["Table"]).splitlines() == [
        "| seconds | what | bytes |",
        "| --- | --- | --- |",
        "| 1.5 | a\\|b |  |",
        "|  |  | 3 |",
    ]
