"""The folder ``hf`` beside a checkpoint: config.json, generation config, tokenizer and chat template."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from ..errors import InputError
from .safetensors_folder import INDEX

# .py files are code of some tokenizers, which is not run here
_SUFFIXES = {".json", ".txt", ".model", ".jinja", ".tiktoken", ".py"}


def copy_companions(source: Path, target: Path, dtype: torch.dtype | None = None) -> None:
    """Copy everything except weights from one Hugging Face folder to another, which is created if missing.

    Args:
        dtype: dtype of the weights in ``target``, for its config.json. None keeps the dtype of ``source``, or
            bf16 if the weights of ``source`` are FP8.
    """
    target.mkdir(exist_ok=True)
    for file in source.iterdir():
        if file.is_file() and file.suffix in _SUFFIXES and file.name != INDEX:
            shutil.copyfile(file, target / file.name)
    config = json.loads((source / "config.json").read_text())
    if config.pop("quantization_config", None):
        dtype = dtype or torch.bfloat16
    if dtype:
        config.pop("torch_dtype", None)
        config["dtype"] = str(dtype).removeprefix("torch.")
        (target / "config.json").write_text(json.dumps(config, indent=2))


def companion_folder(checkpoint: Path) -> Path:
    """Return the folder ``hf`` beside an ``iter_*`` folder.

    Raises:
        InputError: it does not exist or has no config.json.
    """
    beside = checkpoint.parent / "hf"
    if not (beside / "config.json").is_file():
        raise InputError(
            f"{str(checkpoint)!r} comes without a config.json: "
            "give --template, the Hugging Face folder of this model"
        )
    return beside
