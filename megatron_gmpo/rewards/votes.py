"""Majority votes: which of several responses to a problem give the same answer."""

from __future__ import annotations

from collections.abc import Sequence

from ..batch.samples import SampleGroup
from . import Reward


def votes(reward: Reward, group: SampleGroup, passed: Sequence[bool]) -> list[list[int]]:
    """Return the samples of a group by answer, as positions in the group, in the order of first appearance.

    A reward with ``final_answer(response) -> str | None`` and ``same_answer(answer, response) -> bool``, like
    ``MathReward``, decides what is an answer and what equals it. Responses without an answer do not vote. For
    other rewards the whole text is the answer.

    Args:
        passed: whether each sample passed. Right answers of a reward with ``same_answer`` are equal to each
            other, and different from wrong ones, so only wrong ones are compared.
    """
    answer_of = getattr(reward, "final_answer", str.strip)
    same = getattr(reward, "same_answer", None)
    answers = [answer_of(sample.text) for sample in group.samples]

    def equal(one: int, other: int) -> bool:
        if answers[one] == answers[other]:
            return True
        if same is None or passed[one] or passed[other]:
            return same is not None and passed[one] and passed[other]
        return same(answers[one], group.samples[other].text)

    found: list[list[int]] = []
    for number, answer in enumerate(answers):
        if answer:
            like = next((members for members in found if equal(members[0], number)), None)
            if like is None:
                found.append([number])
            else:
                like.append(number)
    return found


def majority(found: Sequence[Sequence[int]], k: int) -> int | None:
    """Return the sample that stands for the most frequent answer of the first ``k`` samples, or None.

    If several answers are equally frequent, the first of them is chosen.

    Args:
        found: the result of ``votes``.
    """
    counts = [sum(number < k for number in members) for members in found]
    most = max(counts, default=0)
    return found[counts.index(most)][0] if most else None
