"""Quantises a Hugging Face model for SGLang: python -m tools.export_quantized --hf DIR --out DIR --format fp8 --calibration FILE.jsonl

With NVIDIA's ModelOpt, in its own environment (``make modelopt``): FP8 with one scale for a tensor, or NVFP4 with one for 16 values, and
static scales of the activations, from prompts. SGLang takes the folder as ``modelopt_fp8`` or ``modelopt_fp4`` without being told. What
quantises the policy's weights in every step is ``rollout.quantization``.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import tyro
from safetensors import safe_open

from megatron_gmpo.config import DataConfig, exit_with_one_line
from megatron_gmpo.data.prompts import load_prompts, load_tokenizer
from megatron_gmpo.errors import InputError, RunError
from megatron_gmpo.models.decoder import prediction_layers
from megatron_gmpo.models.description import read_hf_config
from megatron_gmpo.models.fp8_blocks import is_quantized
from megatron_gmpo.weights.companions import copy_companions
from megatron_gmpo.weights.safetensors_folder import SafetensorsFolder

Format = Literal["fp8", "nvfp4"]

PYTHON = Path(".venv-modelopt/bin/python")
_SCRIPT = Path(__file__).with_name("quantize_with_modelopt.py")
_CODES = {
    "fp8": "F8_E4M3",
    "nvfp4": "U8",
}  # safetensors' dtypes of the weights; a byte of NVFP4 holds two values
_GROUP = 16  # columns of an NVFP4 scale


def export_quantized(
    hf: Path, out: Path, format: Format, prompts: Sequence[Sequence[int]], python: Path = PYTHON
) -> str:
    """Writes the folder ``out``, with the tokenizer and what else ``hf`` has beside its weights.

    The linear weights of attention and MLPs, experts included, are quantised. Routers, embeddings, the output layer and norms are bf16.

    Args:
        prompts: tokens to calibrate the activations' scales on.
        python: interpreter of ModelOpt's environment.

    Returns:
        A line that says what was written.

    Raises:
        InputError: no ModelOpt, no such model or one that is quantised already, widths that NVFP4 cannot group, ``out`` exists.
        RunError: ModelOpt failed, or quantised other tensors.
    """
    if not python.is_file():
        raise InputError(f"--python {str(python)!r} is not there: run make modelopt")
    if out.exists():
        raise InputError(f"--out {str(out)!r} exists: name another folder, or remove it")
    config = read_hf_config(str(hf), "--hf")
    if getattr(config, "quantization_config", None):
        raise InputError(f"--hf {str(hf)!r} is quantised already: give the model in bf16")
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
        copy_companions(hf, partial)  # of which ModelOpt replaces config.json
        task = {"hf": str(hf), "out": str(partial), "format": format, "prompts": prompts}
        done = subprocess.run(
            [python, "-I", _SCRIPT], input=json.dumps(task), text=True, stdout=subprocess.DEVNULL
        )
        if done.returncode:
            raise RunError(
                f"ModelOpt failed with exit code {done.returncode} on {str(hf)!r}; what it said stands above"
            )
        quantised = {
            name
            for name, code in _dtypes(partial).items()
            if code == _CODES[format] and name.endswith(".weight")
        }
        if wrong := sorted(quantised ^ linear):
            what = "quantised" if wrong[0] in quantised else "did not quantise"
            raise RunError(
                f"ModelOpt {what} {wrong[0]!r} and {len(wrong) - 1} more, against expectation: this folder cannot be served"
            )
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return f"{out}: {len(linear)} of {len(source.names)} tensors in {format}, {_nbytes(out):,} bytes instead of {_nbytes(hf):,}"


def _dtypes(folder: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    return found


def _nbytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def main(
    hf: Path,
    out: Path,
    format: Format,
    calibration: str,
    num_prompts: int = 512,
    max_prompt_tokens: int = 2048,
    prompt_column: str = "problem",
    answer_column: str = "answer",
    python: Path = PYTHON,
) -> None:
    """Quantise a Hugging Face model for SGLang with NVIDIA's ModelOpt.

    Args:
        hf: Hugging Face folder in bf16 or fp32.
        out: Folder to write.
        format: fp8 has one scale for a tensor and needs a GPU since Ada or Hopper; nvfp4 one for 16 values, since Blackwell.
        calibration: Training data, whatever data.path takes, whose prompts the scales of the activations are taken from.
        num_prompts: How many of them, from the first.
        max_prompt_tokens: Longer ones are left out.
        prompt_column: Column with the prompt.
        answer_column: Column with the answer, which is not used.
        python: Interpreter of ModelOpt's environment.
    """
    try:
        for option, number in (("--num_prompts", num_prompts), ("--max_prompt_tokens", max_prompt_tokens)):
            if number < 1:
                raise InputError(f"{option} {number}: give a positive number")
        data = DataConfig(
            path=calibration,
            max_prompts=num_prompts,
            max_prompt_tokens=max_prompt_tokens,
            prompt_column=prompt_column,
            answer_column=answer_column,
        )
        read_hf_config(str(hf), "--hf")
        prompts = load_prompts(data, load_tokenizer(str(hf), "--hf"), "calibration")
        print(export_quantized(hf, out, format, [prompt.input_ids for prompt in prompts], python))
    except RunError as error:
        exit_with_one_line(error, error.exit)


if __name__ == "__main__":
    tyro.cli(main)
