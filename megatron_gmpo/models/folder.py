"""Checks of a Hugging Face folder that run before transformers reads it.

A folder from elsewhere may hold links to other files, name code to run, or have a config.json that describes
a model of absurd size.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from huggingface_hub.constants import HF_HUB_CACHE

from ..errors import InputError, one_line

_MAX_JSON_BYTES = 100_000_000
MAX_EXPERTS = 10**4
_MAX_WIDTH, _MAX_LAYERS = 10**7, 10**3
_BOUNDS: dict[str, tuple[int, int]] = {
    "num_hidden_layers": (1, _MAX_LAYERS),
    "num_nextn_predict_layers": (0, _MAX_LAYERS),
    "num_mtp_layers": (0, _MAX_LAYERS),
    "first_k_dense_replace": (0, _MAX_LAYERS),
    "decoder_sparse_step": (1, _MAX_LAYERS),
    # 0 in the config.json of some dense models
    "num_experts": (0, MAX_EXPERTS),
    "num_local_experts": (0, MAX_EXPERTS),
    "n_routed_experts": (0, MAX_EXPERTS),
    "num_experts_per_tok": (0, MAX_EXPERTS),
    "n_group": (0, MAX_EXPERTS),
    "topk_group": (0, MAX_EXPERTS),
    "n_shared_experts": (0, MAX_EXPERTS),
    "depth": (1, _MAX_LAYERS),
    "patch_size": (1, 1000),
    "temporal_patch_size": (1, 1000),
    "spatial_merge_size": (1, 1000),
    **dict.fromkeys(
        (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "moe_intermediate_size",
            "shared_expert_intermediate_size",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "q_lora_rank",
            "kv_lora_rank",
            "qk_nope_head_dim",
            "qk_rope_head_dim",
            "v_head_dim",
            # of vision towers
            "num_heads",
            "out_hidden_size",
            "num_position_embeddings",
            "in_channels",
            "window_size",
        ),
        (1, _MAX_WIDTH),
    ),
}
"""Field of config.json -> smallest and largest value. Every published model is far below the largest."""
_PARTS = ("text_config", "vision_config")
_IMPLEMENTATIONS = {
    "attn_implementation": {
        None,
        "eager",
        "sdpa",
        "flex_attention",
        "flash_attention_2",
        "flash_attention_3",
    },
    "experts_implementation": {None, "eager", "batched_mm", "grouped_mm"},
}
"""Field of config.json -> values that do not make transformers fetch a kernel."""


def check_folder(folder: Path, name: str, code: dict[str, frozenset[str]]) -> None:
    """Check what transformers would read from the folder without being asked to.

    Args:
        folder: folder with a config.json.
        name: setting and value of the path, for error messages.
        code: ``model_type`` -> modules named by config.json that are ignored, see ``Family.code``.

    Raises:
        InputError: a file is a link to a file outside the folder and outside the hub's cache; a JSON file
            names code, a kernel, other weights or an adapter; config.json describes too large a model.
    """
    _check_links(folder, name)
    config = read_json(folder / "config.json", name)
    _check_code(folder, name, config, code.get(str(config.get("model_type")), frozenset()))
    parts = [config, *(config[part] for part in _PARTS if config.get(part) is not None)]
    for part in parts:
        _check_part(part, name)
    if config.get("transformers_weights") is not None:
        raise InputError(
            f"{name}: config.json has transformers_weights = {config['transformers_weights']!r}: "
            "rename that file to model.safetensors and remove the field"
        )
    if (folder / "adapter_config.json").exists():
        raise InputError(
            f"{name} holds both a model and an adapter (adapter_config.json): merge the adapter, or remove it"
        )


def read_json(path: Path, name: str = "") -> dict[str, Any]:
    """Return the JSON object in a file.

    Args:
        name: setting and value that lead to the file, for error messages.

    Raises:
        InputError: the file cannot be read, is larger than 100 MB, or contains no JSON object.
    """
    try:
        if (size := path.stat().st_size) > _MAX_JSON_BYTES:
            raise ValueError(f"it has {size} bytes")
        found = json.loads(path.read_bytes())
        if not isinstance(found, dict):
            raise ValueError(f"it holds a {type(found).__name__} instead of an object")
    except (OSError, ValueError, RecursionError) as error:
        where = f"{name}: {path.name}" if name else repr(str(path))
        raise InputError(f"{where} cannot be read ({one_line(error)}): download the model again") from None
    return found


def _check_part(config: Any, name: str) -> None:
    """Check a part of config.json, or the whole, for kernels and absurd sizes."""
    if not isinstance(config, dict):
        raise InputError(f"{name}: config.json has a {type(config).__name__} as a part: correct it")
    for field, allowed in _IMPLEMENTATIONS.items():
        for key in (field, f"_{field}"):
            value = config.get(key)
            if not isinstance(value, str | None) or value not in allowed:
                raise InputError(f"{name}: config.json names the kernel {key} = {value!r}: remove the field")
    for field, (smallest, largest) in _BOUNDS.items():
        value = config.get(field)
        if value is not None and not (isinstance(value, int) and smallest <= value <= largest):
            raise InputError(
                f"{name}: config.json has {field} = {value!r}, which is no number from {smallest} to "
                f"{largest}: correct it"
            )


def _check_links(folder: Path, name: str) -> None:
    """Check that every link points into the folder or into the blobs of the hub's cache.

    In that cache a folder is ``models--NAME/snapshots/REVISION``, with links to ``models--NAME/blobs``
    (huggingface_hub/file_download.py).
    """
    real = folder.resolve()
    blobs = [at.parents[1] / "blobs" for at in (real, *real.parents) if at.parent.name == "snapshots"]
    places = [real, *(place.resolve() for place in blobs)]
    cache = Path(HF_HUB_CACHE).resolve()
    for file in (*folder.iterdir(), *folder.glob("additional_chat_templates/*")):
        target = Path(os.path.realpath(file))
        in_cache = target.is_relative_to(cache) and target.parent.name == "blobs"
        if not in_cache and not any(target.is_relative_to(place) for place in places):
            raise InputError(
                f"{name}: {file.name!r} is a link to {str(target)!r}, outside the folder: "
                "replace it by a copy of that file, if you trust it"
            )


def _check_code(folder: Path, name: str, config: dict[str, Any], ignored: frozenset[str]) -> None:
    of_processor = ("preprocessor_config.json", "processor_config.json") if "vision_config" in config else ()
    for file in ("config.json", "tokenizer_config.json", *of_processor):
        if not (folder / file).exists():
            continue
        named = (config if file == "config.json" else read_json(folder / file, name)).get("auto_map")
        code = list(named.values()) if isinstance(named, dict) else [named] if named else []
        for reference in code:
            if file != "config.json" or _module(str(reference)) not in ignored:
                raise InputError(
                    f"{name}: {file} names code of the folder to run (auto_map: {reference!r}), which is "
                    "never run: use a model, tokenizer and processor of transformers' own classes"
                )


def _module(reference: str) -> str:
    """Return the module of an ``auto_map`` entry ``module.Class``, also after ``owner/name--``."""
    return reference.rpartition("--")[2].partition(".")[0]
