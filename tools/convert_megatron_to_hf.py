"""Converts a Megatron checkpoint into a Hugging Face folder: python -m tools.convert_megatron_to_hf --megatron DIR --hf DIR

Under torchrun (torchrun --nproc-per-node N -m tools.convert_megatron_to_hf ...) each process converts its share.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

import tyro

from megatron_gmpo.config import exit_with_one_line
from megatron_gmpo.errors import InputError
from megatron_gmpo.weights.megatron_to_hf import MegatronToHF
from tools.conversion import compare_logits, run_conversion

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def main(
    megatron: Path,
    hf: Path,
    template: Path | None = None,
    dtype: Literal["bf16", "fp32"] | None = None,
    max_shard_size: str = "5GB",
    dry_run: bool = False,
    verify: bool = False,
) -> None:
    """Convert a Megatron checkpoint, of a conversion or of a training run in any layout, into a Hugging Face folder.

    Args:
        megatron: Folder with latest_checkpointed_iteration.txt, or one of its iter_* folders.
        hf: Folder to write.
        template: Hugging Face folder with the config.json and the tokenizer, where none comes with the checkpoint.
        dtype: Precision of the weights written; each one's own by default.
        max_shard_size: Largest safetensors file, such as 5GB or 500MB.
        dry_run: Check everything and print the table name <-> name <-> shape, but write nothing.
        verify: Read back and compare every tensor bit by bit, and where the model fits the logits with transformers' on a text.
    """
    megatron, hf = megatron.absolute(), hf.absolute()
    try:
        limit = _nbytes(max_shard_size)
    except InputError as error:
        exit_with_one_line(error)
    run_conversion(
        lambda: MegatronToHF(megatron, template, dtype, limit),
        hf,
        dry_run=dry_run,
        verify=verify,
        compare=lambda: compare_logits(hf, megatron, dtype),
    )


def _nbytes(size: str) -> int:
    found = re.fullmatch(r"(\d+)\s*([KMG]B)?", size.strip(), re.IGNORECASE)
    if not found or not int(found[1]):
        raise InputError(f"--max-shard-size {size!r}: give a size such as 5GB or 500MB")
    return int(found[1]) * _UNITS[(found[2] or "").upper()]


if __name__ == "__main__":
    tyro.cli(main)
