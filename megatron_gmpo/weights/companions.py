"""The folder ``hf`` beside a checkpoint: config.json, generation config, tokenizer and chat template."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from ..errors import InputError
from ..models.folder import read_json

_COMPANIONS = {
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
}
"""Every file that transformers or SGLang read beside the weights of a supported family.

transformers reads further chat templates from the folder ``additional_chat_templates``."""
_TEMPLATES = "additional_chat_templates"


def copy_companions(source: Path, target: Path, dtype: torch.dtype | None = None) -> None:
    """Copy config, generation config, tokenizer and chat template to another folder, created if missing.

    Args:
        dtype: dtype of the weights in ``target``, for its config.json. None keeps the dtype of ``source``, or
            bf16 if the weights of ``source`` are FP8.
    """
    target.mkdir(exist_ok=True)
    for name in sorted(_COMPANIONS):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    for template in source.glob(f"{_TEMPLATES}/*.jinja"):
        (target / _TEMPLATES).mkdir(exist_ok=True)
        shutil.copyfile(template, target / _TEMPLATES / template.name)
    config = read_json(source / "config.json")
    if config.pop("quantization_config", None):
        dtype = dtype or torch.bfloat16
    if dtype:
        # a vision-language model's config.json has one for each part
        for part in (config, *(config[name] for name in ("text_config", "vision_config") if name in config)):
            part.pop("torch_dtype", None)
            part["dtype"] = str(dtype).removeprefix("torch.")
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
