"""Models by their name on the Hugging Face hub: rank 0 downloads them into the hub's cache."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

from ..config import Config
from ..distributed import agreed, broadcast_object, rank
from ..errors import InputError, one_line
from ..platform import start_process_group

_NAME = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@(.+))?")
TEXT_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "README.md")
"""Patterns of config, tokenizer and card. They leave out pickles and code."""
_FILES = (*TEXT_FILES, "*.safetensors")

_REASONS = {
    RepositoryNotFoundError: "the hub has no such model, or your HF_TOKEN gives no access",
    RevisionNotFoundError: "the hub's model has no such revision",
    LocalEntryNotFoundError: "the hub cannot be reached, and its cache has not all files",
}


def with_local_models(cfg: Config, device: torch.device) -> Config:
    """Return the config with folders in place of hub names. Collective, see ``local_folders``.

    If there are several ranks and a name, this starts the process group.
    """
    paths = {f"model.{field}": getattr(cfg.model, field) for field in ("path", "reference_path")}
    if not any(map(_hub_name, paths.values())):
        return cfg
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        start_process_group(device, cfg.distributed_timeout_s)
    folders = {name.removeprefix("model."): folder for name, folder in local_folders(paths).items()}
    return cfg.model_copy(update={"model": cfg.model.model_copy(update=folders)})


def local_folders(paths: Mapping[str, str], files: Sequence[str] = _FILES) -> dict[str, str]:
    """Return folders in place of hub names, ``owner/name`` or ``owner/name@revision``. Collective.

    Rank 0 asks the hub, so all ranks use the same commit. The cache must be in a folder that all nodes share.

    Args:
        paths: setting, for error messages -> folder or hub name. A path that exists is no name.
        files: patterns of the files to download.

    Raises:
        InputError: the hub has no such model, or the files are neither in the cache nor can be downloaded;
            or a rank does not see rank 0's folder. Raised on every rank.
    """
    names = {setting: match for setting, path in paths.items() if (match := _hub_name(path))}
    folders: dict[str, str] = {}
    with agreed():
        if rank() == 0:
            folders = {setting: _download(setting, match, files) for setting, match in names.items()}
    folders = broadcast_object(folders)
    with agreed():
        for setting, folder in folders.items():
            if not Path(folder).is_dir():
                raise InputError(
                    f"{setting} = {paths[setting]!r} is in {folder}, which rank {rank()} does not see: "
                    "set HF_HOME to a folder that all nodes share"
                )
    return {**paths, **folders}


def _hub_name(path: str) -> re.Match[str] | None:
    """Return the match of a name on the hub; None for a path that exists, and for what is no name."""
    return None if Path(path).exists() else _NAME.fullmatch(path)


def _download(setting: str, match: re.Match[str], files: Sequence[str]) -> str:
    """Return the folder of a model in the hub's cache, with the files of these patterns."""
    name, revision = match.groups()
    try:
        return snapshot_download(
            name, revision=revision, allow_patterns=list(files), ignore_patterns="*/*.safetensors"
        )
    except Exception as error:  # of HTTP, of the file system, of an invalid name
        download = f"hf download {name}" + (f" --revision {revision}" if revision else "")
        reason = next((text for kind, text in _REASONS.items() if isinstance(error, kind)), one_line(error))
        raise InputError(
            f"{setting} = {match.group()!r} is no folder, and {reason}: correct it, or run {download!r} on a "
            "machine with access and set HF_HOME to its cache"
        ) from None
