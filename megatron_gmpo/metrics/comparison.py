"""Compare two evaluations of the same problems with a paired test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from ..command_line import Options
from ..errors import InputError, one_line
from .intervals import interval, mcnemar, paired_bootstrap


class Comparison(Options):
    """Evaluate the newest checkpoint of ``run_dir``, else ``model.path``, on the benchmarks of ``eval.sets``.

    The results are written to evaluation.json in ``run_dir``, and the responses to evaluation_NAME.jsonl.
    """

    compare: tuple[Path, ...] = ()
    """Compare two earlier evaluations instead: two run folders, or two files evaluation.json. The test is
    paired over the problems that both have."""


def compare(paths: tuple[Path, ...]) -> str:
    """Return the difference of pass@1 between two evaluations, for each benchmark that both have.

    The test is McNemar's exact one if both have one sample per problem, else a bootstrap over problems.

    Args:
        paths: two run folders or files ``evaluation.json``.

    Raises:
        InputError: there are not two paths; a file is missing or damaged; the evaluations have no problem in
            common, or one with different answers.
    """
    if len(paths) != 2:
        raise InputError(f"--compare takes 2 run folders or files, not {len(paths)}: name two evaluations")
    first, second = map(_read, paths)
    lines = [f"A: {paths[0]} ({first['evaluated']})", f"B: {paths[1]} ({second['evaluated']})"]
    if changed := [key for key, value in first["sampling"].items() if second["sampling"].get(key) != value]:
        lines.append(f"A and B were evaluated with different {', '.join(changed)}")
    before = len(lines)
    for name, result in first["sets"].items():
        other = second["sets"].get(name, {"passed": {}, "answers": {}})
        here, there = result["passed"], other["passed"]
        if common := [problem for problem in here if problem in there]:
            # a problem is named after its file and row, whose content may have changed
            for problem in (p for p in common if result["answers"][p] != other["answers"][p]):
                raise InputError(
                    f"--compare: problem {problem} of {name} has different answers in {paths[0]} and "
                    f"{paths[1]}: evaluate both on the same data"
                )
            ns = [found["sampling"]["samples_per_prompt"] for found in (first, second)]
            rates = [
                np.array([found[p] for p in common]) / n for found, n in zip((here, there), ns, strict=True)
            ]
            lines += _difference(name, rates[0], rates[1], ns)
    if len(lines) == before:
        raise InputError(
            f"--compare: {paths[0]} and {paths[1]} have no problem in common: evaluate both on one set"
        )
    return "\n".join(lines)


def _difference(name: str, first: np.ndarray, second: np.ndarray, ns: list[int]) -> list[str]:
    """Return the lines about one benchmark, from the (problems,) shares of samples that passed."""
    low, high, p = paired_bootstrap(second - first)
    test = "bootstrap over problems"
    if ns == [1, 1]:
        p = mcnemar(first == 1, second == 1)
        only = int((first > second).sum()), int((second > first).sum())
        test = f"McNemar's exact test, {only[0]} problems solved by A alone and {only[1]} by B alone"
    shown = [
        f"{label} {rates.mean():.3f} [{ends[0]:.3f}, {ends[1]:.3f}]"
        for label, rates in (("A", first), ("B", second))
        for ends in [interval(rates)]
    ]
    return [
        f"{name}, {len(first)} problems: pass@1 {', '.join(shown)}",
        f"  B - A = {second.mean() - first.mean():+.3f} [{low:+.3f}, {high:+.3f}], p = {p:.3g} ({test})",
    ]


def _read(path: Path) -> dict[str, Any]:
    file = path / "evaluation.json" if path.is_dir() else path
    try:
        found = json.loads(file.read_text())
        assert {"evaluated", "sampling", "sets"} <= found.keys()
        assert all({"passed", "answers"} <= each.keys() for each in found["sets"].values())
        return found
    except FileNotFoundError:
        raise InputError(f"--compare: {file} does not exist: run megatron-gmpo evaluate first") from None
    except (ValueError, AttributeError, AssertionError, OSError) as error:
        raise InputError(
            f"--compare: {file} is not the result of an evaluation ({one_line(error)}): evaluate again"
        ) from None
