"""Quantize a Hugging Face model for SGLang with NVIDIA's ModelOpt.

    megatron-gmpo export_quantized --hf DIR --out DIR --format fp8 --calibration FILE.jsonl

ModelOpt runs in its own environment (``make modelopt``). It writes FP8 with one scale per tensor or NVFP4
with one scale per 16 values, and static activation scales measured on prompts. SGLang detects the folder as
``modelopt_fp8`` or ``modelopt_fp4``. To quantize the policy's weights at every step of a run, set
``rollout.quantization`` instead.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from ..command_line import Options, parse_options
from ..config import DataConfig, Positive
from ..errors import InputError, RunError

Format = Literal["fp8", "nvfp4"]

PYTHON = Path(".venv-modelopt/bin/python")
_SCRIPT = Path(__file__).with_name("quantize_with_modelopt.py")
_CODES = {"fp8": "F8_E4M3", "nvfp4": "U8"}
"""Format -> safetensors dtype of quantized weights. One byte of NVFP4 holds two values."""
_GROUP = 16
"""Number of columns that share one NVFP4 scale."""


class ExportQuantized(Options):
    """Quantize a Hugging Face model for SGLang with NVIDIA's ModelOpt."""

    hf: Path
    """Hugging Face folder in bf16 or fp32, or a name on the hub."""
    out: Path
    """Folder to write."""
    format: Format
    """Format of the weights. ``fp8`` has one scale per tensor and runs on Ada and Hopper GPUs or newer;
    ``nvfp4`` has one scale per 16 values and runs on Blackwell GPUs or newer."""
    calibration: str
    """Data set in any form that data.path accepts. The activation scales are measured on its prompts."""
    num_prompts: Positive = 512
    """Number of prompts to use, from the first."""
    max_prompt_tokens: Positive = 2048
    """Maximum tokens in a prompt; longer prompts are dropped."""
    prompt_column: str = "problem"
    """Column with the prompt."""
    answer_column: str = "answer"
    """Column with the answer; it must exist but is not used."""
    python: Path = PYTHON
    """Interpreter of ModelOpt's environment."""


def main(argv: list[str]) -> None:
    options = parse_options(ExportQuantized, argv, "megatron-gmpo export_quantized")

    from ..data.prompts import load_prompts, load_tokenizer
    from ..models.description import read_hf_config
    from ..models.snapshot import local_folders

    data = DataConfig(
        path=options.calibration,
        max_prompts=options.num_prompts,
        max_prompt_tokens=options.max_prompt_tokens,
        prompt_column=options.prompt_column,
        answer_column=options.answer_column,
    )
    hf = local_folders({"--hf": str(options.hf)})["--hf"]
    read_hf_config(hf, "--hf")
    prompts = load_prompts(data, load_tokenizer(hf, "--hf"), "calibration")
    tokens = [prompt.input_ids for prompt in prompts]
    print(export_quantized(Path(hf), options.out, options.format, tokens, options.python))


def export_quantized(
    hf: Path, out: Path, format: Format, prompts: Sequence[Sequence[int]], python: Path = PYTHON
) -> str:
    """Write the folder ``out`` with quantized weights, and copy the tokenizer and other files of ``hf``.

    The linear weights of attention and MLPs, experts included, are quantized. Routers, embeddings, the output
    layer and norms stay in bf16.

    Args:
        prompts: token ids on which the activation scales are measured.
        python: interpreter of ModelOpt's environment.

    Returns:
        One line that describes the folder.

    Raises:
        InputError: ModelOpt is not installed; the model does not exist, is already quantized or has a vision
            tower; a width is not a multiple of NVFP4's group; ``out`` exists.
        RunError: ModelOpt failed, or quantized other tensors than expected.
    """
    from ..models.decoder import prediction_layers
    from ..models.description import read_hf_config
    from ..models.fp8_blocks import is_quantized
    from ..weights.companions import copy_companions
    from ..weights.safetensors_folder import SafetensorsFolder

    if not python.is_file():
        raise InputError(f"--python {str(python)!r} is not there: run make modelopt")
    if out.exists():
        raise InputError(f"--out {str(out)!r} exists: name another folder, or remove it")
    config = read_hf_config(str(hf), "--hf")
    if getattr(config, "quantization_config", None):
        raise InputError(f"--hf {str(hf)!r} is quantized already: give the model in bf16")
    if hasattr(config, "vision_config"):
        raise InputError(
            f"--hf {str(hf)!r} is a vision-language model, and the activation scales are measured on text: "
            "serve it in bf16"
        )
    source = SafetensorsFolder(hf, left_out=prediction_layers(config))
    linear = {name for name in source.names if is_quantized(name)}
    odd = sorted(name for name in linear if source.shape(name)[1] % _GROUP)
    if format == "nvfp4" and odd:
        raise InputError(
            f"--format nvfp4 groups {_GROUP} columns, but {odd[0]!r} is {source.shape(odd[0])}: choose fp8"
        )
    partial = out.with_name(f".partial_{out.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        copy_companions(hf, partial)  # ModelOpt replaces config.json
        task = {"hf": str(hf), "out": str(partial), "format": format, "prompts": prompts}
        _run_modelopt(task, python)
        _check_quantized(partial, linear, format)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    counts = f"{len(linear)} of {len(source.names)} tensors in {format}"
    return f"{out}: {counts}, {_nbytes(out):,} bytes instead of {_nbytes(hf):,}"


def _run_modelopt(task: dict[str, object], python: Path) -> None:
    command = [python, "-I", _SCRIPT]
    done = subprocess.run(command, input=json.dumps(task), text=True, stdout=subprocess.DEVNULL)
    if done.returncode:
        raise RunError(
            f"ModelOpt failed with exit code {done.returncode} on {task['hf']!r}: its output is above"
        )


def _check_quantized(folder: Path, linear: set[str], format: Format) -> None:
    """Check that exactly the weights ``linear`` were quantized."""
    weights = {name: code for name, code in _dtypes(folder).items() if name.endswith(".weight")}
    quantized = {name for name, code in weights.items() if code == _CODES[format]}
    if wrong := sorted(quantized ^ linear):
        verb = "quantized" if wrong[0] in quantized else "did not quantize"
        raise RunError(
            f"ModelOpt unexpectedly {verb} {wrong[0]!r} and {len(wrong) - 1} more: this folder cannot be "
            f"served"
        )


def _dtypes(folder: Path) -> dict[str, str]:
    from safetensors import safe_open

    found: dict[str, str] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    return found


def _nbytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
