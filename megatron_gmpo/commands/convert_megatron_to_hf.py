"""Convert a Megatron checkpoint into a Hugging Face folder.

    megatron-gmpo convert_megatron_to_hf --megatron DIR --hf DIR

Under torchrun (``torchrun --nproc-per-node N -m megatron_gmpo convert_megatron_to_hf ...``) each process
converts its share.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from ..command_line import Options, parse_options
from ..errors import InputError

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


class ConvertMegatronToHF(Options):
    """Convert a Megatron checkpoint into a Hugging Face folder.

    The checkpoint may come from a conversion or from a training run in any layout.
    """

    megatron: Path
    """Folder with latest_checkpointed_iteration.txt, or one of its iter_* folders."""
    hf: Path
    """Folder to write."""
    template: Path | None = None
    """Hugging Face folder with the config.json and the tokenizer, or a name on the hub; needed if the
    checkpoint has neither."""
    dtype: Literal["bf16", "fp32"] | None = None
    """Precision of the weights to write; by default each tensor keeps its precision."""
    max_shard_size: str = "5GB"
    """Maximum size of a safetensors file, such as 5GB or 500MB."""
    dry_run: bool = False
    """Check everything except checksums, and print the table name <-> name <-> shape, but write nothing."""
    verify: bool = False
    """Read back and compare every tensor bit by bit. If the model fits into memory, also compare its logits
    on a text with those of transformers."""
    skip_checksums: bool = False
    """Do not read the files of a training run's checkpoint to compare their checksums first."""


def main(argv: list[str]) -> None:
    options = parse_options(ConvertMegatronToHF, argv, "megatron-gmpo convert_megatron_to_hf")
    max_shard_size = _nbytes(options.max_shard_size)

    from ..distributed import agreed
    from ..models.snapshot import TEXT_FILES, local_folders
    from ..policy.compare_logits import compare_logits
    from ..weights.megatron_to_hf import MegatronToHF
    from ..weights.run_checkpoint import check_whole
    from ..weights.torch_dist import checkpoint_folder
    from .conversion_job import run_conversion

    megatron, hf = options.megatron.absolute(), options.hf.absolute()

    def opened() -> MegatronToHF:
        if not (options.skip_checksums or options.dry_run):
            with agreed():
                checkpoint = checkpoint_folder(megatron)
            skip = "skip the check with --skip_checksums"
            check_whole(checkpoint, f"give that folder as --megatron, or {skip}", skip)
        template = options.template
        if template:
            template = Path(local_folders({"--template": str(template)}, TEXT_FILES)["--template"])
        return MegatronToHF(megatron, template, options.dtype, max_shard_size)

    run_conversion(
        opened,
        hf,
        dry_run=options.dry_run,
        verify=options.verify,
        compare=lambda: compare_logits(hf, megatron, options.dtype),
    )


def _nbytes(size: str) -> int:
    found = re.fullmatch(r"(\d+)\s*([KMG]B)?", size.strip(), re.IGNORECASE)
    if not found or not int(found[1]):
        raise InputError(f"--max_shard_size {size!r}: give a size such as 5GB or 500MB")
    return int(found[1]) * _UNITS[(found[2] or "").upper()]
