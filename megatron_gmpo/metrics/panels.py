"""The panels of figures that ``plot_metrics`` and ``view`` draw, by the metrics' names in metrics.jsonl."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Panel:
    """One panel of the page.

    Attributes:
        title: title with the unit.
        metrics: metric, or a pattern with ``*`` -> name in the legend; "" uses the text that ``*`` matched.
        kind: ``band`` fills the range between two metrics, ``stack`` stacks the parts of a total.
        smoothed: draw a running mean over the raw values.
        log: use a logarithmic y axis.
    """

    title: str
    metrics: dict[str, str]
    kind: Literal["lines", "band", "stack"] = "lines"
    smoothed: bool = False
    log: bool = False

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
    Panel("Reward, mean of a step", {"reward/mean": ""}, smoothed=True),
    Panel("Evaluation, pass@k", {"eval/*pass@*": ""}),
    Panel("Response length, tokens", {"response_length/mean": "mean", "response_length/max": "longest"}),
    Panel("Truncated responses, fraction", {"rollout/truncated_fraction": ""}),
    Panel(
        "Successful episodes, fraction", {"episode/success": "all", "episode/success/*": ""}, smoothed=True
    ),
    Panel("Turns of an episode", {"episode/turns": ""}),
    Panel("Sampled tokens of a turn", {"episode/tokens_per_turn": ""}),
    Panel("Tool calls of an episode", {"episode/tool_calls": "calls", "episode/tool_errors": "errors"}),
    Panel("Why episodes ended, fraction", {"episode/ended_*": ""}),
    Panel("Environment, seconds an episode", {"episode/environment_seconds": ""}),
    Panel("Policy loss", {"loss": ""}, smoothed=True),
    Panel("Gradient norm", {"grad_norm": ""}, smoothed=True),
    Panel("Policy entropy, nats a token", {"policy/entropy": ""}, smoothed=True),
    Panel(
        "Log ratio to the old policy, range over tokens",
        {"policy/log_ratio_min": "", "policy/log_ratio_max": ""},
        kind="band",
    ),
    Panel(
        "Log ratio, 0.1 % to 99.9 % of tokens",
        {"policy/log_ratio_q001": "", "policy/log_ratio_q999": ""},
        kind="band",
    ),
    Panel(
        "Importance ratio of a sequence, range",
        {"policy/sequence_ratio_min": "smallest", "policy/sequence_ratio_max": "largest"},
    ),
    Panel(
        "Clipped tokens, fraction", {"policy/clip_fraction_high": "high", "policy/clip_fraction_low": "low"}
    ),
    Panel("Clip", {"policy/clip_high": "high", "policy/clip_low": "low"}),
    Panel(
        "Left out of the policy term, fraction",
        {"policy/masked_fraction": "tokens", "policy/masked_sequences": "sequences"},
    ),
    Panel("KL, nats a token", {"policy/kl_old": "to the old policy", "policy/kl_ref": "to the reference"}),
    Panel(
        "Rollout against trainer",
        {
            "rollout/logprob_diff_mean": "mean |Δ log p|",
            "rollout/logprob_diff_max": "largest",
            "rollout/k3_kl": "k3 KL",
        },
        log=True,
    ),
    Panel(
        "MoE load over the mean expert's",
        {"moe/load_max": "fullest expert", "moe/load_cv": "standard deviation"},
    ),
    Panel("MoE experts without a token", {"moe/dead_experts": ""}),
    Panel("MoE router entropy, nats", {"moe/router_entropy": ""}),
    Panel("MoE routings that differ, fraction", {"moe/routing_*": ""}),
    Panel("MoE auxiliary losses", {"moe/*_loss": ""}, log=True),
    Panel("Time of a step, seconds", {"time/*": ""}, kind="stack"),
    Panel("Tokens per second", {"throughput/tokens_per_second": ""}, smoothed=True),
)
