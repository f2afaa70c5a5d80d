"""Draw the pictures of a study: one PNG per panel, one color per arm, shaded 95 % confidence intervals."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

from ..metrics.plots import COLORS, INK, MUTED, Series, set_up_axes, verbatim
from .results import Curve, curve


@dataclass(frozen=True)
class Panel:
    """Metrics that share one picture; the line style distinguishes them.

    Attributes:
        metrics: metric, or a pattern with ``*`` -> name in the legend.
        log: use a logarithmic y axis.
    """

    title: str
    metrics: dict[str, str]
    log: bool = False

    @property
    def file(self) -> str:
        """Return the name of the picture."""
        return re.sub(r"\W+", "_", self.title.lower().partition(",")[0]).strip("_") + ".png"


PANELS = (
    Panel("Reward, mean of a step", {"reward/mean": ""}),
    Panel("Evaluation, pass@1", {"eval/*/pass@1": ""}),
    Panel("Entropy, nats a token", {"policy/entropy": ""}),
    Panel("KL to the old policy, nats a token", {"policy/kl_old": ""}),
    Panel("KL to the reference, nats a token", {"policy/kl_ref": ""}),
    Panel("Gradient norm", {"grad_norm": ""}, log=True),
    Panel(
        "Token ratios before the mean, range as clipped",
        {"policy/token_ratio_max": "largest", "policy/token_ratio_min": "smallest"},
        log=True,
    ),
    Panel(
        "Sequence ratios after the mean, range",
        {"policy/sequence_ratio_max": "largest", "policy/sequence_ratio_min": "smallest"},
        log=True,
    ),
    Panel(
        "Log ratio, 0.1 % and 99.9 % of tokens",
        {"policy/log_ratio_q999": "99.9 %", "policy/log_ratio_q001": "0.1 %"},
    ),
    Panel("Clipped, fraction", {"policy/clip_fraction_high": "above", "policy/clip_fraction_low": "below"}),
    Panel("Clip", {"policy/clip_high": "high", "policy/clip_low": "low"}, log=True),
    Panel(
        "Left out of the policy term, fraction",
        {"policy/masked_fraction": "tokens", "policy/masked_sequences": "sequences"},
    ),
    Panel("Effective sample size of the ratios, share of tokens", {"policy/ratio_effective_sample_size": ""}),
    Panel("Rollout against policy, KL in nats a token", {"rollout/k3_kl": ""}, log=True),
    Panel("Routed differently in the rollout, fraction of tokens", {"moe/routing_differs_tokens": ""}),
    Panel("Rerouted by updates, fraction of tokens", {"moe/routing_drift_tokens": ""}),
    Panel("Router entropy, nats", {"moe/router_entropy": ""}),
    Panel("Load of the fullest expert, over the mean", {"moe/load_max": ""}),
    Panel("Response length, tokens", {"response_length/mean": ""}),
)

_STYLES = (
    "-",
    (0, (3, 1.5)),
    (0, (1, 1.2)),
    (0, (4, 1.2, 1, 1.2)),
    (0, (6, 2)),
    (0, (6, 1.2, 1, 1.2, 1, 1.2)),
)


def panel_curves(panel: Panel, arms: Mapping[str, Sequence[Series]]) -> dict[str, dict[str, Curve]]:
    """Return metric -> arm -> curve for the metrics that the runs have."""
    present = {metric for runs in arms.values() for series in runs for metric in series}
    metrics = [metric for pattern in panel.metrics for metric in sorted(fnmatch.filter(present, pattern))]
    return {
        metric: {arm: c for arm, runs in arms.items() if (c := curve(runs, metric))} for metric in metrics
    }


def draw(
    panel: Panel, curves: Mapping[str, Mapping[str, Curve]], labels: Mapping[str, str], out: Path
) -> None:
    """Write the picture of one panel.

    Args:
        curves: result of ``panel_curves``.
        labels: arm -> name in the legend; the order decides the colors.
    """
    figure = Figure(figsize=(5.6, 3.5), dpi=100, layout="constrained", facecolor="white")
    canvas = FigureCanvasAgg(figure)
    ax = figure.subplots()
    set_up_axes(ax, panel.title, log=panel.log)
    colors = {arm: COLORS[number % len(COLORS)] for number, arm in enumerate(labels)}
    for style, of_arms in zip(cycle(_STYLES), curves.values(), strict=False):
        for arm, c in of_arms.items():
            ax.fill_between(c.steps, c.low, c.high, color=colors[arm], alpha=0.13, lw=0)
            ax.plot(
                c.steps,
                c.mean,
                color=colors[arm],
                lw=1.6,
                ls=style,
                marker="o" if len(c.steps) < 20 else None,
                ms=3,
            )
    names = [panel.metrics.get(metric, metric.removeprefix("eval/")) for metric in curves]
    if len(names) > 1:
        styled = [
            Line2D([], [], color=MUTED, lw=1.6, ls=style, label=verbatim(name))
            for style, name in zip(cycle(_STYLES), names, strict=False)
        ]
        ax.legend(handles=styled, frameon=False, fontsize=7.5, labelcolor=MUTED, loc="best")
    arms = [Line2D([], [], color=colors[arm], lw=2.2, label=verbatim(label)) for arm, label in labels.items()]
    figure.legend(
        handles=arms, loc="outside lower center", ncols=4, frameon=False, fontsize=8, labelcolor=INK
    )
    canvas.draw()
    # a palette makes the file four times smaller
    Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").quantize(255).save(out, optimize=True)
