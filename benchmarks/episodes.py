"""Measure what an episode costs the client, with an environment and servers that cost little."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from benchmarks.echo import TURNS
from benchmarks.served import CONCURRENT, served_client
from megatron_gmpo.batch.samples import Prompt, Sample
from megatron_gmpo.config import Config, SGLangConfig
from megatron_gmpo.rollout.ending import Ending
from megatron_gmpo.rollout.engine import SamplingParams
from megatron_gmpo.rollout.player import Player, make_player
from megatron_gmpo.rollout.sglang.client import RolloutClient
from megatron_gmpo.testing.tiny_tokenizers import text_tokenizer
from tests.support.fake_sglang import Answer, FakeServer, answer_of

NEW_TOKENS = 64
"""Tokens of a turn."""
ANSWER_S = 0.2
"""Time in which the scripted server answers."""
LIMIT = 0.05


def measure_episodes(folder: Path) -> None:
    """Print the client's share of the time with a real server, and its time with a scripted one."""
    tokenizer = text_tokenizer()
    limits = {"max_new_tokens": NEW_TOKENS, "max_episode_tokens": 1500}
    rollout = {"environment": "benchmarks.echo:Echo"} | limits
    cfg = Config.model_validate({"model": {"path": str(folder / "model")}, "rollout": rollout})
    player = make_player(cfg, tokenizer, positions=2048)
    assert player
    with closing(player):
        player.start()
        with scripted_client() as client:
            scripted, _, turns = measured(client, player, tokenizer)
        with served_client(folder, tokenizer) as client:
            in_client, total, turns = measured(client, player, tokenizer)
    print(f"{turns / total:.0f} turns/s; the client takes {in_client:.2f} CPU seconds of {total:.1f} s")
    share = in_client / total
    result = {
        "benchmark": "episodes",
        "share": round(share, 4),
        "milliseconds_per_turn": round(1e3 * in_client / turns, 3),
        "milliseconds_per_turn_scripted": round(1e3 * scripted / turns, 3),
        "within_limit": share < LIMIT,
    }
    print(json.dumps(result))


def measured(client: RolloutClient, player: Player, tokenizer: Any) -> tuple[float, float, int]:
    """Play episodes; return CPU seconds of the client's thread, wall seconds and turns."""
    prompts = [prompt_of(tokenizer, number) for number in range(2 * CONCURRENT)]
    sampling, ending = SamplingParams(max_new_tokens=NEW_TOKENS), Ending(tokenizer, set())
    # Warm up the server, the connections and the environments' processes.
    client.play("warm up", prompts[:CONCURRENT], sampling, ending, player).result(600)
    start, in_client = time.perf_counter(), client.cpu_seconds()
    played = client.play("measured", prompts, sampling, ending, player).result(1800).values()
    total, in_client = time.perf_counter() - start, client.cpu_seconds() - in_client
    episodes: list[Sample] = [sample for samples in played for sample in samples]
    turns = sum(sample.num_turns for sample in episodes)
    assert turns == TURNS * len(prompts)
    return in_client, total, turns


def prompt_of(tokenizer: Any, number: int) -> Prompt:
    messages = [{"role": "user", "content": f"Task {number}."}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    return Prompt(str(number), "", messages=messages, input_ids=ids)


@contextmanager
def scripted_client() -> Iterator[RolloutClient]:
    """Yield a client of a server that computes nothing."""
    fake = FakeServer()
    fake.start()
    fake.generate = partial(answer_later, fake)
    cfg = SGLangConfig(max_concurrent_requests=CONCURRENT)
    client = RolloutClient([fake.server], None, cfg, "scripted", dist.HashStore())
    try:
        client.expect(0)
        while not client.standing().outdated:
            time.sleep(0.1)  # interval of the question whether the client has found the server
        client.start_sync([fake.server])
        fake.weight_version = "scripted-0"
        client.synced([fake.server], [])
        yield client
    finally:
        client.close()
        fake.close()


async def answer_later(fake: FakeServer, body: dict[str, Any]) -> Answer:
    await asyncio.sleep(ANSWER_S)
    return answer_of(body, fake.weight_version, tokens=list(range(50, 50 + NEW_TOKENS)))
