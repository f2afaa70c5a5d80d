"""Converts a Hugging Face folder into a Megatron checkpoint: python -m tools.convert_hf_to_megatron --hf DIR --megatron DIR

Under torchrun (torchrun --nproc-per-node N -m tools.convert_hf_to_megatron ...) each process converts its share.
"""

from __future__ import annotations

from pathlib import Path

import tyro

from megatron_gmpo.weights.hf_to_megatron import HFToMegatron
from tools.conversion import compare_logits, run_conversion


def main(hf: Path, megatron: Path, dry_run: bool = False, verify: bool = False) -> None:
    """Convert a Hugging Face folder into a Megatron checkpoint, which loads in any layout.

    Args:
        hf: Hugging Face folder with safetensors weights.
        megatron: Folder to write.
        dry_run: Check everything and print the table name <-> name <-> shape, but write nothing.
        verify: Read back and compare every tensor bit by bit, and where the model fits the logits with transformers' on a text.
    """
    hf, megatron = hf.absolute(), megatron.absolute()
    run_conversion(
        lambda: HFToMegatron(hf),
        megatron,
        dry_run=dry_run,
        verify=verify,
        compare=lambda: compare_logits(hf, megatron),
    )


if __name__ == "__main__":
    tyro.cli(main)
