"""The turns of ranks that send weights to the same servers."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from megatron_gmpo.rollout.sglang.sync.turns import Turns

from ..support.ranks import RankPool

pytestmark = pytest.mark.distributed

BUCKETS = {0: 3, 2: 1, 3: 2}


def send_in_turns(failing: int | None) -> list[tuple[list[str], bool] | None]:
    """Send the buckets of two syncs from one of four ranks; ``failing`` leaves each before its last bucket.

    Returns, for each sync and on the first sender, the senders in the order of their buckets, and whether an
    error ended the sync.
    """
    turns, me = Turns(list(BUCKETS), 30.0), dist.get_rank()
    results: list[tuple[list[str], bool] | None] = []
    for _ in range(2 * turns.is_sender):
        turns.join()
        for bucket in range(BUCKETS[me]):
            last = bucket == BUCKETS[me] - 1
            if turns.is_over or (me == failing and last):
                break
            with turns.turn(last=last) as turn:
                if not turn.is_over:
                    turn.versions.add(f"{len(turn.versions)}: {me}")
        final = turns.leave()
        results.append(final and (sorted(final.versions), final.is_over))
    turns.close()
    return results


def test_senders_with_buckets_left_take_turns(ranks: RankPool) -> None:
    first, *others = ranks.run(4, send_in_turns, None)
    assert first == [(["0: 0", "1: 2", "2: 3", "3: 0", "4: 3", "5: 0"], False)] * 2
    assert others == [[], [None, None], [None, None]]


def test_an_error_of_a_sender_ends_the_turns_of_all(ranks: RankPool) -> None:
    first, *_ = ranks.run(4, send_in_turns, 3)
    assert first == [(["0: 0", "1: 2", "2: 3", "3: 0"], True)] * 2
