"""Says what a checkpoint folder holds, Hugging Face's or Megatron's: python -m tools.inspect_checkpoint DIR"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from megatron_gmpo.config import exit_with_one_line
from megatron_gmpo.errors import InputError
from megatron_gmpo.weights.inspection import inspect_checkpoint


def main(folder: Annotated[Path, tyro.conf.Positional]) -> None:
    """Print kind, family, parameters, dtypes, layout and step of a checkpoint, and whether it is whole. No weights are read.

    Args:
        folder: Hugging Face folder, Megatron checkpoint folder, or one of its iter_* folders.
    """
    try:
        about = inspect_checkpoint(folder)
    except InputError as error:
        exit_with_one_line(error)
    width = max(map(len, about))
    for label, value in about.items():
        print(f"{label:<{width}}  {value}")


if __name__ == "__main__":
    tyro.cli(main)
