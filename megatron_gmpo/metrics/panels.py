"""The panels of figures that ``plot_metrics`` and ``view`` draw, by the metrics' names in metrics.jsonl."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np

STILL = (
    "loss",
    "policy/*log_ratio_*",
    "policy/*ratio_m*",
    "policy/clip_*",
    "policy/kl_old",
)
"""Figures that cannot move with one update a rollout: ratios are 1, and a group's advantages add up to 0."""


def moves(metric: str, values: np.ndarray) -> bool:
    """Return False for a figure of ``STILL`` whose values are equal up to rounding, else True."""
    still = any(fnmatch.fnmatchcase(metric, pattern) for pattern in STILL)
    return not still or float(np.ptp(values)) > 1e-6


@dataclass(frozen=True)
class Panel:
    """One panel of the page.

    Attributes:
        title: title without the unit.
        unit: what the y axis counts.
        metrics: metric, or a pattern with ``*`` -> name in the legend; "" uses the text that ``*`` matched.
        kind: ``band`` fills the range between two metrics, ``stack`` stacks the parts of a total.
        smoothed: draw a running mean over the raw values.
        log: use a logarithmic y axis.
    """

    title: str
    unit: str
    metrics: dict[str, str]
    kind: Literal["lines", "band", "stack"] = "lines"
    smoothed: bool = False
    log: bool = False

    @property
    def heading(self) -> str:
        """Return the title with the unit, unless it names it."""
        return self.title if self.unit in self.title.lower() else f"{self.title}, {self.unit}"

    def choose(self, present: Iterable[str]) -> dict[str, str]:
        """Return metric -> name in the legend for the metrics of this panel among those ``present``."""
        present = list(present)
        chosen: dict[str, str] = {}
        for pattern, label in self.metrics.items():
            head, star, _ = pattern.partition("*")
            matches = sorted(fnmatch.filter(present, pattern), key=lambda name: (name == "time/other", name))
            chosen |= {name: label or (name.removeprefix(head) if star else "") for name in matches}
        return chosen


PANELS = (
    Panel("Reward", "mean of a step", {"reward/mean": ""}, smoothed=True),
    Panel("Evaluation", "pass@k", {"eval/*pass@*": ""}),
    Panel("Successful episodes of an evaluation", "fraction", {"eval/*/success": ""}),
    Panel("Response length", "tokens", {"response_length/mean": "mean", "response_length/max": "longest"}),
    Panel("Truncated responses", "fraction", {"rollout/truncated_fraction": ""}),
    Panel(
        "Successful episodes", "fraction", {"episode/success": "all", "episode/success/*": ""}, smoothed=True
    ),
    Panel("Turns of an episode", "turns", {"episode/turns": ""}),
    Panel("Sampled tokens of a turn", "tokens", {"episode/tokens_per_turn": ""}),
    Panel(
        "Tool calls of an episode", "calls", {"episode/tool_calls": "calls", "episode/tool_errors": "errors"}
    ),
    Panel("Why episodes ended", "fraction", {"episode/ended_*": ""}),
    Panel("Environment", "seconds an episode", {"episode/environment_seconds": ""}),
    Panel("Policy loss", "loss", {"loss": ""}, smoothed=True),
    Panel("Gradient norm", "norm", {"grad_norm": ""}, smoothed=True),
    Panel("Policy entropy", "nats a token", {"policy/entropy": ""}, smoothed=True),
    Panel(
        "Log ratio to the old policy, range over tokens",
        "log ratio",
        {"policy/log_ratio_min": "", "policy/log_ratio_max": ""},
        kind="band",
    ),
    Panel(
        "Log ratio, 0.1 % to 99.9 % of tokens",
        "log ratio",
        {"policy/log_ratio_q001": "", "policy/log_ratio_q999": ""},
        kind="band",
    ),
    Panel(
        "Importance ratio of a sequence, range",
        "ratio",
        {"policy/sequence_ratio_min": "smallest", "policy/sequence_ratio_max": "largest"},
    ),
    Panel(
        "Clipped tokens", "fraction", {"policy/clip_fraction_high": "high", "policy/clip_fraction_low": "low"}
    ),
    Panel("Clip", "log ratio", {"policy/clip_high": "high", "policy/clip_low": "low"}),
    Panel(
        "Left out of the policy term",
        "fraction",
        {"policy/masked_fraction": "tokens", "policy/masked_sequences": "sequences"},
    ),
    Panel("KL", "nats a token", {"policy/kl_old": "to the old policy", "policy/kl_ref": "to the reference"}),
    Panel(
        "Rollout against trainer",
        "nats a token",
        {
            "rollout/logprob_diff_mean": "mean |Δ log p|",
            "rollout/logprob_diff_max": "largest",
            "rollout/k3_kl": "k3 KL",
        },
        log=True,
    ),
    Panel(
        "MoE load of an expert",
        "load over the mean",
        {"moe/load_max": "fullest expert", "moe/load_cv": "standard deviation"},
    ),
    Panel("MoE experts without a token", "experts", {"moe/dead_experts": ""}),
    Panel("MoE router entropy", "nats", {"moe/router_entropy": ""}),
    Panel("MoE routings that differ", "fraction", {"moe/routing_*": ""}),
    Panel("MoE auxiliary losses", "loss", {"moe/*_loss": ""}, log=True),
    Panel("Time of a step", "seconds", {"time/*": ""}, kind="stack"),
    Panel("Throughput", "tokens per second", {"throughput/tokens_per_second": ""}, smoothed=True),
)
