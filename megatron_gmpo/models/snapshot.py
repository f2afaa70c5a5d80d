"""Models by their name on the Hugging Face hub: rank 0 downloads them into the hub's cache."""

from __future__ import annotations

import os
import re
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
_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
"""Patterns of the files to download. They leave out pickles, code, and further weights in subfolders."""

_REASONS = {
    RepositoryNotFoundError: "the hub has no such model, or your HF_TOKEN gives no access",
    RevisionNotFoundError: "the hub's model has no such revision",
    LocalEntryNotFoundError: "the hub cannot be reached, and its cache has not all files",
}


def with_local_models(cfg: Config, device: torch.device) -> Config:
    """Return the config with folders in place of hub names, ``owner/name`` or ``owner/name@revision``.

    Rank 0 asks the hub, so all ranks use the same commit. If there are several ranks and a name, this starts
    the process group. The cache must be in a folder that all nodes share.

    Raises:
        InputError: the hub has no such model, or the files are neither in the cache nor can be downloaded;
            or a rank does not see rank 0's folder. Raised on every rank.
    """
    paths = {field: getattr(cfg.model, field) for field in ("path", "reference_path")}
    names = {
        field: match
        for field, path in paths.items()
        if (match := _NAME.fullmatch(path)) and not Path(path).exists()
    }
    if not names:
        return cfg
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        start_process_group(device, cfg.distributed_timeout_s)
    folders: dict[str, str] = {}
    with agreed():
        if rank() == 0:
            folders = {field: _download(f"model.{field}", match) for field, match in names.items()}
    folders = broadcast_object(folders)
    with agreed():
        for field, folder in folders.items():
            if not Path(folder).is_dir():
                raise InputError(
                    f"model.{field} = {paths[field]!r} is in {folder}, which rank {rank()} does not see: "
                    "set HF_HOME to a folder that all nodes share"
                )
    return cfg.model_copy(update={"model": cfg.model.model_copy(update=folders)})


def _download(field: str, match: re.Match[str]) -> str:
    """Return the folder of a model in the hub's cache, with the files that it needs."""
    name, revision = match.groups()
    try:
        return snapshot_download(
            name, revision=revision, allow_patterns=_FILES, ignore_patterns="*/*.safetensors"
        )
    except Exception as error:  # of HTTP, of the file system, of an invalid name
        download = f"hf download {name}" + (f" --revision {revision}" if revision else "")
        reason = next((text for kind, text in _REASONS.items() if isinstance(error, kind)), one_line(error))
        raise InputError(
            f"{field} = {match.group()!r} is no folder, and {reason}: correct it, or run {download!r} on a "
            "machine with access and set HF_HOME to its cache"
        ) from None
