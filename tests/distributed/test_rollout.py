"""Ranks share the rollout work: each keeps and scores the groups that it sampled; all have the same index."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_gmpo.batch.images import ImageRef
from megatron_gmpo.batch.index import StepIndex
from megatron_gmpo.batch.samples import Prompt, Sample, SampleGroup
from megatron_gmpo.config import Config, RolloutConfig
from megatron_gmpo.data.stream import PromptStream
from megatron_gmpo.distributed import (
    Nodes,
    all_gather_objects,
    gather_bytes,
    rank,
    sum_over_group,
    world_size,
)
from megatron_gmpo.errors import InputError
from megatron_gmpo.metrics.figures import value_of
from megatron_gmpo.metrics.logger import MetricLogger
from megatron_gmpo.rollout.collect import Collector, score
from megatron_gmpo.rollout.embedded import EmbeddedEngine
from megatron_gmpo.rollout.engine import SamplingParams
from megatron_gmpo.rollout.player import make_player
from megatron_gmpo.rollout.replay import append_transcripts, load_groups, load_share, save_groups
from megatron_gmpo.testing.tiny_models import make_tiny_model
from megatron_gmpo.testing.tiny_tokenizers import text_tokenizer

from ..support.ranks import RankPool
from ..support.scripted import ScriptedEngine

pytestmark = pytest.mark.distributed

TEXTS = ["1", "07+45=", "3 - 2 + 10 = 8 + 8 - 5", "12+1="]


@pytest.fixture(scope="module")
def text_moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tiny MoE with a chat template."""
    folder = tmp_path_factory.mktemp("text_moe")
    make_tiny_model(
        folder, family="qwen3_moe", tokenizer=text_tokenizer(), num_layers=2, initializer_range=0.15
    )
    return folder


def generate(
    folder: Path, texts: list[str], sampling: SamplingParams, batch_size: int
) -> dict[int, SampleGroup]:
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
    shares = ranks.run(world_size, generate, folder, TEXTS, greedy, 3)
    assert sorted(position for share in shares for position in share) == list(range(len(TEXTS)))
    for position, group in (item for share in shares for item in share.items()):
        assert group.prompt == alone[position].prompt
        for a, b in zip(group.samples, alone[position].samples, strict=True):
            zeros = np.zeros(len(a.tokens))
            assert replace(a, rollout_logprobs=zeros) == replace(b, rollout_logprobs=zeros)
            assert a.rollout_logprobs == pytest.approx(b.rollout_logprobs, abs=2e-5)


def test_ranks_draw_samples_of_their_own(ranks: RankPool, tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model("qwen3", num_layers=2)
    sampling = SamplingParams(n=4, max_new_tokens=12)
    results = ranks.run(2, generate, folder, ["07+45="] * 2, sampling, 8)  # one prompt per rank
    assert [list(share) for share in results] == [[0], [1]]
    drawn = [tuple(s.tokens) for share in results for g in share.values() for s in g.samples]
    assert len(set(drawn)) == 8
    assert ranks.run(2, generate, folder, ["07+45="] * 2, sampling, 8) == results


def test_ranks_without_a_prompt_take_part(ranks: RankPool, tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model("qwen3", num_layers=2)
    results = ranks.run(4, generate, folder, ["07+45="], SamplingParams(n=1, max_new_tokens=4), 8)
    assert results[1:] == [{}] * 3
    assert results[0][0].samples[0].response_length > 0


def play(
    folder: Path, settings: dict[str, Any], sampling: SamplingParams, batch_size: int, experts: bool = False
) -> tuple[dict[int, SampleGroup], dict[int, SampleGroup]]:
    """Play the same episodes twice; the second engine's environments take a longer time for their answers."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    played = []
    for seconds in (0.0, 0.01):
        arguments = settings["environment_args"] | {"seconds": seconds * rank()}
        rollout = {"environment": "tests.support.games:Echo", "max_new_tokens": sampling.max_new_tokens}
        rollout |= settings | {"environment_args": arguments}
        cfg = Config.model_validate({"model": {"path": str(folder)}, "rollout": rollout})
        engine = EmbeddedEngine(
            str(folder), tokenizer, device="cpu", dtype=torch.float32, batch_size=batch_size, seed=0,
            routed_experts=experts, player=make_player(cfg, tokenizer, 2048),
        )  # fmt: skip
        with closing(engine):
            played.append(engine.generate(episode_prompts(tokenizer), sampling))
    first, second = played
    return first, second


def episode_prompts(tokenizer: Any) -> list[Prompt]:
    prompts = []
    for text in ("one", "a second one", "the third"):
        messages = [{"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        prompts.append(Prompt(text, "", messages=messages, input_ids=ids))
    return prompts


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 64), (2, 3)])
def test_the_embedded_engine_plays_episodes(
    ranks: RankPool, text_moe: Path, world_size: int, batch_size: int
) -> None:
    """Log probabilities and experts of every turn are those of a forward pass over the whole episode."""
    settings = {"max_episode_tokens": 500, "environment_args": {"turns": 4}}
    sampling = SamplingParams(n=4, max_new_tokens=12)
    results = ranks.run(world_size, play, text_moe, settings, sampling, batch_size, True)
    model = AutoModelForCausalLM.from_pretrained(text_moe, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(text_moe)
    groups: dict[int, SampleGroup] = {}
    for first, second in results:
        assert records(first) == records(second)  # whatever the environments' time
        groups |= first
    assert sorted(groups) == [0, 1, 2]
    samples = [sample for group in groups.values() for sample in group.samples]
    assert len({tuple(sample.tokens) for sample in samples}) == 12
    for sample in samples:
        assert sample.episode
        assert (sample.num_turns, sample.episode.ended) == (4, "done")
        ids = torch.from_numpy(sample.tokens).long()[None]
        with torch.no_grad():
            out = model(ids, output_router_logits=True)
        logprobs = out.logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        mask = torch.from_numpy(sample.response_mask[1:])
        torch.testing.assert_close(
            torch.from_numpy(sample.rollout_logprobs[1:])[mask], logprobs[mask], atol=2e-5, rtol=0
        )
        assert not sample.rollout_logprobs[~sample.response_mask].any()
        assert sample.routed_experts is not None
        for layer, logits in enumerate(out.router_logits):
            chosen = logits.topk(2).indices.sort().values[:-1]
            assert np.array_equal(np.sort(sample.routed_experts[:, layer]), chosen.numpy())
        # what the environment answered depends on each turn's text, and is in the tokens
        text = tokenizer.decode(sample.tokens)
        for message in sample.episode.messages[1:-1:2]:
            assert f"<|im_start|>user\n{message['content']}<|im_end|>\n<|im_start|>assistant\n" in text


def records(groups: dict[int, SampleGroup]) -> dict[int, list[Sample]]:
    """Return the samples without the time that their environments took."""
    samples: dict[int, list[Sample]] = {}
    for position, group in groups.items():
        assert all(sample.episode for sample in group.samples)
        samples[position] = [
            replace(sample, episode=sample.episode and replace(sample.episode, seconds=0.0))
            for sample in group.samples
        ]
    return samples


def test_a_failed_environment_ends_its_own_episode(ranks: RankPool, text_moe: Path) -> None:
    """Half of the seeds raise in the second turn; the sample keeps the first one."""
    settings = {"max_episode_tokens": 500, "environment_args": {"turns": 3, "fails": 0.5}}
    (first, second), *others = ranks.run(
        2, play, text_moe, settings, SamplingParams(n=8, max_new_tokens=6), 5
    )
    assert records(first) == records(second)
    samples = [s for mine, _ in ((first, second), *others) for g in mine.values() for s in g.samples]
    assert len(samples) == 24
    failed = [sample for sample in samples if sample.episode and sample.episode.ended == "error"]
    assert 0 < len(failed) < 24
    for sample in samples:
        assert sample.episode
        assert sample.num_turns == (2 if sample in failed else 3)
        assert sample.finish_reason == ("abort" if sample in failed else "stop")
        assert ("ValueError: seed" in sample.episode.error) == (sample in failed)


class ScoredBy:
    """Reward that encodes rank and sample, and counts every third response as a timeout."""

    timeouts = 100

    def __call__(self, prompt: Prompt, text: str) -> float:
        self.timeouts += int(text) % 3 == 0
        return 1000 * rank() + int(text)


def images_of(number: int) -> tuple[ImageRef, ...]:
    return tuple(ImageRef(bytes([number, i] * 8), (1, 2 + i, 300), ".png") for i in range(number % 3))


def scored(owners: list[int]) -> tuple[dict[str, Any], int]:
    samples = iter(
        Sample(
            [1] * (i + 2),
            [False, *[True] * (i + 1)],
            [0.0] * (i + 2),
            str(i),
            "length",
            i,
            images=images_of(i),
        )
        for i in range(15)
    )
    groups = [SampleGroup(Prompt(str(i), ""), [next(samples) for _ in range(3)]) for i in range(5)]
    mine = {i: group for i, group in enumerate(groups) if owners[i] == rank()}
    timeouts = score(mine, ScoredBy())
    index = vars(StepIndex.gather(mine, 5))
    index["image_rows"] = [(row["digest"].tobytes(), tuple(row["grid"])) for row in index["image_rows"]]
    return {
        name: column if name == "image_rows" else column.tolist() for name, column in index.items()
    }, timeouts


@pytest.mark.parametrize("owners", [[0] * 5, [1, 0, 1, 1, 0], [3, 3, 0, 2, 3]])
def test_each_group_is_scored_where_it_is_and_indexed_everywhere(ranks: RankPool, owners: list[int]) -> None:
    everyone = ranks.run(4, scored, owners)
    assert everyone[1:] == everyone[:1] * 3
    index, timeouts = everyone[0]
    assert timeouts == 5
    numbers = range(15)
    assert index == {
        "group": [i // 3 for i in numbers],
        "length": [i + 2 for i in numbers],
        "response_length": [i + 1 for i in numbers],
        "images": [i % 3 for i in numbers],
        "image_rows": [(image.digest, image.grid) for i in numbers for image in images_of(i)],
        "episode_length": [i + 1 for i in numbers],
        "turns": [1] * 15,
        "reward": [1000 * owners[i // 3] + i for i in numbers],
        "truncated": [True] * 15,
        "oldest_version": list(numbers),
        "version_sum": [i * (i + 1) for i in numbers],
        "owner": [owners[i // 3] for i in numbers],
        "expert_bytes": [0] * 15,
    }


def collectives() -> tuple[float, float, list[int]]:
    x = torch.tensor(float(rank() + 1), requires_grad=True)
    total = sum_over_group(x, dist.group.WORLD)
    (total * 3).backward()
    return float(total.detach()), float(x.grad), all_gather_objects(rank() * 10)


def test_collectives(ranks: RankPool) -> None:
    assert ranks.run(3, collectives) == [(6.0, 3.0, [0, 10, 20])] * 3


class Shared(ScriptedEngine):
    """A ``ScriptedEngine`` whose prompts lie with the ranks in turn."""

    def generate(self, prompts: list[Prompt], sampling: SamplingParams) -> dict[int, SampleGroup]:
        groups = super().generate(prompts, sampling)
        return {p: group for p, group in groups.items() if (p + len(self.calls)) % world_size() == rank()}


SCRIPT = {"right": "aaa", "wrong": "bb", "mixed": "ab", "mixed too": "ba", "wrong too": "bc", "mixed 3": "ba"}


def collect(mode: str) -> tuple[dict[str, Any], dict[str, float], dict[int, tuple[str, list[float]]]]:
    prompts = PromptStream([Prompt(name, "a", input_ids=[1]) for name in SCRIPT], seed=0, shuffle=False)
    cfg = RolloutConfig(
        prompts_per_step=3, samples_per_prompt=2, dynamic_sampling=mode, max_resample_rounds=3
    )
    found = Collector(Shared(SCRIPT), prompts, lambda _, text: float(text == "a"), cfg).collect()
    index = {name: column.tolist() for name, column in vars(found.index).items() if name != "owner"}
    held = {position: (group.prompt.id, group.rewards) for position, group in found.groups.items()}
    return index, {name: value_of(metric) for name, metric in found.metrics.items()}, held


@pytest.mark.parametrize("mode", ["off", "drop", "resample"])
def test_ranks_choose_the_same_groups_wherever_they_lie(ranks: RankPool, mode: str) -> None:
    """The choice, its order and the figures equal those of one process; each group is on one rank."""
    index, figures, groups = collect(mode)
    results = ranks.run(3, collect, mode)
    for result in results:
        assert result[:2] == (index, figures)
    everyone = [item for result in results for item in result[2].items()]
    assert len(everyone) == len(groups)
    assert dict(everyone) == groups


def nodes(names: list[str]) -> tuple[Any, ...]:
    found = Nodes(names[rank()], timeout_s=60)
    assert found.from_leaders(rank()) == [ranks[0] for ranks in found.ranks.values()]
    members = [group and dist.get_process_group_ranks(group) for group in (found.group, found.leaders)]
    return found.here, found.leader, found.of_rank, *members


def test_nodes(ranks: RankPool) -> None:
    """Ranks need not follow the order of the nodes; the nodes are ordered by their lowest rank."""
    assert ranks.run(4, nodes, ["b", "a", "b", "a"]) == [
        (0, 0, [0, 1, 0, 1], [0, 2], [0, 1]),
        (1, 1, [0, 1, 0, 1], [1, 3], [0, 1]),
        (0, 0, [0, 1, 0, 1], [0, 2], None),
        (1, 1, [0, 1, 0, 1], [1, 3], None),
    ]
    assert ranks.run(2, nodes, ["x", "x"]) == [(0, 0, [0, 0], [0, 1], [0]), (0, 0, [0, 0], [0, 1], None)]


def write_everything(folder: Path) -> dict[str, float]:
    sample = Sample([1, 2], [False, True], [0.0, -1.0], str(rank()), "stop", 0)
    groups = {2 - rank(): SampleGroup(Prompt("p", ""), [sample])}
    logger = MetricLogger(folder)
    figures = logger.log(1, {"loss": float(world_size())})
    logger.event("done")
    logger.close()
    save_groups(folder, 0, groups)
    append_transcripts(folder / "transcripts.jsonl", 1, groups, limit=2)
    return figures


def test_rank_0_writes_figures_and_transcripts_and_each_rank_its_groups(
    ranks: RankPool, tmp_path: Path
) -> None:
    assert ranks.run(3, write_everything, tmp_path) == [{"loss": 3.0}] * 3
    for name in ("metrics.jsonl", "events.jsonl", *(f"step_000000/rank_0000{r}.jsonl" for r in range(3))):
        assert len((tmp_path / name).read_text().splitlines()) == 1, name
    assert [g.samples[0].text for g in load_groups(tmp_path, 0, 10)] == ["2", "1", "0"]
    lines = map(json.loads, (tmp_path / "transcripts.jsonl").read_text().splitlines())
    assert [line["samples"][0]["text"] for line in lines] == ["2", "1"]
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1


def save_twice(folder: Path, owners: list[int]) -> None:
    for text in ("old", "new"):
        groups = {
            position: SampleGroup(
                Prompt(f"{position}", ""),
                [Sample([1, 2], [False, True], [0.0, -1.0], f"{text} {i}", "stop", 0) for i in range(3)],
            )
            for position, owner in enumerate(owners)
            if owner == rank()
        }
        save_groups(folder, 7, groups)


def read_share(folder: Path) -> dict[int, list[str]]:
    return {p: [group.prompt.id, group.samples[2].text] for p, group in load_share(folder, 7, 10).items()}


@pytest.mark.parametrize("readers", [1, 2, 4])
def test_groups_saved_by_many_ranks_are_replayed_on_another_number(
    ranks: RankPool, tmp_path: Path, readers: int
) -> None:
    """Rank 2 saves no group, and the second save replaces the first."""
    owners = [3, 0, 1, 0, 3, 3, 1]
    ranks.run(4, save_twice, tmp_path, owners)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_000007"]
    shares = ranks.run(readers, read_share, tmp_path)
    for reader, share in enumerate(shares):
        assert share == {p: [str(p), "new 2"] for p in range(reader, len(owners), readers)}


def refused(folder: Path) -> str:
    with pytest.raises(InputError) as error:
        load_share(folder, 7, 10)
    return str(error.value)


def test_a_broken_line_in_the_share_of_one_rank_is_refused_on_all(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(2, save_twice, tmp_path, [0, 1])
    shard = tmp_path / "step_000007" / "rank_00001.jsonl"
    shard.write_text(shard.read_text()[:100])
    first, second = ranks.run(2, refused, tmp_path)
    assert first == second
    assert first.startswith(f"rollout.replay_path: line 1 of {shard} is broken")


def gathered() -> list[int]:
    return [len(data) for data in gather_bytes(b"x" * (rank() % 3 * 1000))]


def test_bytes_are_gathered_on_rank_0(ranks: RankPool) -> None:
    assert ranks.run(4, gathered) == [[0, 1000, 2000, 0], [], [], []]
