"""Describe a checkpoint folder of either format."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError
from .companions import companion_folder
from .hf_to_megatron import HFToMegatron
from .megatron_to_hf import MegatronToHF
from .run_checkpoint import full_damage, read_state
from .safetensors_folder import SafetensorsFolder
from .table import ConversionTable
from .torch_dist import LATEST, TorchDistReader, checkpoint_folder


def inspect_checkpoint(path: Path) -> dict[str, str]:
    """Return the description of a folder: label -> text. ``whole`` is ``yes`` or names the defect.

    The checksums of a training run's checkpoint are compared; no tensor is loaded.

    Raises:
        InputError: the folder contains neither a Hugging Face model with safetensors nor a torch_dist
            checkpoint.
    """
    if (path / LATEST).is_file() or (path / ".metadata").is_file():
        return _inspect_megatron(checkpoint_folder(path))
    table, source = ConversionTable(path), SafetensorsFolder(path)
    return {
        "kind": "Hugging Face",
        "family": table.whole.model_type,
        "parameters": _parameters(table),
        "dtypes": _dtypes(Counter(source.dtype(name) for name in source.names)),
        "layout": f"{len(source.files)} safetensors files",
        "whole": _whole(lambda: HFToMegatron(path)),
    }


def _inspect_megatron(folder: Path) -> dict[str, str]:
    about = {"kind": "Megatron torch_dist"}
    unknown = "unknown: no config.json comes with it"
    try:
        table = ConversionTable(companion_folder(folder))
        about |= {"family": table.whole.model_type, "parameters": _parameters(table)}
    except InputError:
        about["family"] = unknown
    numbered = re.fullmatch(r"iter_(\d+)", folder.name)
    about["step"] = str(int(numbered[1])) if numbered else folder.name
    try:
        source = TorchDistReader(folder)
    except InputError as error:
        return about | {"whole": f"no: {error}"}
    weights = source.weights
    about |= {
        "dtypes": _dtypes(Counter(tensor.properties.dtype for tensor in weights.values())),
        "layout": f"{len(source.files)} files, {len(weights)} tensors, "
        f"{'layers stacked' if source.layers_are_stacked else 'layers separate'}",
        "optimizer": "yes" if len(weights) < len(source.tensors) else "no",
    }
    if (folder / "state.json").exists():
        if damage := full_damage(folder):
            return about | {"whole": f"no: {damage}"}
        recorded = read_state(folder).files
        about["checksums"] = f"{len(recorded)} files agree" if recorded else "not recorded"
    complete = unknown if about["family"] == unknown else _whole(lambda: MegatronToHF(folder, None, None))
    return about | {"whole": complete}


def _whole(opened: Callable[[], Any]) -> str:
    try:
        opened()
    except InputError as error:
        return f"no: {error}"
    return "yes"


def _parameters(table: ConversionTable) -> str:
    return f"{table.numel:,} in all" + (f", {table.active_numel:,} active" if table.num_experts else "")


def _dtypes(counts: Counter[torch.dtype]) -> str:
    return ", ".join(
        f"{str(dtype).removeprefix('torch.')} ({count} tensors)" for dtype, count in counts.most_common()
    )
