"""Ranks share the rollout work: each response and reward is computed once, and every rank receives all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from transformers import AutoTokenizer

from megatron_gmpo.batch.samples import Prompt, Sample, SampleGroup
from megatron_gmpo.distributed import all_gather_objects, rank, sum_over_group, world_size
from megatron_gmpo.metrics.logger import MetricLogger
from megatron_gmpo.rollout.collect import score
from megatron_gmpo.rollout.embedded import EmbeddedEngine
from megatron_gmpo.rollout.engine import SamplingParams
from megatron_gmpo.rollout.replay import append_transcripts, save_groups

from ..support.ranks import RankPool

pytestmark = pytest.mark.distributed

TEXTS = ["1", "07+45=", "3 - 2 + 10 = 8 + 8 - 5", "12+1="]


def generate(folder: Path, texts: list[str], sampling: SamplingParams, batch_size: int) -> list[SampleGroup]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    engine = EmbeddedEngine(
        str(folder), tokenizer, device="cpu", dtype=torch.float32, batch_size=batch_size, seed=0
    )
    return engine.generate(
        [Prompt(text, answer="", input_ids=tokenizer(text)["input_ids"]) for text in texts], sampling
    )


@pytest.mark.parametrize("world_size", [2, 3])
def test_greedy_answers_are_those_of_one_process(
    ranks: RankPool, world_size: int, tiny_model: Callable[..., Path]
) -> None:
    folder = tiny_model("qwen3_moe", num_layers=2, initializer_range=0.15)
    greedy = SamplingParams(n=2, max_new_tokens=8, temperature=0)
    alone = generate(folder, TEXTS, greedy, batch_size=64)
    for groups in ranks.run(world_size, generate, folder, TEXTS, greedy, 3):
        assert [g.prompt for g in groups] == [g.prompt for g in alone]
        for a, b in zip(
            (s for g in groups for s in g.samples), (s for g in alone for s in g.samples), strict=True
        ):
            zeros = np.zeros(len(a.tokens))
            assert replace(a, rollout_logprobs=zeros) == replace(b, rollout_logprobs=zeros)
            assert a.rollout_logprobs == pytest.approx(b.rollout_logprobs, abs=2e-5)


def test_ranks_hold_the_same_samples_and_draw_their_own(
    ranks: RankPool, tiny_model: Callable[..., Path]
) -> None:
    folder = tiny_model("qwen3", num_layers=2)
    sampling = SamplingParams(n=4, max_new_tokens=12)
    results = ranks.run(4, generate, folder, ["07+45="], sampling, 8)  # one response per rank
    assert results[1:] == results[:1] * 3
    assert len({tuple(s.tokens) for s in results[0][0].samples}) == 4
    assert ranks.run(4, generate, folder, ["07+45="], sampling, 8) == results


def test_ranks_without_a_response_take_part(ranks: RankPool, tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model("qwen3", num_layers=2)
    results = ranks.run(4, generate, folder, ["07+45="], SamplingParams(n=1, max_new_tokens=4), 8)
    assert results[1:] == results[:1] * 3
    assert results[0][0].samples[0].response_length > 0


class ScoredBy:
    """Reward that encodes rank and sample, and counts every third response as a timeout."""

    timeouts = 100

    def __call__(self, prompt: Prompt, text: str) -> float:
        self.timeouts += int(text) % 3 == 0
        return 1000 * rank() + int(text)


def scored() -> tuple[list[list[float]], int]:
    samples = iter(Sample([1, 2], [False, True], [0.0, -1.0], str(i), "stop", 0) for i in range(15))
    groups = [SampleGroup(Prompt(str(i), ""), [next(samples) for _ in range(3)]) for i in range(5)]
    timeouts = score(groups, ScoredBy())
    return [g.rewards for g in groups], timeouts


@pytest.mark.parametrize("world_size", [2, 4])
def test_each_group_is_scored_once_and_known_everywhere(ranks: RankPool, world_size: int) -> None:
    rewards = [[1000 * (i % world_size) + 3 * i + j for j in range(3)] for i in range(5)]
    assert ranks.run(world_size, scored) == [(rewards, 5)] * world_size


def collectives() -> tuple[float, float, list[int]]:
    x = torch.tensor(float(rank() + 1), requires_grad=True)
    total = sum_over_group(x, dist.group.WORLD)
    (total * 3).backward()
    return float(total.detach()), float(x.grad), all_gather_objects(rank() * 10)


def test_collectives(ranks: RankPool) -> None:
    assert ranks.run(3, collectives) == [(6.0, 3.0, [0, 10, 20])] * 3


def write_everything(folder: Path) -> dict[str, float]:
    group = SampleGroup(Prompt("p", ""), [Sample([1, 2], [False, True], [0.0, -1.0], str(rank()), "stop", 0)])
    logger = MetricLogger(folder)
    figures = logger.log(1, {"loss": float(world_size())})
    logger.event("done")
    logger.close()
    save_groups(folder, 0, [group])
    append_transcripts(folder / "transcripts.jsonl", 1, [group], limit=1)
    return figures


def test_the_first_rank_alone_writes(ranks: RankPool, tmp_path: Path) -> None:
    assert ranks.run(3, write_everything, tmp_path) == [{"loss": 3.0}] * 3
    for name in ("metrics.jsonl", "events.jsonl", "step_000000.jsonl", "transcripts.jsonl"):
        assert len((tmp_path / name).read_text().splitlines()) == 1, name
    assert '"text": "0"' in (tmp_path / "step_000000.jsonl").read_text()
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1
