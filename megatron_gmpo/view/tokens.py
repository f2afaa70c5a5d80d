"""The data of the tab Tokens: records in tokens/step_000012.jsonl, which ``metrics.token_records`` writes."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from ..metrics.token_records import Record
from .lines import GrowingLines

WORST = 40
"""Number of tokens that are listed by each measure."""
CONTEXT = 12
"""Number of tokens of context on each side of a listed token."""
GRPO_CLIP = 0.2
"""The clip of GRPO's ratio, 1 - 0.2 to 1 + 0.2 (DeepSeekMath, arXiv 2402.03300)."""
BINS = 60

_NAME = re.compile(r"step_(\d{1,9})\.jsonl")


def recorded_steps(folder: Path) -> list[int]:
    """Return the steps that have a record, in order."""
    names = (file.name for file in folder.glob("step_*.jsonl"))
    return sorted(int(match[1]) for name in names if (match := _NAME.fullmatch(name)))


def summary(folder: Path, step: int) -> dict[str, Any]:
    """Return what the page shows of a step's record: its samples, the worst tokens, and histograms.

    The samples are read one after the other.
    """
    header: dict[str, Any] = {}
    samples: list[dict[str, Any]] = []
    worst: list[dict[str, Any]] = []
    problems: list[str] = []
    before, after = [], []
    for number, line in enumerate(_lines(folder, step), -1):
        try:
            if number < 0:
                header = dict(orjson.loads(line))
                continue
            record = Record.from_json(line)
        except (ValueError, TypeError, KeyError) as error:
            problems.append(f"Line {number + 2} of the record of step {step} is damaged ({error}).")
            continue
        samples.append(_summary(record, number))
        worst += _worst(record, number)
        before.append(record.log_ratio)
        after.append(math.log(record.sequence_ratio) if record.sequence_ratio > 0 else -math.inf)
    return {
        "header": header,
        "samples": samples,
        "worst": worst,
        "histograms": _histograms(before, after),
        "problems": problems,
    }


def sample(folder: Path, step: int, number: int) -> dict[str, Any] | None:
    """Return the columns of one sample by its number in ``summary``, or None if there is no such sample."""
    line = next(islice(_lines(folder, step), number + 1, None), None)
    return None if line is None else orjson.loads(line)


def _lines(folder: Path, step: int) -> Iterator[bytes]:
    return (line for _, line in GrowingLines(folder / f"step_{step:06d}.jsonl").new())


def _summary(record: Record, number: int) -> dict[str, Any]:
    """Return a sample's line: what GMPO weighs it with, beside the arithmetic means."""
    ratios = np.exp(record.log_ratio.astype(np.float64))
    low, high = 1 - GRPO_CLIP, 1 + GRPO_CLIP
    clipped = np.minimum(ratios, high) if record.advantage > 0 else np.maximum(ratios, low)
    return {
        "sample": number,
        "prompt_id": record.prompt_id,
        "index": record.index,
        "prompt": record.prompt,
        "chosen": record.chosen,
        "reward": record.reward,
        "advantage": record.advantage,
        "length": len(ratios),
        "clipped": int(record.clipped.sum()),
        "largest": float(np.abs(record.log_ratio).max()),
        "sequence_ratio": record.sequence_ratio,
        "arithmetic_mean": float(ratios.mean()),
        "grpo_mean": float(clipped.mean()),
    }


def _worst(record: Record, number: int) -> list[dict[str, Any]]:
    """Return the first tokens of a sample by each measure, with their context."""
    measures = [record.log_ratio, -record.log_ratio, np.abs(record.log_ratio), record.entropy]
    if record.rollout_difference is not None:
        measures.append(np.abs(record.rollout_difference))
    measures.append(record.layers_rerouted)
    chosen = {int(at) for m in measures if m is not None for at in np.argsort(-m, kind="stable")[:WORST]}
    turn = np.zeros(len(record.ids)) if record.turn is None else record.turn
    found = []
    for at in sorted(chosen):
        # the context is of the same turn: observations are not in the record
        first, end = (int(np.searchsorted(turn, turn[at], side)) for side in ("left", "right"))
        before = "".join(record.text[max(first, at - CONTEXT) : at])
        after = "".join(record.text[at + 1 : min(end, at + 1 + CONTEXT)])
        found.append({"sample": number, "at": at, "before": before, "after": after} | record.token(at))
    return found


def _histograms(before: list[np.ndarray], after: list[float]) -> dict[str, Any]:
    """Return counts of the tokens' log ratios and of the sequences' log ratios, in common bins."""
    if not before:
        return {}
    tokens = np.concatenate(before)
    limit = float(np.abs(tokens).max()) or 1.0
    edges = np.linspace(-limit, limit, BINS + 1)
    return {
        "edges": edges,
        "tokens": np.histogram(tokens, edges)[0],
        "sequences": np.histogram(np.clip(after, -limit, limit), edges)[0],
    }
