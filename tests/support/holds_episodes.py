"""Play episodes that do not end, to be killed: ``python -m tests.support.holds_episodes``.

Prints the ids of the processes that must end with this one. A fork of this process keeps its sockets open,
and is not among them.
"""

from __future__ import annotations

import asyncio
import os
import time

import psutil

from megatron_gmpo.batch.samples import Prompt
from megatron_gmpo.config import RolloutConfig
from megatron_gmpo.rollout.environments.pool import EnvironmentPool

HELD = ("hangs", "hangs_in_c", "hangs_with_a_child")


async def main() -> None:
    pool = EnvironmentPool(RolloutConfig(environment="tests.support.environments:Obedient"), seed=0)
    sessions = [await pool.open(Prompt("p", ""), number, 0) for number in range(len(HELD) + 2)]
    for session in sessions:
        await session.reset()
    await sessions.pop().close()  # an idle process
    waiting = sessions.pop()
    calls = [
        asyncio.create_task(session.step(action)) for session, action in zip(sessions, HELD, strict=True)
    ]
    processes: list[psutil.Process] = []
    async with asyncio.timeout(60):
        while len(processes) < 1 + len(HELD) + 2 + 1:  # fork server, workers, the child of one
            await asyncio.sleep(0.05)
            processes = psutil.Process().children(recursive=True)
    fork = os.fork()
    if fork == 0:
        time.sleep(600)  # this copy of the trainer keeps the sockets open
    print(fork, *(process.pid for process in processes), flush=True)
    await asyncio.gather(*calls)
    await waiting.close()


if __name__ == "__main__":
    asyncio.run(main())
