"""The results of an evaluation: pass rates with intervals, also by level or subject, as table and JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import comb, nan
from statistics import fmean
from typing import Any

import numpy as np
from rich.table import Table

from ..batch.samples import Prompt, SampleGroup
from ..config import EvalConfig
from .intervals import interval


@dataclass(frozen=True)
class Evaluated:
    """The result on one benchmark. All fields but ``groups`` are equal on all ranks.

    Attributes:
        passed: (problems,) int64 number of each problem's samples that passed.
        figures: the figures of ``evaluate`` for this benchmark.
        groups: this rank's scored groups, by the position of their problem.
    """

    prompts: list[Prompt]
    passed: np.ndarray
    figures: dict[str, float]
    groups: dict[int, SampleGroup] = field(default_factory=dict)


def pass_at_k(n: int, c: int, k: int) -> float:
    """Estimate the probability that at least one of ``k`` samples passes if ``c`` of ``n`` samples passed.

    The estimate 1 - C(n-c, k) / C(n, k) is unbiased (Chen et al. 2021, arXiv 2107.03374, equation 1).
    """
    assert 0 <= c <= n, (c, n)
    assert 1 <= k <= n, (k, n)
    return 1 - comb(n - c, k) / comb(n, k)


def pass_rates(passed: np.ndarray, n: int, ks: tuple[int, ...]) -> dict[str, float]:
    """Return ``pass@{k}`` and its 95 % interval over problems, ``ci_low@{k}`` and ``ci_high@{k}``.

    Args:
        passed: (problems,) number of each problem's ``n`` samples that passed.
    """
    figures: dict[str, float] = {}
    for k in ks:
        of_problems = np.array([pass_at_k(n, c, k) for c in passed.tolist()])
        figures[f"pass@{k}"] = fmean(of_problems.tolist())
        figures[f"ci_low@{k}"], figures[f"ci_high@{k}"] = interval(of_problems)
    return figures


def report(records: Mapping[str, Evaluated], cfg: EvalConfig) -> dict[str, Any]:
    """Return the results by benchmark, ready for JSON.

    Returns:
        For each benchmark ``figures``; ``by``, column -> value -> pass rates and ``problems``; ``passed``,
        problem -> number of its ``eval.samples_per_prompt`` samples that passed; and ``answers``, problem ->
        its answer.
    """
    sets: dict[str, Any] = {}
    for name, record in records.items():
        places: dict[str, dict[str, list[int]]] = {}
        for place, prompt in enumerate(record.prompts):
            for column, value in prompt.labels.items():
                places.setdefault(column, {}).setdefault(value, []).append(place)
        by = {
            column: {
                value: {
                    "problems": len(where),
                    **pass_rates(record.passed[where], cfg.samples_per_prompt, cfg.k),
                }
                for value, where in sorted(values.items())
            }
            for column, values in places.items()
        }
        passed = dict(zip((prompt.id for prompt in record.prompts), record.passed.tolist(), strict=True))
        answers = {prompt.id: prompt.answer for prompt in record.prompts}
        sets[name] = {"figures": record.figures, "by": by, "passed": passed, "answers": answers}
    return sets


def table(sets: Mapping[str, Any]) -> Table:
    """Return the results of ``report`` as a table, with a row for each benchmark and each label."""
    figures = {name: result["figures"] for name, result in sets.items()}
    rates = [
        rate
        for rate in dict.fromkeys(rate for each in figures.values() for rate in each)
        if rate.startswith(("pass@", "maj@", "success"))
    ]
    shown = Table("benchmark", "problems", *rates, "truncated")
    for name, result in sets.items():
        truncated = f"{figures[name]['truncated_fraction']:.1%}"
        shown.add_row(name, str(len(result["passed"])), *(_rate(figures[name], r) for r in rates), truncated)
        for column, values in result["by"].items():
            for value, of_value in values.items():
                cells = [_rate(of_value, rate) for rate in rates]
                shown.add_row(f"  {column} {value}", str(of_value["problems"]), *cells, "")
    if len(sets) > 1:
        # an environment may tell success on some benchmarks only
        known = [[each[rate] for each in figures.values() if rate in each] for rate in rates]
        means = [f"{fmean(values):.3f}" if len(values) == len(sets) else "" for values in known]
        shown.add_row("mean of the benchmarks", "", *means, "")
    return shown


def _rate(figures: Mapping[str, float], name: str) -> str:
    """Return a rate with its interval, if it has one; "" if it is missing."""
    if name not in figures:
        return ""
    kind, _, k = name.partition("@")
    low, high = (figures.get(f"ci_{end}@{k or kind}", nan) for end in ("low", "high"))
    ends = f" [{low:.3f}, {high:.3f}]" if kind != "maj" else ""
    return f"{figures[name]:.3f}{ends}"
