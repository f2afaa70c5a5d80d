"""Clients draw each prompt of a batch once, and agree on when it is finished and on what ends the run."""

from __future__ import annotations

import random
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch.distributed as dist

from megatron_gmpo.errors import InputError, RunError, ServerError
from megatron_gmpo.rollout.sglang.agreement import Agreed, News, agree
from megatron_gmpo.rollout.sglang.prompt_queue import PromptQueue
from megatron_gmpo.rollout.sglang.servers import Server
from megatron_gmpo.rollout.sglang.watcher import Standing


@pytest.mark.slow
@pytest.mark.parametrize("size", [0, 1, 7, 200])
def test_each_position_is_finished_once(size: int) -> None:
    """Eight clients at once, each of which gives back a third of what it draws."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def client(seed: int) -> list[int]:
        store: Any = server.clone()  # pyright: ignore[reportAttributeAccessIssue]
        queue, drawn, choice = PromptQueue(store, "batch", size), list[int](), random.Random(seed)
        while not queue.finish():
            positions = queue.draw(choice.randrange(1, 6))
            returned = [position for position in positions if choice.random() < 1 / 3]
            queue.give_back(returned)
            drawn += (kept := [position for position in positions if position not in returned])
            queue.finish(len(kept))
        return drawn

    with ThreadPoolExecutor(8) as threads:
        drawn = list(threads.map(client, range(8)))
    assert sorted(position for each in drawn for position in each) == list(range(size))
    queue = PromptQueue(server, "batch", size)
    assert queue.draw(5) == []
    assert queue.finish()
    before = server.num_keys()
    queue.delete()
    assert server.num_keys() == before - (1 if size == 0 else 2)


A, B = Server("http://a:1"), Server("http://b:1")


def standing(*outdated: Server, ready: bool = False, starting: bool = False, lost: str = "") -> Standing:
    return Standing(outdated, ready, starting, lost)


@pytest.mark.parametrize(
    ("everyone", "found"),
    [
        ([News(standing(ready=True))], Agreed(False, True, [])),
        ([News(standing(A)), News(standing(B))], Agreed(False, False, [A, B])),
        # the first sync waits for all servers of the run's own
        ([News(standing(A)), News(standing(starting=True))], Agreed(False, False, [])),
        # a node without a server, and one whose servers are lost, do not matter while another has one
        ([News(None), News(standing(B, ready=True))], Agreed(False, True, [B])),
        ([News(standing(lost="gone")), News(standing(ready=True))], Agreed(False, True, [])),
        # a client that knows that the batch is finished knows it of all nodes
        ([News(standing(ready=True)), News(standing(), sampled=True)], Agreed(True, True, [])),
    ],
)
def test_what_all_ranks_know_after_a_round(everyone: list[News], found: Agreed) -> None:
    assert agree(everyone) == found


@pytest.mark.parametrize(
    ("everyone", "error"),
    [
        ([News(standing(ready=True)), News(error=InputError("no"))], InputError("no")),
        ([News(error=ServerError("first")), News(error=InputError("second"))], ServerError("first")),
        ([News(standing(lost="gone"))], ServerError("gone")),
        ([News(None), News(standing(lost="gone"))], ServerError("gone")),
        (
            [News(standing(lost="gone")), News(standing(lost="also gone")), News(None)],
            ServerError("gone; none is left on 1 other nodes either"),
        ),
    ],
)
def test_what_ends_the_run(everyone: list[News], error: RunError) -> None:
    with pytest.raises(type(error), match=f"^{re.escape(str(error))}$"):
        agree(everyone)
