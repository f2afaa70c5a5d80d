"""What a checkpoint has beside its weights: config.json, generation config, tokenizer and chat template, in a folder ``hf``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from ..errors import InputError
from .safetensors_folder import INDEX

_SUFFIXES = {
    ".json",
    ".txt",
    ".model",
    ".jinja",
    ".tiktoken",
    ".py",
}  # tokenizers may come with code of their own, not run here


def copy_companions(source: Path, target: Path, dtype: torch.dtype | None = None) -> None:
    """Copies them from one Hugging Face folder into another, which may be new.

    Args:
        dtype: of the weights in ``target``, which its config.json is to tell; None if it is that of ``source``. Weights that are FP8 in
            ``source`` are bf16 everywhere else.
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
    """The folder ``hf`` beside an ``iter_*`` folder.

    Raises:
        InputError: there is none.
    """
    beside = checkpoint.parent / "hf"
    if not (beside / "config.json").is_file():
        raise InputError(
            f"{str(checkpoint)!r} comes without a config.json: give --template, the Hugging Face folder of this model"
        )
    return beside
