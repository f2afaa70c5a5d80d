"""Convert a Hugging Face folder into a Megatron checkpoint.

    megatron-gmpo convert_hf_to_megatron --hf DIR --megatron DIR

Under torchrun (``torchrun --nproc-per-node N -m megatron_gmpo convert_hf_to_megatron ...``) each process
converts its share.
"""

from __future__ import annotations

from pathlib import Path

from ..command_line import Options, parse_options


class ConvertHFToMegatron(Options):
    """Convert a Hugging Face folder into a Megatron checkpoint that loads in any layout."""

    hf: Path
    """Hugging Face folder with safetensors weights, or a name on the hub."""
    megatron: Path
    """Folder to write."""
    dry_run: bool = False
    """Check everything and print the table name <-> name <-> shape, but write nothing."""
    verify: bool = False
    """Read back and compare every tensor bit by bit. If the model fits into memory, also compare its logits
    on a text with those of transformers."""


def main(argv: list[str]) -> None:
    options = parse_options(ConvertHFToMegatron, argv, "megatron-gmpo convert_hf_to_megatron")

    from ..models.snapshot import local_folders
    from ..policy.compare_logits import compare_logits
    from ..weights.hf_to_megatron import HFToMegatron
    from .conversion_job import run_conversion

    hf, megatron = options.hf, options.megatron.absolute()

    def opened() -> HFToMegatron:
        nonlocal hf
        hf = Path(local_folders({"--hf": str(options.hf)})["--hf"]).absolute()
        return HFToMegatron(hf)

    run_conversion(
        opened,
        megatron,
        dry_run=options.dry_run,
        verify=options.verify,
        compare=lambda: compare_logits(hf, megatron),
    )
