"""A search over a text file as a tool: ``megatron_gmpo.rollout.environments.search:search``.

``rollout.environment_args.file`` names the file. Its passages are separated by empty lines.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from functools import cache
from pathlib import Path

from pydantic import FilePath

_RESULTS = 3
_K1, _B = 1.2, 0.75


def search(query: str, file: FilePath) -> str:
    """Search a text for passages that have words of the query, and return the best three.

    Args:
        query: Words to look for.
        file: The text.
    """
    passages = _passages(file)
    words = _words(query)
    rare = {word: _rarity(word, passages) for word in words}
    mean = sum(counts.total() for _, counts in passages) / max(1, len(passages))
    scores = [_score(counts, rare, mean) for _, counts in passages]
    best = sorted(range(len(passages)), key=lambda place: -scores[place])[:_RESULTS]
    return "\n\n".join(passages[place][0] for place in best if scores[place] > 0) or "No passage found."


@cache
def _passages(file: Path) -> list[tuple[str, Counter[str]]]:
    texts = re.split(r"\n\s*\n", Path(file).read_text(encoding="utf-8"))
    return [(text.strip(), _words(text)) for text in texts if text.strip()]


def _words(text: str) -> Counter[str]:
    return Counter(re.findall(r"\w+", text.lower()))


def _rarity(word: str, passages: list[tuple[str, Counter[str]]]) -> float:
    found = sum(word in counts for _, counts in passages)
    return math.log(1 + (len(passages) - found + 0.5) / (found + 0.5))


def _score(counts: Counter[str], rare: dict[str, float], mean: float) -> float:
    """Return the BM25 score of a passage (Robertson and Zaragoza 2009, equation 3.15)."""
    long = 1 - _B + _B * counts.total() / mean
    return sum(
        weight * counts[word] * (_K1 + 1) / (counts[word] + _K1 * long) for word, weight in rare.items()
    )
