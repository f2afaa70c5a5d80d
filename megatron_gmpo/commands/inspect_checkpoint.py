"""Print a description of a Hugging Face or Megatron checkpoint folder.

Usage::

    megatron-gmpo inspect_checkpoint FOLDER
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from ..command_line import Options, Positional, parse_options
from ..errors import printable


class InspectCheckpoint(Options):
    """Print kind, family, parameters, dtypes, layout and step of a checkpoint, and whether it is complete.

    The files of a training run's checkpoint are read to compare their checksums. No tensor is loaded.
    """

    folder: Annotated[Path, Positional]
    """Hugging Face folder, Megatron checkpoint folder, or one of its iter_* folders."""


def main(argv: list[str]) -> None:
    options = parse_options(InspectCheckpoint, argv, "megatron-gmpo inspect_checkpoint")
    from ..weights.inspection import inspect_checkpoint

    about = inspect_checkpoint(options.folder)
    width = max(map(len, about))
    for label, value in about.items():
        print(f"{label:<{width}}  {printable(value)}")
