"""Make the table and the picture of a comparison of log probabilities."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.table import Table

from ..losses.tokens import k3
from ..metrics.plots import COLORS, set_up_axes
from .mismatch_sides import Side


def table(sides: dict[str, Side]) -> Table:
    """Return the differences to the first side, in nats.

    They are absolute differences and the k3 estimate of the KL divergence.
    """
    (name, first), *others = sides.items()
    shown = Table(title=f"log probabilities of {len(first.logprobs):,} tokens, against {name}")
    for column in ("side", "mean", "median", "99 %", "largest", "k3 KL"):
        shown.add_column(column, justify="left" if column == "side" else "right")
    for other, side in others:
        ratio = side.logprobs - first.logprobs
        size = ratio.abs()
        figures = (
            size.mean(),
            size.median(),
            size.kthvalue(math.ceil(0.99 * len(size))).values,
            size.max(),
            k3(ratio).mean(),
        )
        shown.add_row(other, *(f"{figure:.2e}" for figure in figures))
    return shown


def layer_errors(sides: dict[str, Side]) -> dict[str, list[float]]:
    """Return side -> relative error of each layer's output.

    The error is the RMS difference to the first side's output, divided by the RMS of that output.
    """
    (_, first), *others = sides.items()
    return {
        name: [
            ((b - a).square().mean() / a.square().mean()).sqrt().item()
            for a, b in zip(first.hidden, side.hidden, strict=True)
        ]
        for name, side in others
        if first.hidden and side.hidden
    }


def draw(sides: dict[str, Side], out: Path) -> None:
    """Write a picture of the distribution of the differences and, if measured, of the errors per layer."""
    (name, first), *others = sides.items()
    errors = layer_errors(sides)
    figure = Figure(figsize=(11 if errors else 5.5, 3.6), layout="constrained")
    left, *right = figure.subplots(1, 2 if errors else 1, squeeze=False)[0]
    set_up_axes(left, f"Share of tokens whose log probability differs from {name} by more", log=True)
    left.set_xscale("log")
    for (other, side), color in zip(others, COLORS, strict=False):
        size = (side.logprobs - first.logprobs).abs().sort().values
        left.step(size.clamp_min(1e-9), 1 - torch.arange(len(size)) / len(size), color=color, label=other)
    left.set_xlabel("nats")
    left.legend(frameon=False, fontsize=8)
    for axes in right:
        set_up_axes(axes, f"Relative difference of the hidden states to {name}, by layer", log=True)
        for (other, _), color in zip(others, COLORS, strict=False):
            if other in errors:
                axes.plot(range(1, len(errors[other]) + 1), errors[other], color=color, label=other)
        axes.legend(frameon=False, fontsize=8)
    FigureCanvasAgg(figure).print_figure(out, dpi=150)
