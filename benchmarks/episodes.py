"""Measure what an episode costs the client, with an environment and a server that cost little."""

from __future__ import annotations

import json
import time
from contextlib import closing
from pathlib import Path
from typing import Any

from benchmarks.echo import TURNS
from benchmarks.served import CONCURRENT, served_client
from megatron_gmpo.batch.samples import Prompt, Sample
from megatron_gmpo.config import Config
from megatron_gmpo.rollout.ending import Ending
from megatron_gmpo.rollout.engine import SamplingParams
from megatron_gmpo.rollout.player import make_player
from megatron_gmpo.testing.tiny_tokenizers import text_tokenizer

NEW_TOKENS = 64
"""Tokens of a turn."""
LIMIT = 0.05


def measure_episodes(folder: Path) -> None:
    tokenizer = text_tokenizer()
    rollout = {
        "environment": "benchmarks.echo:Echo",
        "max_new_tokens": NEW_TOKENS,
        "max_episode_tokens": 1500,
    }
    cfg = Config.model_validate({"model": {"path": str(folder / "model")}, "rollout": rollout})
    player = make_player(cfg, tokenizer, positions=2048)
    assert player
    prompts = [prompt_of(tokenizer, number) for number in range(2 * CONCURRENT)]
    sampling, ending = SamplingParams(max_new_tokens=NEW_TOKENS), Ending(tokenizer, set())
    with closing(player), served_client(folder, tokenizer) as client:
        player.start()
        # Warm up the server, the connections and the environments' processes.
        client.play("warm up", prompts[:CONCURRENT], sampling, ending, player).result(600)
        start, in_client = time.perf_counter(), client.cpu_seconds()
        played = client.play("measured", prompts, sampling, ending, player).result(1800).values()
        total, in_client = time.perf_counter() - start, client.cpu_seconds() - in_client
    episodes: list[Sample] = [sample for samples in played for sample in samples]
    turns = sum(sample.num_turns for sample in episodes)
    assert turns == TURNS * len(prompts)
    print(
        f"{len(prompts)} episodes of {TURNS} turns, {CONCURRENT} at a time: {turns / total:.0f} turns/s; "
        f"the client takes {in_client:.2f} CPU seconds of {total:.1f} s"
    )
    share = in_client / total
    result = {
        "benchmark": "episodes",
        "share": round(share, 4),
        "milliseconds_per_turn": round(1e3 * in_client / turns, 3),
        "environment_milliseconds_per_turn": round(1e3 * sum(map(seconds_of, episodes)) / turns, 3),
        "within_limit": share < LIMIT,
    }
    print(json.dumps(result))


def prompt_of(tokenizer: Any, number: int) -> Prompt:
    messages = [{"role": "user", "content": f"Task {number}."}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    return Prompt(str(number), "", messages=messages, input_ids=ids)


def seconds_of(sample: Sample) -> float:
    assert sample.episode
    return sample.episode.seconds
