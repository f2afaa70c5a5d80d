"""Decide which files of a Hugging Face folder hold the weights."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from ..distributed import rank
from ..errors import InputError
from ..models.folder import read_json

logger = logging.getLogger(__name__)

INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
_PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}


def weight_files(folder: Path) -> tuple[set[str], dict[str, str]]:
    """Return the names of the safetensors files, and tensor -> file as the index assigns them.

    transformers reads ``model.safetensors`` and ignores an index beside it (modeling_utils.py:
    _get_resolved_checkpoint_files); SGLang follows the index. ``save_pretrained`` leaves either of them
    behind. The single file is therefore used if the index names files that are gone; a folder in which both
    are complete is refused.

    Raises:
        InputError: there are no safetensors; there are two sets of weights; the index cannot be read, or
            names a file that is not in the folder.
    """
    present = {file.name for file in folder.iterdir() if file.is_file()}
    if saved_by_rank := sorted(filter(_DISTRIBUTED.fullmatch, present)):
        raise InputError(
            f"{str(folder)!r} holds {saved_by_rank[0]!r}, a file that transformers saves for each rank and "
            "reads before all others: save the model in one process, and remove these files"
        )
    if INDEX not in present and _SINGLE not in present:
        pickles = sorted(name for name in present if Path(name).suffix in _PICKLES)
        only = f", only {pickles[0]!r}, a pickle, which can run code when it is read" if pickles else ""
        raise InputError(
            f"{str(folder)!r} holds no model.safetensors{only}: "
            "give a Hugging Face model folder with safetensors weights"
        )
    if INDEX not in present:
        return {_SINGLE}, {}
    listed = _read_index(folder / INDEX)
    files = set(listed.values())
    missing = sorted(files - present)
    if _SINGLE not in present:
        if missing:
            raise InputError(
                f"{folder / INDEX} names {missing[0]!r}, which is not there: download the model again"
            )
        return files, listed
    if _SINGLE in files:
        return files, listed
    if not missing:
        raise InputError(
            f"{str(folder)!r} holds two sets of weights, {_SINGLE} and the files of {INDEX}, such as "
            f"{min(files - {_SINGLE})!r}: remove the older set"
        )
    if rank() == 0:
        logger.warning(
            f"{str(folder)!r}: {_SINGLE} is read, and {INDEX} is ignored, because it names {missing[0]!r}, "
            "which is not there; remove the index, which SGLang does not accept"
        )
    return {_SINGLE}, {}


def _read_index(index: Path) -> dict[str, str]:
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise InputError(f"{str(index)!r} has no weight_map: download the model again")
    for file in listed.values():
        if not (isinstance(file, str) and Path(file).name == file and file.isprintable() and len(file) < 256):
            shown = repr(file)[:100]
            raise InputError(f"{str(index)!r} names {shown}, which is no plain file name: correct it")
    return listed
