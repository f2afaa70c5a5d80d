"""Compare log probabilities of the same tokens between precisions and engines.

    megatron-gmpo mismatch CONFIG.toml --groups DIR --sides bf16 policy recorded [--section.key value ...]

``DIR`` is the ``rollout.save_path`` of a run. The weights are those of ``model.path``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from ..command_line import Options, parse_options_and_config
from ..config import Positive
from ..errors import InputError


class Mismatch(Options):
    """Compare log probabilities of the same tokens between precisions and engines.

    Each other side is compared with the first side.
    """

    groups: Path
    """Folder with saved rollouts, the rollout.save_path of a run."""
    sides: tuple[str, ...] = ("fp32", "bf16", "fp8", "policy")
    """Sides to compare. ``policy``: Megatron with the config's settings, under torchrun in its layout.
    ``fp32``, ``bf16``: transformers with weights and activations in that precision. ``fp8``: transformers in
    fp32 with weights rounded to block-wise FP8, which isolates the effect of rounding. ``sglang``,
    ``sglang_fp8``: a server that is started for the comparison and receives the weights by a weight sync; FP8
    needs a GPU. A URL: a running SGLang server with these weights; its keys are read from SGLANG_API_KEY and
    SGLANG_ADMIN_API_KEY. ``recorded``: the values that the rollout engine reported when it sampled; needs
    rollout.temperature = 1, the temperature of all other sides."""
    step: Annotated[int, Field(ge=0)] = 0
    """Step whose rollouts are used."""
    num_groups: Positive | None = None
    """Number of prompt groups to use; by default all."""
    layers: Annotated[int, Field(ge=0)] = 0
    """Number of sequences on which the hidden states after every layer are compared too. Works for policy,
    fp32, bf16 and fp8 in one process."""
    out: Path = Path("mismatch.png")
    """Picture to write."""


def main(argv: list[str]) -> None:
    options, cfg = parse_options_and_config(Mismatch, argv, "megatron-gmpo mismatch")
    if not options.out.parent.is_dir() or options.out.suffix not in (".png", ".pdf", ".svg"):
        raise InputError(f"--out {options.out}: give a .png, .pdf or .svg file in a folder that exists")

    import torch.distributed as dist
    from rich.console import Console

    from ..distributed import rank
    from .mismatch_report import draw, layer_errors, table
    from .mismatch_sides import measure

    sides = measure(
        cfg,
        options.groups,
        options.sides,
        step=options.step,
        num_groups=options.num_groups,
        layers=options.layers,
    )
    if rank() == 0:
        Console().print(table(sides))
        for side, errors in layer_errors(sides).items():
            figures = ", ".join(f"{error:.1e}" for error in errors)
            print(f"{side}: hidden states after each layer differ by {figures}")
        draw(sides, options.out)
        print(options.out)
    if dist.is_initialized():
        dist.destroy_process_group()
