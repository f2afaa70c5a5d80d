"""The SGLang rollout engine on real servers: samples, the weights that made them, and fault tolerance."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from megatron_gmpo.batch.samples import Prompt, Sample
from megatron_gmpo.config import Config
from megatron_gmpo.distributed import Nodes
from megatron_gmpo.errors import ServerError
from megatron_gmpo.metrics.figures import value_of
from megatron_gmpo.rollout.engine import SamplingParams
from megatron_gmpo.rollout.episode import EpisodeLimits
from megatron_gmpo.rollout.player import Player
from megatron_gmpo.rollout.replay import load_groups
from megatron_gmpo.rollout.sglang.engine import SGLangEngine
from megatron_gmpo.rollout.sglang.processes import LocalServers
from megatron_gmpo.rollout.sglang.sampler import Sampler
from megatron_gmpo.rollout.sglang.server_state import ServerState
from megatron_gmpo.rollout.sglang.start import start_sglang
from megatron_gmpo.rollout.sglang.sync import make_weight_sync
from megatron_gmpo.supervision.records import node_name
from megatron_gmpo.testing.arithmetic import write_addition_problems

from ..support import conversion_cases
from ..support.commands import CONFIG, ROOT, error_lines, json_lines, options, run_module
from ..support.games import DigitTemplate
from ..support.groups import in_order
from ..support.ranks import RankPool
from ..support.sglang_servers import CPU, LONG, PYTHON, needs_sglang, process_group, wait_for, wait_until_gone

pytestmark = [needs_sglang, pytest.mark.slow, pytest.mark.timeout(1200)]

PROMPTS = [Prompt(str(i), "", input_ids=[5, 6, 7, 8 + i]) for i in range(4)]
Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def weights(sglang_model: Path) -> list[Weights]:
    """Return three sets of weights for the served model: the folder's, and two with different answers."""
    first = load_file(sglang_model / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    return [first] + [
        {name: t + 0.3 * t.std() * torch.randn(t.shape, generator=generator) for name, t in first.items()}
        for _ in range(2)
    ]


@pytest.fixture(scope="module")
def models(sglang_model: Path, weights: list[Weights], tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Return a transformers model for each set of weights, with its source in the attribute ``folder``."""
    made = []
    for each in weights:
        folder = tmp_path_factory.mktemp("weights")
        AutoConfig.from_pretrained(sglang_model).save_pretrained(folder)
        save_file(each, folder / "model.safetensors", {"format": "pt"})
        made.append(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).requires_grad_(False))
        made[-1].folder = folder
    return made


def config(model: Path, run_dir: Path, **sections: dict[str, Any]) -> Config:
    rollout = {"engine": "sglang"} | sections.pop("rollout", {})
    sglang = {"python": str(PYTHON), "health_interval_s": 1.0, "start_timeout_s": 400.0} | sections.pop(
        "sglang", {}
    )
    model_table = {"path": str(model), "dtype": "fp32"}
    return Config.model_validate(
        dict(run_dir=str(run_dir), model=model_table, rollout=rollout, sglang=sglang, **sections)
    )


@pytest.fixture
def engine(
    sglang_server: LocalServers, sglang_model: Path, tmp_path: Path
) -> Iterator[Callable[..., SGLangEngine]]:
    """Return a function that makes an engine on the running server, which the engine treats as external."""
    made: list[SGLangEngine] = []
    tokenizer = AutoTokenizer.from_pretrained(sglang_model)

    def make(routed_experts: tuple[int, int] | None = None, **sections: dict[str, Any]) -> SGLangEngine:
        cfg = config(sglang_model, tmp_path, **sections)
        player = player_of(cfg, tokenizer) if cfg.rollout.has_episodes else None
        sync = make_weight_sync(cfg.weight_sync, "disaggregated", CPU, tmp_path)
        nodes = Nodes(node_name())
        made.append(
            SGLangEngine(cfg, sglang_server.servers, None, sync, tokenizer, nodes, routed_experts, player)
        )
        return made[-1]

    yield make
    for one in made:
        one.close()


def samples(engine: SGLangEngine, prompts: list[Prompt] = PROMPTS, **sampling: Any) -> list[Sample]:
    groups = in_order(engine.generate(prompts, SamplingParams(**sampling)))
    assert [g.prompt for g in groups] == prompts
    return [s for g in groups for s in g.samples]


def assert_made_by(sample: Sample, models: list[Any], prompt_length: int = 4) -> None:
    """Check that each token's log probability is that of the model whose version the token carries."""
    assert sample.version_spans is not None
    assert sample.token_versions[:prompt_length].tolist() == [-1] * prompt_length
    assert sample.response_mask.tolist() == [False] * prompt_length + [True] * (
        len(sample.tokens) - prompt_length
    )
    expected = [
        model(torch.from_numpy(sample.tokens).long()[None]).logits[0].log_softmax(-1) for model in models
    ]
    places = range(prompt_length, len(sample.tokens))
    wanted = [float(expected[sample.token_versions[t]][t - 1, sample.tokens[t]]) for t in places]
    assert_close(
        torch.tensor(sample.rollout_logprobs[prompt_length:]), torch.tensor(wanted), atol=1e-4, rtol=0
    )


def test_samples_are_what_transformers_says(
    engine: Callable[..., SGLangEngine], weights: list[Weights], models: list[Any]
) -> None:
    served = engine()
    served.update_weights(weights[0].items(), 0)
    drawn = samples(served, n=4, max_new_tokens=9)
    assert len(drawn) == 16
    for sample in drawn:
        assert_made_by(sample, models)
        assert (sample.policy_version, sample.finish_reason) == (
            0,
            "stop" if sample.tokens[-1] == served._tokenizer.eos_token_id else "length",
        )
        assert sample.response_length <= 9
    assert len({tuple(s.tokens) for s in drawn}) > 12  # the samples differ
    greedy = samples(served, PROMPTS[:1], n=1, max_new_tokens=5, temperature=0)[0]
    for t in range(4, len(greedy.tokens)):
        assert greedy.tokens[t] == int(
            models[0](torch.from_numpy(greedy.tokens[:t]).long()[None]).logits[0, -1].argmax()
        )


def test_temperature_but_no_truncation_is_in_the_logprobs_and_a_stop_string_ends(
    engine: Callable[..., SGLangEngine], weights: list[Weights], models: list[Any]
) -> None:
    served = engine()
    served.update_weights(weights[0].items(), 0)
    for truncation in ({}, {"top_p": 0.6}, {"top_k": 3}):  # which does not renormalise them
        (hot,) = samples(served, PROMPTS[:1], max_new_tokens=20, temperature=2.0, **truncation)
        logprobs = (models[0](torch.from_numpy(hot.tokens).long()[None]).logits[0] / 2).log_softmax(-1)
        wanted = [float(logprobs[t - 1, hot.tokens[t]]) for t in range(4, len(hot.tokens))]
        assert_close(torch.tensor(hot.rollout_logprobs[4:]), torch.tensor(wanted), atol=1e-4, rtol=0)
    stopped = [
        s
        for s in samples(served, n=8, max_new_tokens=60, stop=("7",))
        if "7" in served._tokenizer.decode(s.tokens[4:])
    ]
    assert stopped
    for sample in stopped:
        assert sample.finish_reason == "stop"
        assert "7" not in sample.text
        assert served._tokenizer.decode(sample.tokens[-1:]) == "7"


def test_routed_experts_are_aligned_with_the_tokens(
    engine: Callable[..., SGLangEngine], weights: list[Weights], models: list[Any], sglang_model: Path
) -> None:
    """Records are also aligned when a prompt is found in the prefix cache."""
    hf = AutoConfig.from_pretrained(sglang_model)
    served = engine(routed_experts=(hf.num_hidden_layers, hf.num_experts_per_tok))
    served.update_weights(weights[0].items(), 0)
    for sample in [*samples(served, n=2, max_new_tokens=12), *samples(served, n=2, max_new_tokens=12)]:
        router_logits = models[0](
            torch.from_numpy(sample.tokens).long()[None], output_router_logits=True
        ).router_logits
        assert sample.routed_experts is not None
        assert sample.routed_experts.shape == (
            len(sample.tokens) - 1,
            hf.num_hidden_layers,
            hf.num_experts_per_tok,
        )
        for layer, logits in enumerate(router_logits):
            chosen = logits.topk(hf.num_experts_per_tok).indices.sort().values[:-1]
            assert np.array_equal(np.sort(sample.routed_experts[:, layer]), chosen.numpy())


def test_a_converted_folder_is_served(
    ranks: RankPool,
    engine: Callable[..., SGLangEngine],
    sglang_server: LocalServers,
    weights: list[Weights],
    models: list[Any],
    tmp_path: Path,
) -> None:
    """A server reads a folder that was converted from Hugging Face to Megatron and back."""
    source = tmp_path / "source"
    shutil.copytree(models[1].folder, source)
    ranks.run(2, conversion_cases.to_megatron, source, tmp_path / "megatron")
    ranks.run(2, conversion_cases.to_hf, tmp_path / "megatron", tmp_path / "back", None, None, 100_000)
    served = engine()
    served.update_weights(weights[0].items(), 1)
    server, version = sglang_server.servers[0], f"{served._nonce}-1"
    body = {"model_path": str(tmp_path / "back"), "weight_version": version}
    reply = httpx.post(
        f"{server.url}/update_weights_from_disk", json=body, headers=server.admin_headers, timeout=120
    )
    assert reply.status_code == 200, reply.text
    for sample in samples(served, n=2, max_new_tokens=8):
        assert_made_by(sample, models)


def running(served: SGLangEngine) -> int:
    """Return the number of requests for which the server has sampled tokens and samples more."""
    assert served._client
    server = served._client._watcher.members[0].server
    loads = httpx.get(f"{server.url}/v1/loads", headers=server.headers, timeout=30).json()["loads"]
    return sum(load["num_running_reqs"] for load in loads)


def wait_for_running(served: SGLangEngine, ticket: Any) -> None:
    """Wait until the server generates all responses of ``ticket``."""
    wait_for(lambda: running(served) == len(ticket.prompts) * ticket.sampling.n)


def during(served: SGLangEngine, weights: Weights, version: int, ticket: Any) -> list[Sample]:
    """Sync while the responses of ``ticket`` are generated; each already has at least one token."""
    wait_for_running(served, ticket)
    assert not ticket.future.done()
    served.update_weights(weights.items(), version)
    return [s for g in in_order(served.wait(ticket)) for s in g.samples]


@pytest.mark.parametrize("in_flight", ["retract", "abort"])
def test_a_sync_lets_unfinished_responses_go_on_with_the_new_weights(
    engine: Callable[..., SGLangEngine], weights: list[Weights], models: list[Any], in_flight: str
) -> None:
    served = engine(weight_sync={"in_flight": in_flight})
    served._end_ids = set()  # makes the responses long
    served.update_weights(weights[0].items(), 0)
    ticket = served.submit(PROMPTS[:2], SamplingParams(n=2, max_new_tokens=LONG))
    drawn = during(served, weights[1], 1, ticket)
    assert len(drawn) == 4
    for sample in drawn:
        assert_made_by(sample, models)
        assert sample.policy_version == 0
        assert (np.diff(sample.token_versions[4:]) >= 0).all()
        assert {0, 1} <= set(sample.token_versions[4:].tolist())
        assert sample.response_length == LONG


def test_a_sync_in_place_keeps_the_cache(engine: Callable[..., SGLangEngine], weights: list[Weights]) -> None:
    served = engine(weight_sync={"in_flight": "in_place"})
    served._end_ids = set()
    served.update_weights(weights[0].items(), 0)
    for sample in during(
        served, weights[1], 1, served.submit(PROMPTS[:2], SamplingParams(n=1, max_new_tokens=LONG))
    ):
        assert {0, 1} <= set(sample.token_versions[4:].tolist())
        assert sample.response_length == LONG
    served.update_weights(weights[0].items(), 2)  # later tests must not find a cache of other weights


def assert_ends_where_it_should(sample: Sample, served: SGLangEngine, stop: tuple[str, ...]) -> None:
    """Check each prefix of the response: none but the whole ends with an end token or has a stop string."""
    response = sample.tokens[4:].tolist()
    texts = [served._tokenizer.decode(response[:length]) for length in range(1, len(response) + 1)]
    ended = [
        token in served._end_ids or any(string in text for string in stop)
        for token, text in zip(response, texts, strict=True)
    ]
    assert not any(ended[:-1])
    assert sample.finish_reason == ("stop" if ended[-1] else "length")
    assert len(sample.rollout_logprobs) == len(sample.tokens)


@pytest.mark.parametrize("interruption", ["retract", "in_place", "abort", "request_timeout_s"])
def test_forty_syncs_change_no_text_and_no_response_runs_past_its_end(
    engine: Callable[..., SGLangEngine],
    weights: list[Weights],
    sglang_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    interruption: str,
) -> None:
    """The weights stay the same, so that greedy responses are those of a server without interruptions.

    The sampled responses have 8 tokens on average, so that many are interrupted at their end. Every response
    has a complete record of its experts, or the engine raises an error.
    """
    # syncs follow each other faster than a short answer ends; the default interval would miss most answers
    monkeypatch.setattr("megatron_gmpo.rollout.sglang.agreement._POLL_S", 0.005)
    # a loaded machine may not sample a token within the short timeout
    monkeypatch.setattr("megatron_gmpo.rollout.sglang.sampler.ATTEMPTS", 1000)
    prompts = [Prompt(str(i), "", input_ids=[2 + i // 8, 2 + i % 8, 5, 6]) for i in range(64)]
    stop = ("15+", "<pad>", "66")
    sampling = {"n": 1, "max_new_tokens": 40, "stop": stop}
    calm = engine()
    calm._end_ids = {1, 14}
    calm.update_weights(weights[0].items(), 0)
    expected = [(s.text, s.finish_reason) for s in samples(calm, prompts, temperature=0, **sampling)]
    assert {reason for _, reason in expected} == {"stop", "length"}

    timeout = interruption == "request_timeout_s"
    hf = AutoConfig.from_pretrained(sglang_model)
    served = engine(
        routed_experts=(hf.num_hidden_layers, hf.num_experts_per_tok),
        weight_sync={"route": "tensor", "in_flight": "retract" if timeout else interruption},
        sglang={"request_timeout_s": 0.02} if timeout else {},
    )
    served._end_ids = calm._end_ids
    served.update_weights(weights[0].items(), 0)
    served.take_metrics()
    interrupted = 0
    while served.version < 40:
        temperature = served.version % 2
        ticket = served.submit(prompts, SamplingParams(temperature=temperature, **sampling))
        assert ticket.future
        while not ticket.future.done() and served.version < 40:
            if running(served):
                served.update_weights(weights[0].items(), served.version + 1)
        drawn = [s for g in in_order(served.wait(ticket)) for s in g.samples]
        for sample in drawn:
            assert_ends_where_it_should(sample, served, stop)
        if temperature == 0:
            assert [(s.text, s.finish_reason) for s in drawn] == expected
        interrupted += sum(len(np.unique(s.token_versions[4:])) > 1 for s in drawn)
    retries = value_of(served.take_metrics()["rollout/retries"])
    assert interrupted > 20
    assert retries > 20 if timeout else retries == 0  # a sync needs none


def test_a_new_request_after_a_sync_in_place_computes_its_own_cache(
    engine: Callable[..., SGLangEngine], weights: list[Weights], models: list[Any]
) -> None:
    """It has the prompt of responses that are unfinished at the sync, and the new weights' probabilities.

    The unfinished ones keep the cache of the old weights, so their later tokens do not.
    """
    served = engine(weight_sync={"route": "tensor", "in_flight": "in_place"})
    served._end_ids = set()
    served.update_weights(weights[0].items(), 0)
    served.take_metrics()
    prompts = [Prompt("long", "", input_ids=[2 + i * i % 13 for i in range(64)])]
    before = served.submit(prompts, SamplingParams(n=2, max_new_tokens=LONG))
    wait_for_running(served, before)
    served.update_weights(weights[1].items(), 1)
    new = samples(served, prompts, n=4, max_new_tokens=8)
    assert before.future
    assert not before.future.done()
    for sample in new:
        assert sample.policy_version == 1
        assert_made_by(sample, models, prompt_length=64)
    old = [s for g in in_order(served.wait(before)) for s in g.samples]
    for sample in old:
        with pytest.raises(AssertionError, match="not close"):
            assert_made_by(sample, models, prompt_length=64)
    newer = sum(int((s.token_versions == 1).sum()) for s in old)
    assert value_of(served.take_metrics()["rollout/old_cache_tokens"]) == newer > 0
    served.update_weights(weights[0].items(), 2)  # later tests must not find a cache of other weights


def test_weights_of_somebody_else_are_never_sampled_from(
    engine: Callable[..., SGLangEngine],
    sglang_server: LocalServers,
    weights: list[Weights],
    models: list[Any],
) -> None:
    """Answers from the weights of another run are discarded, and the server is synced again."""
    served, other = engine(), engine()
    served.update_weights(weights[0].items(), 0)
    assert_made_by(samples(served, PROMPTS[:1], max_new_tokens=3)[0], models)
    other.update_weights(weights[1].items(), 7)
    for sample in samples(served, n=2, max_new_tokens=5):
        assert sample.policy_version == 0
        assert_made_by(sample, models)
    assert value_of(served.take_metrics()["rollout/retries"]) > 0


def test_a_request_no_server_takes_is_one_error(
    engine: Callable[..., SGLangEngine], weights: list[Weights]
) -> None:
    served = engine()
    served.update_weights(weights[0].items(), 0)
    with pytest.raises(ValueError, match=r"refuses a request: .*longer than") as error:
        samples(served, [Prompt("long", "", input_ids=[5] * 40_000)])
    assert "\n" not in str(error.value)


# --- episodes ---


def player_of(cfg: Config, tokenizer: Any) -> Player:
    """Return a player with the environment of ``cfg``, for the arithmetic tokenizer of the served model."""
    template: Any = DigitTemplate(tokenizer)
    limits = EpisodeLimits(max_turns=8, max_new_tokens=400, max_episode_tokens=1500, max_prompt_tokens=100)
    return Player(cfg.rollout, cfg.seed, template, limits)


def episodes(**arguments: Any) -> dict[str, Any]:
    return {"environment": "tests.support.games:Echo", "environment_args": arguments}


def turns_of(sample: Sample) -> list[np.ndarray]:
    """Return the positions of the tokens of each turn."""
    sampled = np.flatnonzero(sample.response_mask)
    return np.split(sampled, np.flatnonzero(np.diff(sampled) > 1) + 1)


def assert_played_by(sample: Sample, models: list[Any]) -> None:
    """Check that each sampled token's log probability is that of the model whose version it carries."""
    ids = torch.from_numpy(sample.tokens).long()[None]
    logprobs = torch.stack([model(ids).logits[0].log_softmax(-1) for model in models])
    places = np.flatnonzero(sample.response_mask)
    versions = sample.token_versions[places]
    wanted = logprobs[versions, places - 1, sample.tokens[places]]
    assert_close(torch.from_numpy(sample.rollout_logprobs[places]), wanted, atol=1e-4, rtol=0)
    assert not sample.rollout_logprobs[~sample.response_mask].any()


def test_the_tokens_of_an_episode_are_those_that_the_server_saw(
    engine: Callable[..., SGLangEngine],
    weights: list[Weights],
    models: list[Any],
    sglang_model: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With ``logprob_start_len`` a server returns the ids of its input, which are the sample's, turn by turn.

    Routed experts are those of the model. Without that option, a later turn finds the earlier ones in the
    server's cache.
    """
    replies: list[tuple[list[int], list[int], int]] = []  # ids of input and output, cached tokens
    options: dict[str, Any] = {"logprob_start_len": 0}
    post = Sampler._post

    async def keep(self: Sampler, server: Any, body: dict[str, Any]) -> Any:
        reply = await post(self, server, body | options)
        answer = json.loads(reply.content)
        about = answer["meta_info"]
        echo = [token for _, token, _ in about.get("input_token_logprobs") or ()]
        replies.append((echo, answer["output_ids"], about["cached_tokens"]))
        return reply

    # only the sampler's own requests show what the server was sent; the real one answers them
    monkeypatch.setattr(Sampler, "_post", keep)
    hf = AutoConfig.from_pretrained(sglang_model)
    experts = (hf.num_hidden_layers, hf.num_experts_per_tok)
    served = engine(routed_experts=experts, rollout=episodes(turns=4))
    served.update_weights(weights[0].items(), 0)
    drawn = samples(served, n=3, max_new_tokens=12)
    assert len(replies) == 4 * len(drawn) == 48
    seen = [(echo, output) for echo, output, _ in replies]
    for sample in drawn:
        assert sample.episode
        assert (sample.episode.ended, sample.num_turns) == ("done", 4)
        for turn in turns_of(sample):
            context = sample.tokens[: turn[0]]
            # SGLang returns 0 for the last id of the vocabulary (logprob_result_processor.py)
            echo = np.where(context == hf.vocab_size - 1, 0, context)
            seen.remove((echo.tolist(), sample.tokens[turn].tolist()))
        assert_played_by(sample, models)
        ids = torch.from_numpy(sample.tokens).long()[None]
        assert sample.routed_experts is not None
        for layer, logits in enumerate(models[0](ids, output_router_logits=True).router_logits):
            chosen = logits.topk(hf.num_experts_per_tok).indices.sort().values[:-1]
            assert np.array_equal(np.sort(sample.routed_experts[:, layer]), chosen.numpy())
    assert not seen

    options.clear()
    replies.clear()
    (alone,) = samples(served, PROMPTS[:1], n=1, max_new_tokens=12)
    assert_played_by(alone, models)
    starts = [turn[0] for turn in turns_of(alone)]
    ends = [turn[-1] for turn in turns_of(alone)]
    cached = [count for *_, count in replies]
    for number in range(1, 4):  # all but what the last turn's last token would have computed
        assert ends[number - 1] <= cached[number] < starts[number]


@pytest.mark.parametrize("in_flight", ["retract", "abort", "in_place"])
def test_a_sync_in_episodes(
    engine: Callable[..., SGLangEngine],
    weights: list[Weights],
    models: list[Any],
    tmp_path: Path,
    in_flight: str,
) -> None:
    """One group samples a turn at the sync, another one in its environments after its second.

    The turns before the sync stay as they are. The turns after it attend to no cache of the old weights,
    except in place in the turn that was not finished.
    """
    hold = tmp_path / "go"
    served = engine(weight_sync={"in_flight": in_flight}, rollout=episodes(turns=3, hold=str(hold)))
    served._end_ids = set()
    served.update_weights(weights[0].items(), 0)
    held = served.submit(PROMPTS[:1], SamplingParams(n=2, max_new_tokens=20))
    wait_for(lambda: len(list(tmp_path.glob("go.*"))) == 2)
    prompt = Prompt("1", "go", input_ids=PROMPTS[1].input_ids)  # "go": its environments do not wait
    sampling = served.submit([prompt], SamplingParams(n=2, max_new_tokens=400))
    wait_for(lambda: running(served) == 2)
    served.update_weights(weights[1].items(), 1)
    assert sampling.future
    assert not sampling.future.done()
    hold.touch()
    for ticket in (held, sampling):
        for sample in (s for g in in_order(served.wait(ticket)) for s in g.samples):
            turns = turns_of(sample)
            assert [len(turn) for turn in turns] == [ticket.sampling.max_new_tokens] * 3
            versions = [set(sample.token_versions[turn].tolist()) for turn in turns]
            if ticket is held:
                assert versions == [{0}, {0}, {1}]
            else:
                cut = versions.index({0, 1})  # on a loaded machine the sync may begin after the first turn
                assert versions == [{0}] * cut + [{0, 1}] + [{1}] * (2 - cut)
                assert (np.diff(sample.token_versions[turns[cut]]) >= 0).all()
                if in_flight == "in_place":
                    sample.rollout_logprobs[turns[cut]] = sample.response_mask[turns[cut]] = 0
            assert sample.policy_version == 0
            assert_played_by(sample, models)
    served.update_weights(weights[0].items(), 2)  # later tests must not find a cache of other weights


# --- faults, on two servers that run two requests and queue two more ---


@pytest.fixture(scope="module")
def pair(sglang_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SGLangEngine]:
    cfg = config(
        sglang_model,
        tmp_path_factory.mktemp("pair"),
        rollout={"num_servers": 2, "placement": "colocated"},
        sglang={"hang_timeout_s": 15.0, "args": {"max_running_requests": 2, "max_queued_requests": 2}},
    )
    tokenizer = AutoTokenizer.from_pretrained(sglang_model)
    with closing(start_sglang(cfg, AutoConfig.from_pretrained(sglang_model), tokenizer, CPU)) as engine:
        yield engine


def groups_of(pair: SGLangEngine) -> list[int]:
    assert pair._client
    assert pair._client.local
    return [process_group(pair._client.local, index) for index in range(2)]


def wait_for_both(pair: SGLangEngine) -> None:
    """Wait until both servers run with current weights.

    A server that comes back is synced when samples are requested.
    """
    assert pair._client
    members, deadline = pair._client._watcher.members, time.monotonic() + 300
    while not all(member.state is ServerState.READY for member in members):
        assert time.monotonic() < deadline
        if any(member.state is ServerState.STALE for member in members):
            samples(pair, n=1, max_new_tokens=2)
        time.sleep(0.1)


def test_colocated_servers_wake_with_new_weights(
    pair: SGLangEngine, weights: list[Weights], models: list[Any]
) -> None:
    """On a CPU they keep their memory (no ``enable_memory_saver``, which needs libcuda)."""
    for version in (0, 1):
        pair.update_weights(weights[version].items(), version)
        pair.sleep()
    pair.update_weights(weights[1].items(), 1)
    for sample in samples(pair, n=2, max_new_tokens=5):
        assert set(sample.token_versions[4:]) == {1}
        assert_made_by(sample, models)


def test_a_full_queue_only_delays(pair: SGLangEngine, weights: list[Weights], models: list[Any]) -> None:
    pair.update_weights(weights[0].items(), 0)
    pair.take_metrics()
    drawn = samples(pair, n=8, max_new_tokens=16)
    assert len(drawn) == 32
    for sample in drawn:
        assert_made_by(sample, models)
    assert value_of(pair.take_metrics()["rollout/retries"]) > 0


def test_one_server_killed_and_one_hung_during_a_rollout(
    pair: SGLangEngine, weights: list[Weights], models: list[Any]
) -> None:
    """No sample is lost or duplicated; both servers are restarted and synced before they answer."""
    pair.update_weights(weights[1].items(), 1)
    killed, hung = groups_of(pair)
    ticket = pair.submit(PROMPTS, SamplingParams(n=8, max_new_tokens=120))
    time.sleep(0.5)
    os.killpg(killed, signal.SIGKILL)
    os.killpg(hung, signal.SIGSTOP)
    groups = in_order(pair.wait(ticket))
    assert [len(g.samples) for g in groups] == [8] * 4
    for sample in (s for g in groups for s in g.samples):
        assert_made_by(sample, models)
        assert sample.policy_version == 1
    assert wait_until_gone(killed) == wait_until_gone(hung) == []
    assert value_of(pair.take_metrics()["rollout/server_restarts"]) == 2


def test_a_server_killed_within_episodes(
    sglang_model: Path, pair: SGLangEngine, weights: list[Weights], models: list[Any], tmp_path: Path
) -> None:
    """The server's episodes go on on the other one after their second turn; no turn is played twice."""
    pair.update_weights(weights[1].items(), 1)
    wait_for_both(pair)
    hold = tmp_path / "go"
    cfg = config(sglang_model, tmp_path, rollout=episodes(turns=3, hold=str(hold)))
    with closing(player_of(cfg, AutoTokenizer.from_pretrained(sglang_model))) as player:
        player.start()
        pair._player = player
        try:
            ticket = pair.submit(PROMPTS, SamplingParams(n=1, max_new_tokens=30))
            wait_for(lambda: len(list(tmp_path.glob("go.*"))) == 4)
            assert pair._client
            assert [member.episodes for member in pair._client._watcher.members] == [2, 2]
            os.killpg(groups_of(pair)[0], signal.SIGKILL)
            hold.touch()
            played = [s for g in in_order(pair.wait(ticket)) for s in g.samples]
        finally:
            pair._player = None
    assert len(played) == 4
    for sample in played:
        assert_played_by(sample, models)
        assert sample.episode
        assert (sample.num_turns, sample.policy_version, sample.episode.ended) == (3, 1, "done")
        assert [m["role"] for m in sample.episode.messages] == ["assistant", "user"] * 3


@pytest.mark.parametrize("noticed", [False, True], ids=["found by the sync", "found by its watcher"])
def test_a_server_killed_during_a_sync(
    pair: SGLangEngine, weights: list[Weights], models: list[Any], noticed: bool
) -> None:
    pair.update_weights(weights[1].items(), 1)
    wait_for_both(pair)
    victim = groups_of(pair)[0]
    assert pair._client
    member = pair._client._watcher.members[0]
    iterations = []

    class Export:
        """Weights that kill a server half-way through their first iteration."""

        def __iter__(self) -> Iterator[tuple[str, Tensor]]:
            iterations.append(victim)
            for place, item in enumerate(weights[2].items()):
                if len(iterations) == 1 and place == len(weights[2]) // 2:
                    os.killpg(victim, signal.SIGKILL)
                    deadline = time.monotonic() + 60
                    while noticed and member.state is ServerState.SYNCING:
                        assert time.monotonic() < deadline
                        time.sleep(0.05)
                yield item

    pair.update_weights(Export(), 2)
    assert member.state is not ServerState.READY
    for sample in samples(pair, n=2, max_new_tokens=20):
        assert sample.policy_version == 2
        assert_made_by(sample, models)
    wait_for_both(pair)
    assert len(iterations) > 1  # the restarted server got the whole export
    for sample in samples(pair, n=8, max_new_tokens=5):
        assert_made_by(sample, models)


def test_servers_that_keep_dying_end_the_run(
    sglang_model: Path, tmp_path: Path, weights: list[Weights]
) -> None:
    """If no restart is allowed, the run ends when its only server dies."""
    cfg = config(sglang_model, tmp_path, sglang={"max_restarts": 0})
    tokenizer = AutoTokenizer.from_pretrained(sglang_model)
    with closing(start_sglang(cfg, AutoConfig.from_pretrained(sglang_model), tokenizer, CPU)) as engine:
        engine.update_weights(weights[0].items(), 0)
        ticket = engine.submit(PROMPTS, SamplingParams(n=8, max_new_tokens=200))
        assert engine._client
        assert engine._client.local
        os.killpg(process_group(engine._client.local), signal.SIGKILL)
        with pytest.raises(ServerError, match="every SGLang server was lost"):
            engine.wait(ticket)


# --- two nodes ---


def sample_on_a_node(
    cfg: Config, folders: list[Path]
) -> tuple[list[dict[int, list[Sample]]], float, list[str]]:
    """Sample three batches on one of two nodes with colocated servers; node b loses its in the first.

    Returns this rank's samples of each batch, the restarts on all nodes, and the URLs of its servers.
    """
    os.environ["SLURMD_NODENAME"] = "ab"[dist.get_rank()]
    hf = AutoConfig.from_pretrained(cfg.model.path)
    batches: list[dict[int, list[Sample]]] = []
    try:
        with closing(start_sglang(cfg, hf, AutoTokenizer.from_pretrained(cfg.model.path), CPU)) as engine:
            assert engine._client
            assert engine._client.local
            for version, folder in enumerate(folders):
                engine.update_weights(load_file(folder / "model.safetensors").items(), version)
                ticket = engine.submit(PROMPTS, SamplingParams(n=4, max_new_tokens=120))
                if version == 0 and dist.get_rank() == 1:
                    time.sleep(0.5)  # so that requests are in flight
                    os.killpg(process_group(engine._client.local), signal.SIGKILL)
                groups = engine.wait(ticket)
                batches.append({position: group.samples for position, group in groups.items()})
            deadline = time.monotonic() + 300
            while not engine._nodes.from_leaders(engine._client.standing().ready)[1]:  # until node b is back
                assert time.monotonic() < deadline
                engine.generate(PROMPTS[:1], SamplingParams(max_new_tokens=2))
                time.sleep(0.5)  # interval of the question whether the server is back
            groups = engine.generate(PROMPTS, SamplingParams(n=4, max_new_tokens=20))
            batches.append({position: group.samples for position, group in groups.items()})
            restarts = value_of(engine.take_metrics()["rollout/server_restarts"])
            return batches, restarts, [server.url for server in engine._servers]
    finally:
        del os.environ["SLURMD_NODENAME"]


def test_two_nodes_share_a_batch_and_one_loses_its_server(
    ranks: RankPool, sglang_model: Path, models: list[Any], tmp_path: Path
) -> None:
    """Each node starts a server and syncs it. Nothing is lost or doubled, and the weights are right."""
    cfg = config(sglang_model, tmp_path, rollout={"num_servers": 2, "placement": "colocated"})
    outcomes = ranks.run(2, sample_on_a_node, cfg, [model.folder for model in models[:2]])
    for batch, version in enumerate((0, 1, 1)):
        of_a, of_b = (batches[batch] for batches, *_ in outcomes)
        assert sorted([*of_a, *of_b]) == list(range(len(PROMPTS)))
        for samples_of_prompt in [*of_a.values(), *of_b.values()]:
            assert len(samples_of_prompt) == 4
            for sample in samples_of_prompt:
                assert sample.policy_version == version
                assert_made_by(sample, models)
    assert of_a
    assert of_b
    assert [restarts for _, restarts, _ in outcomes] == [1, 1]
    assert {len(urls) for *_, urls in outcomes} == {1}
    assert (tmp_path / "servers/a/server_0.log").exists()
    assert (tmp_path / "servers/b/server_0.log").exists()


# --- whole runs ---


def test_training_raises_the_reward(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """Training with real servers raises the reward and leaves no server behind.

    It has two trainer ranks with expert parallelism, two servers, routing replay, weight sync through
    shared memory and generation one step ahead.
    """
    problems = tmp_path / "problems"
    write_addition_problems(problems)
    run_dir = tmp_path / "run"
    config = options(
        run_dir=run_dir,
        model__path=tiny_model("qwen3_moe", num_layers=2),
        data__path=problems / "train.jsonl",
        eval__sets__heldout__path=problems / "heldout.jsonl",
        eval__sets__heldout__max_prompts=8,
        eval__pass_reward=0.5,
        reward__name="tests.support.rewards:share_of_digits",
        rollout__engine="sglang",
        rollout__num_servers=2,
        rollout__max_staleness=1,
        rollout__prompts_per_step=16,
        rollout__routed_experts="true",
        sglang__python=PYTHON,
        weight_sync__route="tensor",
        weight_sync__verify="true",
        algorithm__correction="geometric",
        algorithm__moe_routing_replay="rollout",
        optimizer__lr=3e-3,
        optimizer__lr_schedule="constant",
        parallel__expert_model_parallel_size=2,
        train__num_steps=8,
        log__tensorboard="false",
    )
    done = run_module("megatron_gmpo.train", CONFIG, *config, ranks=2)
    assert done.returncode == 0, done.stderr
    figures = json_lines(run_dir / "metrics.jsonl")[1:]
    rewards = [line["reward/mean"] for line in figures]
    assert sum(rewards[-2:]) / 2 > sum(rewards[:2]) / 2 + 0.1
    # The first rollout has the policy's weights.
    assert max(line["rollout/logprob_diff_mean"] for line in figures[:1]) < 1e-4
    assert [line["rollout/staleness_max"] for line in figures] == [0] + [1] * 7
    # The weights are equal, so only rounding can choose another expert.
    assert figures[0]["moe/routing_differs"] < 0.01
    for line in figures:
        assert line["weight_sync/gigabytes_per_second"] > 0
        assert line["rollout/weight_mean"] == pytest.approx(1, abs=0.2)
        assert line["rollout/stale_groups"] == line["rollout/server_restarts"] == 0
    assert not servers_of(run_dir)


def test_training_on_episodes(text_model: Path, tmp_path: Path) -> None:
    """The policy's log probabilities are the servers' on every turn; groups of failed episodes are left out.

    Which environments fail depends on their seeds alone.
    """
    problems, run_dir, steps = tmp_path / "problems.jsonl", tmp_path / "run", 3
    problems.write_text(
        "".join(json.dumps({"problem": f"task {i}", "answer": "go"}) + "\n" for i in range(64))
    )
    config = options(
        run_dir=run_dir,
        model__path=text_model,
        data__path=problems,
        eval__sets="{}",
        reward__name="environment",
        rollout__engine="sglang",
        rollout__max_staleness=1,
        rollout__environment="tests.support.games:Echo",
        rollout__environment_args__fails=0.1,
        rollout__prompts_per_step=8,
        rollout__samples_per_prompt=4,
        rollout__max_new_tokens=16,
        rollout__max_episode_tokens=400,
        rollout__save_path=tmp_path / "groups",
        sglang__python=PYTHON,
        weight_sync__route="tensor",
        algorithm__correction="geometric",
        train__num_steps=steps,
        log__tensorboard="false",
    )
    done = run_module("megatron_gmpo.train", CONFIG, *config)
    assert done.returncode == 0, done.stderr
    figures = json_lines(run_dir / "metrics.jsonl")
    failed = [line["rollout/failed_groups"] for line in figures]
    assert 0 < sum(failed) < 8 * steps
    assert figures[0]["rollout/logprob_diff_max"] < 1e-4  # later steps have samples of older weights
    for step, line in enumerate(figures):
        assert line["rollout/staleness_max"] == min(step, 1)
        assert line["rollout/environment_errors"] >= failed[step]
        groups = load_groups(tmp_path / "groups", step, vocab_size=259)
        assert len(groups) == 8 - failed[step]
        for sample in (sample for group in groups for sample in group.samples):
            assert sample.episode
            assert (sample.episode.ended, sample.num_turns) == ("done", 3)
            assert sample.reward == pytest.approx(sample.episode.reward)
    assert not servers_of(run_dir)


def servers_of(run_dir: Path) -> list[int]:
    """Return the process groups that servers of the run left behind."""
    return [
        process.pid
        for process in psutil.process_iter(["cmdline"])
        if str(run_dir) in " ".join(process.info["cmdline"] or [])
    ]


def test_a_killed_trainer_leaves_no_server(sglang_model: Path, tmp_path: Path) -> None:
    problems = tmp_path / "problems"
    write_addition_problems(problems)
    # The path of the model marks the processes of this run.
    model = shutil.copytree(sglang_model, tmp_path / "model")
    config = options(
        run_dir=tmp_path / "run",
        model__path=model,
        data__path=problems / "train.jsonl",
        eval__sets__heldout__path=problems / "heldout.jsonl",
        rollout__engine="sglang",
        sglang__python=PYTHON,
        log__tensorboard="false",
    )
    trainer = subprocess.Popen(
        [sys.executable, "-m", "megatron_gmpo.train", CONFIG, *config], cwd=ROOT, start_new_session=True
    )
    deadline = time.monotonic() + 300
    while len(servers_of(tmp_path / "model")) < 3:  # trainer, server and its watcher
        assert time.monotonic() < deadline
        assert trainer.poll() is None
        time.sleep(0.2)
    os.killpg(trainer.pid, signal.SIGKILL)
    trainer.wait()
    while servers_of(tmp_path / "model"):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_without_the_servers_environment_a_run_is_refused(sglang_model: Path, tmp_path: Path) -> None:
    config = options(
        model__path=sglang_model,
        rollout__engine="sglang",
        sglang__python=tmp_path / "python",
        run_dir=tmp_path / "run",
    )
    done = run_module("megatron_gmpo.train", CONFIG, *config)
    assert done.returncode == 2
    assert error_lines(done.stderr) == [
        f"error: sglang.python = '{tmp_path}/python' does not exist: run make sglang, "
        "or set rollout.server_urls or rollout.servers_file"
    ]
