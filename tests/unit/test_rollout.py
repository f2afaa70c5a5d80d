"""The embedded engine against transformers' forward and generate; collecting groups; rollouts on disk."""

from __future__ import annotations

import base64
import json
import math
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from megatron_gmpo.batch.index import StepIndex
from megatron_gmpo.batch.samples import (
    Episode,
    FinishReason,
    Prompt,
    Sample,
    SampleGroup,
    version_spans_of,
)
from megatron_gmpo.config import RewardConfig, RolloutConfig
from megatron_gmpo.data.stream import PromptStream, StreamState
from megatron_gmpo.errors import InputError, NonFiniteError, RunError
from megatron_gmpo.metrics.figures import value_of
from megatron_gmpo.rewards import resolve_reward
from megatron_gmpo.rewards.arithmetic import arithmetic_reward
from megatron_gmpo.rollout.collect import (
    Collected,
    Collector,
    episode_figures,
    overlong_penalty,
    replayed,
    rollout_figures,
    score,
)
from megatron_gmpo.rollout.embedded import EmbeddedEngine
from megatron_gmpo.rollout.engine import RolloutEngine, SamplingParams
from megatron_gmpo.rollout.replay import append_transcripts, check_groups, load_groups, save_groups

from ..support import large_logits
from ..support.groups import in_order, index_of
from ..support.reference import load_float64
from ..support.scripted import ScriptedEngine

Record = dict[str, Any]
TEXTS = ["1", "07+45=", "3 - 2 + 10 = 8 + 8 - 5", "12+1=", "12+1=", "99"]
EOS = 1
families = pytest.mark.parametrize(
    "family", ["qwen3_moe", "qwen3", "qwen2_moe", "mixtral", "llama", "deepseek_v3", "glm4_moe"]
)


@pytest.fixture(scope="module")
def folder_of(tiny_model: Callable[..., Path]) -> Callable[..., Path]:
    """Make models of two layers and 16 tokens, whose logits are far from uniform to reveal mistakes."""
    return lambda family, **options: tiny_model(family, num_layers=2, initializer_range=0.15, **options)


def engine_of(
    folder: Path, *, batch_size: int = 64, seed: int = 0, routed_experts: bool = False
) -> EmbeddedEngine:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return EmbeddedEngine(
        str(folder),
        tokenizer,
        device="cpu",
        dtype=torch.float32,
        batch_size=batch_size,
        seed=seed,
        routed_experts=routed_experts,
    )


def prompts_of(folder: Path, texts: list[str]) -> list[Prompt]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [
        Prompt(str(i), answer="", text=text, input_ids=tokenizer(text)["input_ids"])
        for i, text in enumerate(texts)
    ]


@cache
def model_of(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@torch.no_grad()
def response_logits(folder: Path, sample: Sample) -> tuple[Tensor, Tensor]:
    """Return the (R, V) logits and (R,) tokens of the response, from one forward pass without a cache."""
    tokens = torch.from_numpy(sample.tokens).long()
    where = torch.from_numpy(sample.response_mask).nonzero()[:, 0]
    return model_of(folder)(tokens[None]).logits[0, where - 1], tokens[where]


def responses(groups: list[SampleGroup]) -> list[list[int]]:
    return [s.tokens[s.response_mask].tolist() for g in groups for s in g.samples]


def without_logprobs(sample: Sample) -> Sample:
    return replace(sample, rollout_logprobs=np.zeros(len(sample.tokens)))


# --- the embedded engine: samples and their probabilities ---


@pytest.mark.slow
@families
def test_logprobs_are_those_of_a_full_forward(family: str, folder_of: Callable[..., Path]) -> None:
    folder = folder_of(family)
    prompts = prompts_of(folder, TEXTS)
    sampling = SamplingParams(n=3, max_new_tokens=16, temperature=0.7)
    groups = in_order(engine_of(folder, batch_size=7).generate(prompts, sampling))
    assert [g.prompt for g in groups] == prompts
    assert [len(g.samples) for g in groups] == [3] * len(prompts)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for group in groups:
        for sample in group.samples:
            logits, response = response_logits(folder, sample)
            start = len(group.prompt.input_ids)
            assert sample.tokens[:start].tolist() == group.prompt.input_ids
            assert sample.response_mask.tolist() == [False] * start + [True] * len(response)
            assert len(sample.rollout_logprobs) == len(sample.tokens)
            assert sample.rollout_logprobs[:start].tolist() == [0.0] * start
            expected = (logits / 0.7).log_softmax(-1).gather(1, response[:, None])[:, 0]
            assert_close(torch.tensor(sample.rollout_logprobs[start:]), expected, atol=2e-5, rtol=0)
            assert sample.text == tokenizer.decode(response, skip_special_tokens=True)
            assert (sample.policy_version, sample.reward, sample.routed_experts) == (0, 0.0, None)
    samples = [s for g in groups for s in g.samples]
    assert {s.finish_reason for s in samples} == {"stop", "length"}
    assert len({s.response_length for s in samples}) > 2


def test_logits_in_fp32_of_a_bf16_model(tmp_path: Path) -> None:
    """The logits are not rounded to bf16: fewer log probabilities are far from a float64 model's."""
    folder = large_logits.make(tmp_path)
    exact, tokenizer = load_float64(folder), AutoTokenizer.from_pretrained(folder)
    share: dict[bool, float] = {}
    for fp32_head in (True, False):
        engine = EmbeddedEngine(
            str(folder),
            tokenizer,
            device="cpu",
            dtype=torch.bfloat16,
            batch_size=32,
            seed=0,
            fp32_head=fp32_head,
        )
        engine.update_weights(load_file(folder / "model.safetensors").items(), version=0)
        (group,) = in_order(
            engine.generate(prompts_of(folder, ["12+1="]), SamplingParams(n=32, max_new_tokens=16))
        )
        found, wanted = [], []
        for sample in group.samples:
            tokens = torch.from_numpy(sample.tokens).long()
            mask = torch.from_numpy(sample.response_mask)
            with torch.no_grad():
                logprobs = exact(tokens[None]).logits[0, :-1].log_softmax(-1)
            found.append(torch.from_numpy(sample.rollout_logprobs)[mask])
            wanted.append(logprobs.gather(1, tokens[1:, None])[mask[1:], 0])
        share[fp32_head] = large_logits.share_far(torch.cat(found), torch.cat(wanted))
    assert share[True] < 0.02
    assert share[False] > 0.25


def test_the_end_token_stays_and_ends_the_response(folder_of: Callable[..., Path]) -> None:
    folder = folder_of("qwen3")
    groups = in_order(
        engine_of(folder).generate(prompts_of(folder, TEXTS), SamplingParams(n=8, max_new_tokens=10))
    )
    samples = [s for g in groups for s in g.samples]
    seen = dict.fromkeys(("stop", "length"), 0)
    for sample, response in zip(samples, responses(groups), strict=True):
        assert EOS not in response[:-1]
        assert sample.finish_reason == ("stop" if response[-1] == EOS else "length")
        assert len(response) == 10 or sample.finish_reason == "stop"
        seen[sample.finish_reason] += 1
    assert min(seen.values()) > 5


def truncated(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Apply temperature, then top-k, then top-p (the smallest set with that mass), and renormalise."""
    p, order = (logits.double() / temperature).softmax(-1).sort(descending=True)
    p[:, top_k:] = 0
    p /= p.sum(-1, keepdim=True)
    p[p.cumsum(-1) - p >= top_p] = 0
    p /= p.sum(-1, keepdim=True)
    return torch.zeros_like(p).scatter(1, order, p)


@pytest.mark.parametrize(("top_k", "top_p"), [(5, 1.0), (16, 0.6), (6, 0.8)])
def test_truncated_sampling_reports_the_whole_distribution(
    top_k: int, top_p: float, folder_of: Callable[..., Path]
) -> None:
    """No token outside the truncated distribution is drawn.

    The log probabilities are those of the whole distribution, as SGLang's sampler.py takes them: from the
    softmax at the temperature, before top-k and top-p.
    """
    folder = folder_of("qwen3_moe")
    sampling = SamplingParams(
        n=4, max_new_tokens=8, temperature=1.3, top_k=0 if top_k == 16 else top_k, top_p=top_p
    )
    groups = in_order(engine_of(folder).generate(prompts_of(folder, TEXTS), sampling))
    cut = []
    for sample in (s for g in groups for s in g.samples):
        logits, response = response_logits(folder, sample)
        drawn_from = truncated(logits, 1.3, top_k, top_p).gather(1, response[:, None])[:, 0]
        assert (drawn_from > 0).all()
        whole = (logits.double() / 1.3).log_softmax(-1).gather(1, response[:, None])[:, 0]
        found = torch.tensor(sample.rollout_logprobs, dtype=torch.float64)[-len(response) :]
        assert_close(found, whole, atol=2e-5, rtol=0)
        cut.append(drawn_from.log() - whole)
    assert torch.cat(cut).min() > 0.05  # every step removed tokens


@pytest.mark.slow
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (5, 1.0), (0, 0.6), (6, 0.8)])
def test_samples_follow_the_distribution(top_k: int, top_p: float, folder_of: Callable[..., Path]) -> None:
    folder = folder_of("qwen3")
    (prompt,) = prompts_of(folder, ["12+1="])
    n = 10_000
    (group,) = in_order(
        engine_of(folder, batch_size=n).generate(
            [prompt], SamplingParams(n=n, max_new_tokens=1, temperature=1.5, top_k=top_k, top_p=top_p)
        )
    )
    counts = torch.bincount(torch.tensor([s.tokens[-1] for s in group.samples]), minlength=16).double()
    logits, _ = response_logits(folder, group.samples[0])

    def p_value(temperature: float) -> float:
        expected = n * truncated(logits, temperature, top_k or 16, top_p)[0]
        kept = expected > 0
        if counts[~kept].any():
            return 0.0
        assert expected[kept].min() > 5
        chi_square = ((counts - expected)[kept] ** 2 / expected[kept]).sum()
        # This is the survival function of chi-square.
        return float(torch.special.gammaincc((kept.sum() - 1).double() / 2, chi_square / 2))

    assert p_value(1.5) > 0.001
    assert p_value(1.3) < 1e-6  # the test detects a wrong temperature


def test_seed_version_and_call_decide_the_samples(folder_of: Callable[..., Path]) -> None:
    folder = folder_of("qwen3")
    weights = load_file(folder / "model.safetensors")
    prompts = prompts_of(folder, TEXTS)

    def draw(engine: EmbeddedEngine) -> list[list[int]]:
        return responses(in_order(engine.generate(prompts, SamplingParams(n=2, max_new_tokens=8))))

    def at(engine: EmbeddedEngine, version: int) -> list[list[int]]:
        engine.update_weights(weights.items(), version)
        return draw(engine)

    engine = engine_of(folder, seed=3)
    first = at(engine, 5)
    second = draw(engine)
    assert at(engine, 6) not in (first, second)
    assert first != second
    assert at(engine, 5) == first  # samples drawn since, e.g. by an evaluation, have no effect
    torch.manual_seed(99)  # the global generator has no effect
    resumed = engine_of(folder, seed=3)
    assert [at(resumed, 5), draw(resumed)] == [first, second]
    assert at(engine_of(folder, seed=4), 5) != first


@pytest.fixture
def early_stops(folder_of: Callable[..., Path], tmp_path: Path) -> Path:
    """Make a model with several end tokens, so that greedy responses differ in length."""
    shutil.copytree(folder_of("qwen3_moe"), tmp_path / "model")
    file = tmp_path / "model" / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": [EOS, 7, 12]}))
    return tmp_path / "model"


def test_the_share_of_finished_responses_is_reported(early_stops: Path) -> None:
    shares: list[float] = []
    sampling = SamplingParams(n=3, max_new_tokens=12, report=shares.append)
    engine_of(early_stops, batch_size=7).generate(prompts_of(early_stops, TEXTS), sampling)
    assert shares == sorted(shares)
    assert 0 < shares[0] < 0.5
    assert shares[-1] == pytest.approx(1)


def test_greedy_decoding_is_that_of_generate(early_stops: Path) -> None:
    prompts = prompts_of(early_stops, [*TEXTS, "5", "44-3", "80+ ", "== 6"])
    engine = engine_of(early_stops)
    groups = in_order(engine.generate(prompts, SamplingParams(max_new_tokens=12, temperature=0)))
    model = model_of(early_stops)
    for prompt, response in zip(prompts, responses(groups), strict=True):
        ids = torch.tensor([prompt.input_ids])
        generated = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12
        )[0, ids.shape[1] :]
        assert response == generated.tolist()
    for (sample,) in (g.samples for g in groups):
        logits, response = response_logits(early_stops, sample)
        spoken = response[:-1] if sample.finish_reason == "stop" else response
        assert sample.text == engine.tokenizer.decode(spoken)  # 7 and 12 are not special tokens
        # The logprobs are those of the model itself, at temperature 1.
        expected = logits.log_softmax(-1).gather(1, response[:, None])[:, 0]
        assert_close(torch.tensor(sample.rollout_logprobs)[-len(response) :], expected, atol=2e-5, rtol=0)
    assert {len(r) for r in responses(groups)} > {12}
    assert {g.samples[0].finish_reason for g in groups} == {"stop", "length"}


@pytest.mark.parametrize("batch_size", [1, 3])
def test_answers_do_not_depend_on_the_batch(batch_size: int, early_stops: Path) -> None:
    prompts = prompts_of(early_stops, [*TEXTS, "5", "44-3", "80+ ", "== 6"])
    greedy = SamplingParams(max_new_tokens=12, temperature=0)
    together = in_order(engine_of(early_stops).generate(prompts, greedy))
    apart = in_order(engine_of(early_stops, batch_size=batch_size).generate(prompts, greedy))
    assert len({len(r) for r in responses(together)}) > 2  # rows leave the batch at different times
    for (one,), (other,) in zip((g.samples for g in together), (g.samples for g in apart), strict=True):
        assert without_logprobs(one) == without_logprobs(other)
        assert one.rollout_logprobs == pytest.approx(other.rollout_logprobs, abs=2e-5)


@pytest.mark.parametrize(
    "stop_of", [lambda t: (t[9:11],), lambda t: ("zzz", t[18:21], t[9:11]), lambda t: (t[9],)]
)
def test_stop_strings_end_responses_and_leave_the_text(
    stop_of: Callable[[str], tuple[str, ...]], folder_of: Callable[..., Path]
) -> None:
    folder = folder_of("qwen3")
    prompts = prompts_of(folder, ["3 - 2 + 10 = 8"])
    free = SamplingParams(n=12, max_new_tokens=24)
    unstopped = in_order(engine_of(folder, batch_size=1).generate(prompts, free))[0].samples
    stop = stop_of(next(s.text for s in unstopped if len(s.text) == 24 and "  " not in s.text))
    stopped = in_order(engine_of(folder, batch_size=1).generate(prompts, replace(free, stop=stop)))[0].samples
    tokenizer = AutoTokenizer.from_pretrained(folder)
    cuts = 0
    # A batch of one draws the same tokens until it stops.
    for before, after in zip(unstopped, stopped, strict=True):
        at = min((before.text.find(s) for s in stop if s in before.text), default=None)
        if at is None:
            assert after == before
            continue
        assert after.text == before.text[:at]
        assert np.array_equal(after.tokens, before.tokens[: len(after.tokens)])
        response = after.tokens[len(prompts[0].input_ids) :]
        spoken = tokenizer.decode(response, skip_special_tokens=True)
        assert any(spoken.endswith(s) for s in stop)
        assert sum(s in spoken[:-1] for s in stop) == 0
        assert after.finish_reason == "stop"
        cuts += 1
    assert cuts > 0
    assert any(
        s.finish_reason == "stop" and b.finish_reason == "length"
        for s, b in zip(stopped, unstopped, strict=True)
    )


@pytest.mark.parametrize("stop", ["<pad>", "4<pad>", "<pad><pad>"])
def test_a_stop_string_that_is_a_special_token(stop: str, folder_of: Callable[..., Path]) -> None:
    """The response ends with the first of them, as on SGLang, which also decodes special tokens."""
    folder = folder_of("qwen3")
    prompts = prompts_of(folder, TEXTS)
    sampling = SamplingParams(n=40, max_new_tokens=24, stop=(stop,))
    engine = engine_of(folder, batch_size=60, routed_experts=False)
    stopped = 0
    for sample in (s for g in in_order(engine.generate(prompts, sampling)) for s in g.samples):
        pieces = engine.tokenizer.convert_ids_to_tokens(sample.tokens[sample.response_mask])
        assert stop not in "".join(pieces[:-1])
        ends = pieces[-1] == "<eos>" or "".join(pieces).endswith(stop)
        assert sample.finish_reason == ("stop" if ends else "length")
        assert ends or len(pieces) == 24
        if "".join(pieces).endswith(stop):
            assert sample.text == "".join(pieces).removesuffix(stop).replace("<pad>", "")
            stopped += 1
    assert stopped > 2


@pytest.mark.parametrize("batch_size", [3, 64])
def test_routed_experts_are_those_of_a_full_forward(batch_size: int, early_stops: Path) -> None:
    """Prompts differ in length, samples share prompts, and rows leave the batch."""
    engine = engine_of(early_stops, batch_size=batch_size, routed_experts=True)
    groups = in_order(engine.generate(prompts_of(early_stops, TEXTS), SamplingParams(n=3, max_new_tokens=12)))
    samples = [s for g in groups for s in g.samples]
    assert len({s.response_length for s in samples}) > 3
    for sample in samples:
        router_logits = model_of(early_stops)(
            torch.from_numpy(sample.tokens).long()[None], output_router_logits=True
        ).router_logits
        assert sample.routed_experts is not None
        assert sample.routed_experts.dtype == np.uint8
        assert sample.routed_experts.shape == (len(sample.tokens) - 1, 2, 2)
        for layer, logits in enumerate(router_logits):
            chosen = logits.topk(2).indices.sort().values[:-1]
            assert np.array_equal(np.sort(sample.routed_experts[:, layer]), chosen.numpy())


moe_families = pytest.mark.parametrize(
    "family", ["qwen3_moe", "qwen2_moe", "mixtral", "deepseek_v3", "glm4_moe"]
)


@moe_families
def test_router_noise_disturbs_the_choice_that_is_recorded(
    family: str, folder_of: Callable[..., Path]
) -> None:
    """A plain model with the observed router outputs has the reported log probabilities."""
    folder = folder_of(family)
    engine = engine_of(folder, routed_experts=True)
    gates = {
        i: layer.mlp.gate for i, layer in enumerate(engine.model.model.layers) if hasattr(layer.mlp, "gate")
    }
    seen: dict[int, list[tuple[Tensor, ...]]] = {layer: [] for layer in gates}
    for layer, gate in gates.items():
        gate.register_forward_hook(
            lambda _, args, out, layer=layer: seen[layer].append((args[0].flatten(0, -2), *out))
        )
    (prompt,) = prompts_of(folder, ["3 - 2 + 10 = 8"])
    (group,) = in_order(engine.generate([prompt], SamplingParams(max_new_tokens=200, router_noise=0.7)))
    (sample,) = group.samples
    assert sample.routed_experts is not None

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    noise = []
    for layer, calls in seen.items():
        hidden, logits, weights, experts = (torch.cat(of_calls) for of_calls in zip(*calls, strict=True))
        noise.append(logits - hidden @ gates[layer].weight.T)
        assert np.array_equal(sample.routed_experts[:, layer], experts)
        if family == "qwen3_moe":
            assert torch.equal(experts, logits.topk(2).indices)
        model.model.layers[layer].mlp.gate.register_forward_hook(
            lambda *_, given=(logits, weights, experts): given
        )
    draws = torch.cat(noise).flatten()
    assert abs(float(draws.mean())) < 4 * 0.7 / len(draws) ** 0.5
    assert abs(float(draws.std()) / 0.7 - 1) < 4 / (2 * len(draws)) ** 0.5
    tokens = torch.from_numpy(sample.tokens).long()
    disturbed = model(tokens[None, :-1]).logits[0].log_softmax(-1).gather(1, tokens[1:, None])[:, 0]
    mask = torch.tensor(sample.response_mask[1:])
    found = torch.tensor(sample.rollout_logprobs[1:])[mask]
    assert_close(found, disturbed[mask], atol=2e-5, rtol=0)
    logits, response = response_logits(folder, sample)
    assert (logits.log_softmax(-1).gather(1, response[:, None])[:, 0] - found).abs().mean() > 0.01


def test_router_noise_is_drawn_as_the_samples_are_and_0_is_none(folder_of: Callable[..., Path]) -> None:
    folder = folder_of("qwen3_moe")
    prompts, noisy = prompts_of(folder, TEXTS), SamplingParams(n=2, max_new_tokens=8, router_noise=0.5)
    plain = replace(noisy, router_noise=0.0)

    def draw(engine: EmbeddedEngine, sampling: SamplingParams) -> list[str]:
        engine.update_weights(load_file(folder / "model.safetensors").items(), 5)
        # str() shows the exact floats.
        return [
            str(sample) for group in in_order(engine.generate(prompts, sampling)) for sample in group.samples
        ]

    engine, untouched = engine_of(folder), engine_of(folder)
    for layer in untouched.model.model.layers:
        del layer.mlp.gate.forward  # restores the method of the class
    first = draw(engine, noisy)
    assert draw(engine, plain) == draw(untouched, plain) != first
    torch.manual_seed(99)
    assert draw(engine, noisy) == draw(engine_of(folder), noisy) == first


def test_routed_experts_of_a_model_with_dense_layers(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(tiny_model("qwen3_moe"))
    config.mlp_only_layers = [0, 2]
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_model("qwen3_moe")).save_pretrained(tmp_path)
    engine = engine_of(tmp_path, routed_experts=True)
    (group,) = in_order(engine.generate(prompts_of(tmp_path, ["07+45="]), SamplingParams(max_new_tokens=4)))
    experts = group.samples[0].routed_experts
    assert experts is not None
    assert experts.shape[1:] == (4, 2)
    assert (experts[:, [0, 2]] == 0).all()  # meaningless, but fit uint8
    assert (experts[:, [1, 3]] >= 0).all()


# --- the embedded engine: new weights ---


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("qwen3_moe", {}),
        ("qwen3", {"tie_word_embeddings": True}),
        ("qwen2", {}),
        ("llama", {}),
        ("qwen2_moe", {}),
        ("mixtral", {}),
        ("deepseek_v3", {}),
        ("glm4_moe", {}),
    ],
    ids=[
        "routed experts",
        "tied embeddings",
        "biases",
        "llama",
        "shared expert",
        "mixtral",
        "latent attention",
        "router biases",
    ],
)
def test_new_weights_make_the_other_model(family: str, options: dict, folder_of: Callable[..., Path]) -> None:
    folder, other = folder_of(family, **options), folder_of(family, seed=1, **options)
    engine = engine_of(folder)
    prompts = prompts_of(folder, TEXTS)
    engine.generate(prompts, SamplingParams(max_new_tokens=4))
    tensors = load_file(other / "model.safetensors")
    routed = ("qwen3_moe", "qwen2_moe", "mixtral", "deepseek_v3", "glm4_moe")
    assert any(".experts.3." in name for name in tensors) == (family in routed)
    assert any("e_score_correction_bias" in name for name in tensors) == (
        family in ("deepseek_v3", "glm4_moe")
    )
    assert ("lm_head.weight" in tensors) != bool(options)
    engine.update_weights(((name, tensors[name]) for name in reversed(tensors)), version=4)
    tokens = torch.tensor([prompts[2].input_ids])
    with torch.no_grad():
        assert torch.equal(engine.model(tokens).logits, model_of(other)(tokens).logits)
        assert not torch.allclose(model_of(folder)(tokens).logits, model_of(other)(tokens).logits, atol=0.1)
    for sample in (
        s for g in in_order(engine.generate(prompts, SamplingParams(max_new_tokens=4))) for s in g.samples
    ):
        logits, response = response_logits(other, sample)
        expected = logits.log_softmax(-1).gather(1, response[:, None])[:, 0]
        assert_close(torch.tensor(sample.rollout_logprobs)[-len(response) :], expected, atol=2e-5, rtol=0)
        assert sample.policy_version == 4


EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: [*t.items(), ("model.lost.weight", t["lm_head.weight"])],
            "has no tensor 'model.lost.weight'",
        ),
        (lambda t: [*t.items(), (EXPERT, t[EXPERT])], f"tensor '{EXPERT}' came twice"),
        (
            lambda t: [(k, v) for k, v in t.items() if k != EXPERT],
            f"1 tensors of the rollout model were not sent: {EXPERT}",
        ),
        (lambda t: [], "were not sent: lm_head.weight"),
        (
            lambda t: [(k, v[1:] if k == EXPERT else v) for k, v in t.items()],
            f"'{EXPERT}' has shape (63, 64), the rollout model (64, 64)",
        ),
    ],
    ids=["unknown", "repeated", "missing", "none at all", "misshapen"],
)
def test_weights_that_do_not_fit_are_named(
    change: Callable, message: str, folder_of: Callable[..., Path]
) -> None:
    folder = folder_of("qwen3_moe")
    engine = engine_of(folder)
    with pytest.raises(InputError) as error:
        engine.update_weights(change(load_file(folder / "model.safetensors")), version=1)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert engine.version == 0


def test_weights_that_are_not_finite_are_an_error(folder_of: Callable[..., Path]) -> None:
    folder = folder_of("qwen3")
    engine = engine_of(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = math.nan
    engine.update_weights(tensors.items(), version=7)
    with pytest.raises(NonFiniteError, match="not finite under the weights of step 7"):
        engine.generate(prompts_of(folder, TEXTS), SamplingParams())


# --- collect ---

SCRIPT = {"right": "aa", "wrong": "bb", "mixed": "ab", "mixed too": "ba", "wrong too": "bc"}


def collected(order: list[str], **options) -> tuple[Collected, ScriptedEngine]:
    """Collect steps of two prompts with two samples each; the answer "a" is correct."""
    engine = ScriptedEngine(SCRIPT)
    prompts = PromptStream(
        [Prompt(name, answer="a", input_ids=[1, 2]) for name in order], seed=0, shuffle=False
    )
    cfg = RolloutConfig(prompts_per_step=2, samples_per_prompt=2, **options)
    protocol: RolloutEngine = engine
    return Collector(protocol, prompts, arithmetic_reward, cfg).collect(), engine


def names(groups: dict[int, SampleGroup] | list[SampleGroup]) -> list[str]:
    return [g.prompt.id for g in (in_order(groups) if isinstance(groups, dict) else groups)]


def values(result: Collected) -> dict[str, float]:
    return {name: value_of(metric) for name, metric in result.metrics.items()}


def test_collect_hands_the_sampling_on_and_scores() -> None:
    chosen = {
        "max_new_tokens": 5,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 3,
        "stop": ("x",),
        "router_noise": 0.1,
    }
    result, engine = collected(["right", "mixed", "wrong"], **chosen)
    sampling = SamplingParams(n=2, **chosen)
    assert engine.calls == [(["right", "mixed"], sampling)]
    assert [(g.prompt.id, g.rewards) for g in in_order(result.groups)] == [
        ("right", [1.0, 1.0]),
        ("mixed", [1.0, 0.0]),
    ]
    assert values(result) == pytest.approx(
        {
            "reward/mean": 0.75,
            "reward/std": 0.25,
            "reward/timeouts": 0,
            "response_length/mean": 1,
            "response_length/max": 1,
            "rollout/truncated_fraction": 0,
            "rollout/dropped_groups": 0,
            "rollout/resample_rounds": 0,
        }
    )


def test_drop_leaves_groups_without_variance_out() -> None:
    result, engine = collected(["right", "mixed", "mixed too"], dynamic_sampling="drop")
    assert names(result.groups) == ["mixed"]
    assert len(engine.calls) == 1
    found = values(result)
    assert (found["rollout/dropped_groups"], found["rollout/resample_rounds"], found["reward/mean"]) == (
        1,
        0,
        0.75,
    )


def test_resample_draws_as_many_as_are_missing() -> None:
    result, engine = collected(
        ["right", "mixed", "wrong", "mixed too", "wrong too"], dynamic_sampling="resample"
    )
    assert [ids for ids, _ in engine.calls] == [["right", "mixed"], ["wrong"], ["mixed too"]]
    assert names(result.groups) == ["mixed", "mixed too"]
    found = values(result)
    assert (found["rollout/dropped_groups"], found["rollout/resample_rounds"]) == (2, 2)
    assert found["reward/mean"] == 0.5  # over all drawn groups
    assert found["reward/std"] == 0.25


def test_resampling_is_bounded() -> None:
    order = ["right", "mixed", "wrong", "mixed too"]
    result, engine = collected(order, dynamic_sampling="resample", max_resample_rounds=1)
    assert [ids for ids, _ in engine.calls] == [["right", "mixed"], ["wrong"]]
    assert names(result.groups) == ["mixed"]
    assert values(result)["rollout/resample_rounds"] == 1


@pytest.mark.parametrize(("mode", "rounds"), [("drop", 0), ("resample", 3)])
def test_without_any_variance_the_first_draw_is_kept(mode: str, rounds: int) -> None:
    result, engine = collected(["right", "wrong", "wrong too"], dynamic_sampling=mode, max_resample_rounds=3)
    assert len(engine.calls) == 1 + rounds
    assert names(result.groups) == ["right", "wrong"]
    found = values(result)
    assert found["rollout/dropped_groups"] == 2 * rounds  # the two kept groups are not counted
    assert found["rollout/resample_rounds"] == rounds
    assert result.groups[0].rewards == [1.0, 1.0]


def test_overlong_penalty_falls_linearly_over_the_buffer() -> None:
    cfg = RolloutConfig(max_new_tokens=10, overlong_buffer=4, overlong_penalty=0.5)
    found = [overlong_penalty(length, cfg) for length in range(11)]
    assert found == [0, 0, 0, 0, 0, 0, 0, -0.125, -0.25, -0.375, -0.5]
    assert overlong_penalty(10, RolloutConfig(max_new_tokens=10)) == 0


def penalized(script: dict[str, list[str]], mode: str) -> Collected:
    """Collect groups of three; responses of four and five tokens are penalized by 0.25 and 0.5."""
    engine = ScriptedEngine(script)
    prompts = PromptStream([Prompt(name, answer="a") for name in script], seed=0, shuffle=False)
    cfg = RolloutConfig(
        prompts_per_step=len(script),
        samples_per_prompt=3,
        max_new_tokens=5,
        overlong_buffer=2,
        overlong_penalty=0.5,
        dynamic_sampling=mode,
    )
    return Collector(engine, prompts, arithmetic_reward, cfg).collect()


@pytest.mark.parametrize("mode", ["off", "drop", "resample"])
def test_the_filter_judges_the_reward_before_the_penalty(mode: str) -> None:
    """DAPO's equation 11: a group stays if some of its responses, but not all, are right."""
    wrong, mixed = ["bbb", "bbbb", "bbbbbb"], ["b", "bb", "a"]
    result = penalized({"wrong": wrong, "mixed": mixed}, mode)
    assert names(result.groups)[:1] == (["wrong"] if mode == "off" else ["mixed"])
    rewards = {g.prompt.id: g.rewards for g in in_order(result.groups)}
    assert rewards["mixed"] == [0.0, 0.0, 1.0]
    assert mode != "off" or rewards["wrong"] == [0.0, -0.25, -0.5]


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    groups=st.lists(
        st.lists(st.sampled_from(["a", "b", "bbb", "bbbb", "bbbbb"]), min_size=3, max_size=3),
        min_size=1,
        max_size=4,
    )
)
def test_a_filtered_step_never_trains_on_length_alone(groups: list[list[str]]) -> None:
    script = {str(number): texts for number, texts in enumerate(groups)}
    result = penalized(script, "drop")
    both = [name for name, texts in script.items() if 0 < texts.count("a") < 3]
    assert names(result.groups) == (both or list(script))
    if not both:  # kept without their penalties: the advantages are 0
        assert all(len(set(group.rewards)) == 1 for group in result.groups.values())


@pytest.mark.parametrize(("buffer", "fits"), [(0, True), (9, True), (10, True), (11, False), (2**40, False)])
def test_the_buffer_is_not_longer_than_a_response(buffer: int, fits: bool) -> None:
    if fits:
        RolloutConfig(max_new_tokens=10, overlong_buffer=buffer)
        return
    with pytest.raises(ValueError, match=f"overlong_buffer = {buffer} is above max_new_tokens = 10: choose"):
        RolloutConfig(max_new_tokens=10, overlong_buffer=buffer)


def test_the_raw_mean_is_kept() -> None:
    result = penalized({"p": ["bbb", "bbbb", "bbbbbb"], "q": ["b", "bb", "a"]}, "drop")
    found = values(result)
    assert found["reward/raw_mean"] == pytest.approx(1 / 6)
    assert found["reward/mean"] == pytest.approx((1 - 0.75) / 6)
    assert found["response_length/max"] == 5
    assert found["rollout/truncated_fraction"] == pytest.approx(1 / 6)


def sample_of(length: int, reward: float) -> Sample:
    return Sample(
        [5] * (length + 2), [False] * 2 + [True] * length, [0.0] * (length + 2), "", "stop", 0, reward
    )


def test_figures_of_scored_groups() -> None:
    rewards = [[0.0, 1.0, 1.0, 0.5], [0.25, -1.0]]
    lengths = iter([3, 9, 1, 4, 7, 2])
    groups = [
        SampleGroup(Prompt(str(i), ""), [sample_of(next(lengths), r) for r in row])
        for i, row in enumerate(rewards)
    ]
    groups[0].samples[1].finish_reason = groups[1].samples[0].finish_reason = "length"
    found = {name: value_of(metric) for name, metric in rollout_figures(index_of(groups)).items()}
    assert found == pytest.approx(
        {
            "reward/mean": mean(value for row in rewards for value in row),
            "reward/std": mean(float(np.std(row)) for row in rewards),
            "response_length/mean": 26 / 6,
            "response_length/max": 9,
            "rollout/truncated_fraction": 2 / 6,
        }
    )


def episode_of(mask: str, finish_reason: FinishReason = "stop", **record: Any) -> Sample:
    """Return a sample whose mask has an s for each sampled token."""
    sampled = [kind == "s" for kind in mask]
    ended = {"stop": "done", "length": "tokens", "abort": "error"}[finish_reason]
    return Sample(
        [5] * len(mask),
        sampled,
        [-0.5 * kind for kind in sampled],
        "",
        finish_reason,
        0,
        episode=Episode(**{"ended": ended} | record),
    )


def episodes() -> list[SampleGroup]:
    first = [
        episode_of("ppsssoosos", name="pick", success=True, tool_calls=2, tool_errors=1, seconds=0.5),
        episode_of("ppss", "length", name="pick", success=False, ended="turns", seconds=0.25),
    ]
    second = [
        episode_of("psosos", name="look", success=True, tool_calls=3),
        episode_of("psoo", "length"),  # the environment says nothing of success, and has no name
        episode_of("pso", "abort", error="it raised"),
        episode_of("ps", success=False),
    ]
    return [SampleGroup(Prompt("a", ""), first), SampleGroup(Prompt("b", ""), second)]


def test_figures_of_episodes() -> None:
    """Sampled tokens and turns, by hand: 5 in 3, 2 in 1, 3 in 3, 1 in 1, 1 in 1 and 1 in 1."""
    found = {name: value_of(metric) for name, metric in episode_figures(episodes()).items()}
    assert found == pytest.approx(
        {
            "episode/turns": 10 / 6,
            "episode/tokens_per_turn": 13 / 10,
            "episode/tool_calls": 5 / 6,
            "episode/tool_errors": 1 / 6,
            "episode/environment_seconds": 0.75 / 6,
            "episode/ended_done": 3 / 6,
            "episode/ended_turns": 1 / 6,
            "episode/ended_tokens": 1 / 6,
            "episode/ended_error": 1 / 6,
            "episode/success": 2 / 4,
            "episode/success/pick": 1 / 2,
            "episode/success/look": 1.0,
        }
    )
    assert episode_figures([SampleGroup(Prompt("p", ""), [sample_of(3, 1.0)])]) == {}
    silent = episode_figures([SampleGroup(Prompt("p", ""), [episode_of("ps")])])
    assert not [name for name in silent if "success" in name]


def test_a_replayed_step_has_the_figures_of_its_episodes() -> None:
    metrics = replayed(dict(enumerate(episodes()))).metrics
    assert {name: value_of(metrics[name]) for name in episode_figures(episodes())} == pytest.approx(
        {name: value_of(metric) for name, metric in episode_figures(episodes()).items()}
    )


def test_the_index_counts_turns_and_the_tokens_after_the_prompt() -> None:
    groups = [*episodes(), SampleGroup(Prompt("c", ""), [episode_of("ppp")])]
    for index in (StepIndex.gather(dict(enumerate(groups)), 3), index_of(groups)):
        assert index.turns.tolist() == [3, 1, 3, 1, 1, 1, 0]
        assert index.response_length.tolist() == [5, 2, 3, 1, 1, 1, 0]
        assert index.episode_length.tolist() == [8, 2, 5, 3, 2, 1, 0]
        assert index.units("turn").tolist() == index.turns.tolist()
        assert index.units("episode").tolist() == [1, 1, 1, 1, 1, 1, 0]
        left = index.without_truncated()
        assert left.turns.tolist() == [3, 0, 3, 0, 1, 1, 0]
        assert left.units("episode").tolist() == [1, 0, 1, 0, 1, 1, 0]


def test_the_overlong_penalty_of_an_episode_reaches_its_limit_where_the_episode_does() -> None:
    """The limit, max_episode_tokens, counts observations, so a truncated episode has the whole penalty."""
    cfg = RolloutConfig(
        environment="m:E", max_new_tokens=2, max_episode_tokens=8, overlong_buffer=4, overlong_penalty=1.0
    )
    lengths = StepIndex.gather(dict(enumerate(episodes())), 2).episode_length
    assert overlong_penalty(lengths, cfg).tolist() == [-1.0, 0, -0.25, 0, 0, 0]


def test_scores_keep_their_place_however_long_they_take() -> None:
    engine = ScriptedEngine({name: [f"{name}{i}" for i in range(4)] for name in "pqr"})
    groups = in_order(engine.generate([Prompt(name, "") for name in "pqr"], SamplingParams(n=4)))

    def slow_first(prompt: Prompt, text: str) -> float:
        time.sleep(0.01 * (3 - int(text[1])))
        return 10.0 * "pqr".index(prompt.id) + int(text[1])

    assert score(dict(enumerate(groups)), slow_first) == 0
    assert [g.rewards for g in groups] == [[0, 1, 2, 3], [10, 11, 12, 13], [20, 21, 22, 23]]


def test_the_reward_of_an_episode_may_be_its_environments() -> None:
    def sample(reward: float, environment: float | None) -> Sample:
        episode = None if environment is None else Episode("done", reward=environment)
        return Sample.from_response(
            [1], [2], [-1.0], text=str(reward), finish_reason="stop", policy_version=0, episode=episode
        )

    samples = [sample(1, 0.25), sample(2, -3)]
    groups = {0: SampleGroup(Prompt("p", ""), samples)}
    score(groups, resolve_reward(RewardConfig(name="environment")))
    assert groups[0].rewards == [0.25, -3.0]
    score(groups, lambda prompt, text: float(text))
    assert groups[0].rewards == [1.0, 2.0]
    samples.append(sample(3, None))
    with pytest.raises(InputError, match=r"^reward.name = 'environment', but p was not answered in an env"):
        score(groups, resolve_reward(RewardConfig(name="environment")))


def test_timeouts_are_counted_a_step() -> None:
    class Impatient:
        timeouts = 5  # from earlier steps

        def __call__(self, prompt: Prompt, text: str) -> float:
            self.timeouts += text == "b"
            return 0.0

    engine = ScriptedEngine(SCRIPT)
    prompts = PromptStream([Prompt(name, "") for name in SCRIPT], seed=0, shuffle=False)
    cfg = RolloutConfig(
        prompts_per_step=1, samples_per_prompt=2, dynamic_sampling="resample", max_resample_rounds=2
    )
    # The responses are "aa", "bb" and "ab".
    assert values(Collector(engine, prompts, Impatient(), cfg).collect())["reward/timeouts"] == 3


class AheadEngine(ScriptedEngine):
    """Engine whose samples have the version at ``submit``, minus ``late`` steps."""

    def __init__(self, script: dict[str, str], late: dict[str, int] | None = None) -> None:
        super().__init__(script)
        self.late = late or {}
        self.submitted: list[tuple[int, list[str]]] = []

    def submit(self, prompts: list[Prompt], sampling: SamplingParams) -> dict[int, SampleGroup]:
        self.submitted.append((self.version, [p.id for p in prompts]))
        groups = self.generate(prompts, sampling)
        for group in groups.values():
            group.samples[0].policy_version -= self.late.get(group.prompt.id, 0)
        return groups

    def wait(self, ticket: dict[int, SampleGroup]) -> dict[int, SampleGroup]:
        return ticket


def test_generation_runs_ahead_by_the_staleness_and_no_further_than_the_last_step() -> None:
    engine = AheadEngine(SCRIPT)
    stream = PromptStream([Prompt(name, answer="a") for name in SCRIPT], seed=0, shuffle=False)
    cfg = RolloutConfig(engine="sglang", prompts_per_step=1, samples_per_prompt=2, max_staleness=2)
    collector = Collector(engine, stream, arithmetic_reward, cfg)
    trained, ages, positions = [], [], []
    for step in range(5):
        engine.update_weights([], step)
        positions.append(collector.state_dict()["position"])
        result = collector.collect(steps_left=5 - step)
        trained += names(result.groups)
        ages.append(values(result)["rollout/staleness_max"])
    assert trained == list(SCRIPT)
    assert engine.submitted == [
        (0, ["right"]),
        (0, ["wrong"]),
        (0, ["mixed"]),
        (1, ["mixed too"]),
        (2, ["wrong too"]),
    ]
    assert ages == [0, 1, 2, 2, 2]
    assert positions == [0, 1, 2, 3, 4]  # a resume draws the prompts in flight again
    assert collector.state_dict() == stream.state_dict()


def test_what_was_generated_ahead_can_be_dropped() -> None:
    engine = AheadEngine(SCRIPT)
    stream = PromptStream([Prompt(name, answer="a") for name in SCRIPT], seed=0, shuffle=False)
    cfg = RolloutConfig(engine="sglang", prompts_per_step=1, samples_per_prompt=2, max_staleness=2)
    collector = Collector(engine, stream, arithmetic_reward, cfg)
    engine.update_weights([], 0)
    assert names(collector.collect(steps_left=5).groups) == ["right"]
    redeemed, wait = [], engine.wait
    engine.wait = lambda ticket: redeemed.append(ticket[0].prompt.id) or wait(ticket)
    collector.drop_ahead()
    assert redeemed == ["wrong", "mixed"]  # the engine has no unfinished requests
    assert collector.state_dict() == stream.state_dict()
    assert names(collector.collect(steps_left=2).groups) == ["mixed too"]


def test_stale_groups_are_dropped_whole_and_counted() -> None:
    engine = AheadEngine({"old": ["a"], "fresh": ["a"]}, late={"old": 2})
    stream = PromptStream([Prompt("old", answer="a"), Prompt("fresh", answer="a")], seed=0, shuffle=False)
    cfg = RolloutConfig(engine="sglang", prompts_per_step=2, samples_per_prompt=3, max_staleness=1)
    engine.update_weights([], 4)
    result = Collector(engine, stream, arithmetic_reward, cfg).collect()
    assert names(result.groups) == ["fresh"]
    assert values(result)["rollout/stale_groups"] == 1
    engine.late = {"old": 2, "fresh": 2}  # all groups are stale: the prompts are sampled again
    again = Collector(engine, stream, arithmetic_reward, cfg).collect()
    assert names(again.groups) == ["old", "fresh"]
    assert values(again)["rollout/stale_groups"] == 2
    assert values(again)["rollout/staleness_max"] == 0


class FailingEngine(AheadEngine):
    """Engine of episodes, of which the last one fails for these prompts, before its first turn."""

    def __init__(self, script: dict[str, str], fails: set[str], late: dict[str, int] | None = None) -> None:
        super().__init__(script, late)
        self.fails = fails
        self.draws: list[int] = []

    def generate(self, prompts: list[Prompt], sampling: SamplingParams) -> dict[int, SampleGroup]:
        self.draws.append(sampling.draw)
        groups = super().generate(prompts, sampling)
        for group in groups.values():
            for sample in group.samples:
                sample.episode = Episode("done")
            if group.prompt.id in self.fails:
                sample = group.samples[-1]
                sample.finish_reason, sample.policy_version = "abort", -1
                sample.episode = Episode("error", error=f"{group.prompt.id} is broken")
        return groups


def of_episodes(fake: FailingEngine, names: list[str], **options: Any) -> Collector:
    stream = PromptStream([Prompt(name, answer="a") for name in names], seed=0, shuffle=False)
    cfg = RolloutConfig(environment="m:Room", prompts_per_step=2, samples_per_prompt=2, **options)
    return Collector(fake, stream, arithmetic_reward, cfg)


@pytest.mark.parametrize("max_staleness", [0, 1])
def test_groups_with_a_failed_episode_are_left_out_whole_and_counted(
    max_staleness: int, caplog: pytest.LogCaptureFixture
) -> None:
    """The failed episode has no weights that sampled it, and its group is not taken for a stale one."""
    engine = FailingEngine(SCRIPT, {"mixed"})
    options = {"engine": "sglang", "max_staleness": max_staleness}
    result = of_episodes(engine, ["mixed", "right"], **options).collect()
    assert names(result.groups) == ["right"]
    assert values(result)["rollout/failed_groups"] == values(result)["rollout/environment_errors"] == 1
    assert values(result)["rollout/dropped_groups"] == values(result).get("rollout/stale_groups", 0) == 0
    assert values(result)["reward/mean"] == 1  # of "right" alone
    assert result.index.num_groups == 1
    assert caplog.messages == [
        "warning: environments failed in 1 groups of the step, which are left out, first in sample 1 of "
        "prompt mixed: mixed is broken"
    ]


def test_figures_of_episodes_include_groups_that_are_left_out() -> None:
    found = values(of_episodes(FailingEngine(SCRIPT, {"mixed"}), ["mixed", "right"]).collect())
    assert found["episode/ended_error"] == 1 / 4
    assert found["episode/ended_done"] == 3 / 4


class ObservingEngine(ScriptedEngine):
    """Engine whose dots are tokens of observations."""

    def generate(self, prompts: list[Prompt], sampling: SamplingParams) -> dict[int, SampleGroup]:
        groups = super().generate(prompts, sampling)
        for sample in (sample for group in groups.values() for sample in group.samples):
            seen = sample.tokens == ord(".")
            sample.response_mask = sample.response_mask & ~seen
            sample.rollout_logprobs = np.where(seen, np.float32(0), sample.rollout_logprobs)
        return groups


def test_the_collector_penalizes_the_length_of_an_episode_with_its_observations() -> None:
    """Limit 6, buffer 2: 0 up to 4 tokens, -0.5 at 5 and -1 at 6."""
    engine = ObservingEngine({"p": ["b..b", "bb..b", "b....b"]})
    stream = PromptStream([Prompt("p", answer="a", input_ids=[1])], seed=0, shuffle=False)
    limits = {"max_new_tokens": 6, "max_episode_tokens": 6, "overlong_buffer": 2}
    cfg = RolloutConfig(environment="m:E", prompts_per_step=1, samples_per_prompt=3, **limits)
    result = Collector(engine, stream, arithmetic_reward, cfg).collect()
    assert result.groups[0].rewards == [0.0, -0.5, -1.0]
    assert values(result)["response_length/mean"] == 7 / 3


def test_failed_groups_are_resampled() -> None:
    """Seeds of environments follow the place of a prompt in the stream."""
    engine = FailingEngine(SCRIPT | {"mixed 3": "ba"}, {"mixed", "wrong"})
    order = ["mixed", "wrong", "right", "mixed too", "right", "mixed 3"]
    result = of_episodes(engine, order, dynamic_sampling="resample").collect()
    assert names(result.groups) == ["mixed too", "mixed 3"]
    assert [ids for ids, _ in engine.calls] == [order[:2], order[2:4], order[4:5], order[5:]]
    assert engine.draws == [0, 2, 4, 5]
    assert values(result)["rollout/failed_groups"] == 2


def test_a_step_in_which_every_group_fails_ends_the_run() -> None:
    engine = FailingEngine(SCRIPT, {"mixed", "right"})
    with pytest.raises(
        RunError, match="failed in all 2 groups of the step, first in sample 1 of prompt mixed"
    ):
        of_episodes(engine, ["mixed", "right"]).collect()
    with pytest.raises(RunError, match=r"all 4 groups of the step.*: mixed is broken"):
        of_episodes(engine, ["mixed", "right"], dynamic_sampling="resample", max_resample_rounds=1).collect()


def test_only_the_last_group_of_stale_ones_fails() -> None:
    """All other groups are stale: all prompts are sampled again, and one group fails again."""
    engine = FailingEngine(SCRIPT, {"mixed"}, late={"right": 2})
    engine.update_weights([], 4)
    result = of_episodes(engine, ["mixed", "right"], engine="sglang", max_staleness=1).collect()
    assert names(result.groups) == ["right"]
    assert engine.draws == [0, 0]
    assert values(result)["rollout/stale_groups"] == 1
    assert values(result)["rollout/failed_groups"] == 2


def test_staleness_is_counted_by_token() -> None:
    engine = AheadEngine({"p": ["abc"]})
    stream = PromptStream([Prompt("p", answer="a", input_ids=[1])], seed=0, shuffle=False)
    engine.update_weights([], 5)
    collector = Collector(
        engine,
        stream,
        arithmetic_reward,
        RolloutConfig(engine="sglang", prompts_per_step=1, samples_per_prompt=1, max_staleness=2),
    )
    wait = engine.wait

    def partial_rollout(ticket: dict[int, SampleGroup]) -> dict[int, SampleGroup]:
        sample = ticket[0].samples[0]
        sample.version_spans, sample.policy_version = version_spans_of([3, 3, 5], start=1), 3
        return wait(ticket)

    engine.wait = partial_rollout
    found = values(collector.collect())
    assert found["rollout/staleness_mean"] == pytest.approx(4 / 3)
    assert found["rollout/staleness_max"] == 2


def test_an_error_in_the_reward_is_not_swallowed() -> None:
    groups = in_order(ScriptedEngine(SCRIPT).generate([Prompt("right", "")], SamplingParams(n=2)))
    with pytest.raises(ZeroDivisionError):
        score(dict(enumerate(groups)), lambda prompt, text: 1 / 0)


# --- rollouts on disk ---

COLUMNS = {"tokens", "response_mask", "rollout_logprobs", "routed_experts", "version_spans"}
# As float32, the values include the smallest and the largest.
FLOATS = [
    0.1,
    -1 / 3,
    1e-45,
    3.4028235e38,
    -0.0,
    math.pi * 1e-9,
    -2.7182817,
]


VOCAB = 10


def groups_to_save() -> list[SampleGroup]:
    experts = np.random.default_rng(0).integers(-1, 128, (7, 3, 2), dtype=np.int16)
    chat = Prompt(
        "set/1",
        answer="42\u2028\n",
        messages=[{"role": "user", "content": "¿6*7?\x85"}],
        input_ids=[3, 2, 1],
    )
    plain = Prompt("set/2", answer="", text='"quoted"\n', input_ids=[9])
    moe = Sample(
        [3, 2, 1, 4, 5, 6, 7, 8],
        [False] * 3 + [True] * 5,
        [0.0, *FLOATS],
        "Zoë 🍎",
        "length",
        7,
        -1 / 7,
        experts,
        version_spans_of([5, 5, 6, 7, 7], start=3),
    )
    other = Sample([3, 2, 1, 0], [False] * 3 + [True], [0.0] * 3 + [-5.5], "", "abort", 6)
    empty = replace(other, routed_experts=np.zeros((0, 3, 2), np.int16), finish_reason="stop")
    few = replace(moe, routed_experts=experts & 15)
    return [SampleGroup(chat, [moe, other]), SampleGroup(plain, [empty, few])]


def test_saved_groups_come_back_exactly(tmp_path: Path) -> None:
    groups = groups_to_save()
    save_groups(tmp_path / "new" / "folder", 12, dict(enumerate(groups)))
    loaded = load_groups(tmp_path / "new" / "folder", 12, VOCAB)
    found = sorted(str(p.relative_to(tmp_path / "new")) for p in (tmp_path / "new").rglob("*.json*"))
    assert found == ["folder/step_000012/index.json", "folder/step_000012/rank_00000.jsonl"]
    for a, b in zip(
        (s for g in groups for s in g.samples), (s for g in loaded for s in g.samples), strict=True
    ):
        for name in COLUMNS:
            wanted, found = getattr(a, name), getattr(b, name)
            if wanted is None:
                assert found is None
            else:
                assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
                assert found.tobytes() == wanted.tobytes()  # tells -0.0 from 0.0
    assert loaded == groups
    dtypes = [str(getattr(s.routed_experts, "dtype", None)) for g in loaded for s in g.samples]
    assert dtypes == ["int16", "None", "uint8", "uint8"]


def episode_to_save() -> Sample:
    """Return an episode of two turns with an observation between them."""
    said = [
        {"role": "assistant", "content": "go <b>"},
        {"role": "user", "content": "A wall.\u2028"},
        {"role": "assistant", "content": "back"},
        {"role": "tool", "content": "Free.", "tool_call_id": "a1"},
    ]
    episode = Episode("done", "rooms", 0.1, True, 2, 1, 0.25, said)
    return Sample(
        [3, 2, 4, 5, 6, 7, 8],
        [False, False, True, True, False, False, True],
        [0.0, 0.0, -0.5, -0.25, 0.0, 0.0, -2.0],
        "go <b>\nback",
        "stop",
        6,
        1.5,
        np.zeros((6, 3, 2), np.uint8),
        version_spans_of([6, 6, 6, 6, 7], start=2),
        episode,
    )


def test_saved_episodes_come_back_exactly(tmp_path: Path) -> None:
    failed = replace(episode_to_save(), episode=Episode("error", error="it hung"), finish_reason="abort")
    plain = groups_to_save()[0].samples[0]
    group = SampleGroup(groups_to_save()[0].prompt, [episode_to_save(), failed, plain])
    save_groups(tmp_path, 2, {0: group})
    assert load_groups(tmp_path, 2, VOCAB) == [group]


def test_transcripts_show_turns(tmp_path: Path) -> None:
    group = SampleGroup(groups_to_save()[0].prompt, [episode_to_save()])
    append_transcripts(tmp_path / "transcripts.jsonl", 1, {0: group}, limit=1)
    (sample,) = json.loads((tmp_path / "transcripts.jsonl").read_text())["samples"]
    assert sample == {
        "text": "go <b>\nback",
        "reward": 1.5,
        "finish_reason": "stop",
        "length": 3,
        "turns": [
            {"role": "assistant", "content": "go <b>"},
            {"role": "user", "content": "A wall.\u2028"},
            {"role": "assistant", "content": "back"},
            {"role": "tool", "content": "Free.", "tool_call_id": "a1"},
        ],
        "episode": {
            "ended": "done",
            "name": "rooms",
            "reward": 0.1,
            "success": True,
            "tool_calls": 2,
            "tool_errors": 1,
            "seconds": 0.25,
            "error": "",
        },
    }


def test_half_characters_of_an_environment_are_written_escaped(tmp_path: Path) -> None:
    said = [{"role": "user", "content": "A wall.", "name": "\ud800"}]
    sample = replace(episode_to_save(), episode=Episode("done", messages=said))
    append_transcripts(
        tmp_path / "transcripts.jsonl", 1, {0: SampleGroup(Prompt("p", ""), [sample])}, limit=1
    )
    (read,) = json.loads((tmp_path / "transcripts.jsonl").read_text())["samples"]
    assert read["turns"] == said


def test_groups_saved_as_lists_are_read(tmp_path: Path) -> None:
    """Older files have lists, one version per token, and experts under ``int16``."""
    groups = groups_to_save()
    with (tmp_path / "step_000003.jsonl").open("w") as file:
        for group in groups:
            record = asdict(group)
            for sample, fields in zip(group.samples, record["samples"], strict=True):
                for name in ("tokens", "response_mask", "rollout_logprobs"):
                    fields[name] = fields[name].tolist()
                del fields["episode"]
                spans, experts = fields.pop("version_spans"), fields["routed_experts"]
                fields["token_versions"] = None if spans is None else sample.token_versions.tolist()
                if experts is not None:
                    text = base64.b64encode(experts.astype("<i2").tobytes()).decode()
                    fields["routed_experts"] = {"shape": experts.shape, "int16": text}
            file.write(json.dumps(record) + "\n")
    loaded = load_groups(tmp_path, 3, VOCAB)
    for a, b in zip(
        (s for g in groups for s in g.samples), (s for g in loaded for s in g.samples), strict=True
    ):
        assert a.token_versions.tolist() == b.token_versions.tolist()
        for name in COLUMNS - {"version_spans"}:
            assert getattr(a, name) is None or getattr(a, name).dtype == getattr(b, name).dtype
        assert replace(a, version_spans=None) == replace(b, version_spans=None)
    assert [g.prompt for g in loaded] == [g.prompt for g in groups]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save_groups(tmp_path, 0, dict(enumerate(groups_to_save())))
    save_groups(tmp_path, 0, dict(enumerate(groups_to_save()[1:])))
    assert names(load_groups(tmp_path, 0, VOCAB)) == ["set/2"]


def test_steps_that_are_missing_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        InputError,
        match=r"rollout\.replay_path = '.*' has no groups for step 3, it has no steps at all: save them",
    ):
        load_groups(tmp_path / "nowhere", 3, VOCAB)
    for step in (2, 3, 10):
        save_groups(tmp_path, step, dict(enumerate(groups_to_save())))
    check_groups(tmp_path, [2, 3, 10])
    with pytest.raises(InputError, match="has no groups for step 4, it has steps 2 to 10") as error:
        check_groups(tmp_path, range(2, 11))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "broken",
    [
        lambda line: line[: len(line) // 2],
        lambda line: "[1, 2]",
        lambda line: line.replace('"prompt"', '"prompts"', 1),
        lambda line: line.replace('"finish_reason"', '"finish"', 1),
        lambda line: line.replace(
            '"shape": [7, 3, 2], "base64": "', '"shape": [7, 3, 2], "base64": "AAAA', 1
        ),
        lambda line: line.replace('"dtype": "int32", "shape": [8]', '"dtype": "float32", "shape": [8]', 1),
        lambda line: line.replace('"dtype": "bool", "shape": [8]', '"dtype": "bool", "shape": [4, 2]', 1),
    ],
    ids=[
        "cut short",
        "no group",
        "no prompt",
        "unknown field",
        "experts of another shape",
        "tokens of another type",
        "mask of another shape",
    ],
)
def test_a_broken_line_is_named(broken: Callable[[str], str], tmp_path: Path) -> None:
    save_groups(tmp_path, 1, dict(enumerate(groups_to_save()[::-1])))
    file = tmp_path / "step_000001" / "rank_00000.jsonl"
    first, second = file.read_text().splitlines()
    assert broken(second) != second
    file.write_text(f"{first}\n{broken(second)}\n")
    with pytest.raises(
        InputError,
        match=r"rollout\.replay_path: line 2(, sample 0)? of .*rank_00000\.jsonl is broken \(.*\): save ",
    ) as error:
        load_groups(tmp_path, 1, VOCAB)
    assert "\n" not in str(error.value)


def test_only_the_groups_that_are_asked_for_are_read(tmp_path: Path) -> None:
    save_groups(tmp_path, 1, dict(enumerate(groups_to_save())))
    file = tmp_path / "step_000001" / "rank_00000.jsonl"
    file.write_text(file.read_text().splitlines()[0] + "\nbroken\n")
    assert load_groups(tmp_path, 1, VOCAB, slice(1)) == groups_to_save()[:1]
    with pytest.raises(InputError, match="line 2 of"):
        load_groups(tmp_path, 1, VOCAB, slice(2))


def with_field(name: str, value: Any) -> Callable[[Record], None]:
    return lambda sample: sample.update({name: value})


def with_token(value: int) -> Callable[[Record], None]:
    return with_field("tokens", [3, 2, value, 1])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (with_token(VOCAB), "token id 10 is outside the vocabulary of 10"),
        (with_token(-1), "token id -1 is outside the vocabulary of 10"),
        (with_token(2**31), "Sample.tokens has 2147483648, which does not fit int32"),
        (with_token(2**32 + 5), "Sample.tokens has 4294967301, which does not fit int32"),
        (with_token(2**70), "int"),
        (
            lambda sample: sample.update(tokens=[], response_mask=[], rollout_logprobs=[]),
            "does not start with a prompt token",
        ),
        (
            with_field("tokens", [3, 2, 1]),
            r"response_mask has dtype bool and shape \(4,\), not bool and \(3,\)",
        ),
        (with_field("tokens", "3 2 1 0"), "tokens has dtype <U7"),
        (with_field("tokens", None), "tokens has dtype object"),
        (with_field("tokens", [[3, 2, 1, 0]]), "tokens has dtype"),
        (with_field("tokens", [3.5, 2, 1, 0]), "tokens has dtype float64"),
        (with_field("tokens", {"dtype": "object", "shape": [1], "base64": "AAAAAAAAAAA="}), "OBJECT"),
        (with_field("tokens", {"dtype": "int32", "shape": [10**9, 10**9], "base64": ""}), "reshape|size"),
        (with_field("response_mask", [True] * 4), "does not start with a prompt token"),
        (with_field("rollout_logprobs", [0, 0, 0, math.nan]), "a log probability is not finite"),
        (with_field("rollout_logprobs", [0, 0, 0, -math.inf]), "a log probability is not finite"),
        (with_field("rollout_logprobs", [math.nan, 0, 0, -1]), "a log probability is not finite"),
        (with_field("rollout_logprobs", [0, 0, -1]), r"rollout_logprobs has dtype int64 and shape \(3,\)"),
        (with_field("version_spans", [[3, 5], [3, 6]]), r"version_spans start at \[3, 3\] of 4 tokens"),
        (with_field("version_spans", [[3, 5], [4, 6]]), r"version_spans start at \[3, 4\] of 4 tokens"),
        (with_field("version_spans", [[-1, 5]]), r"version_spans start at \[-1\] of 4 tokens"),
        (with_field("token_versions", "7"), r"token_versions has dtype <U1 and shape \(\)"),
        (with_field("token_versions", 7), r"token_versions has dtype int64 and shape \(\)"),
        (with_field("token_versions", [[-1, -1, -1, 5]]), r"token_versions has dtype .* shape \(1, 4\)"),
        (with_field("token_versions", [-1, -1, -1, 5.5]), "token_versions has dtype float64"),
        (with_field("token_versions", [-1, -1, -1, 2**31]), "token_versions has 2147483648, which does not"),
        (with_field("token_versions", [-1] * 4 + [5]), r"version_spans start at \[0, 4\] of 4 tokens"),
        (with_field("routed_experts", [[[0.5]]]), "expert ids have dtype float64"),
        (with_field("routed_experts", [[[70_000]]]), "expert ids from 70000 to 70000 do not fit 16 bits"),
        (with_field("text", None), "text = None is not text"),
        (with_field("finish_reason", "done"), "finish_reason = 'done' is not one of"),
        (with_field("finish_reason", ["stop"]), "finish_reason = .* is not one of"),
        (with_field("policy_version", 2.5), "policy_version = 2.5 is not a training step"),
        (with_field("policy_version", 10**12), "policy_version = 10{12} is not a training step"),
        (with_field("reward", math.nan), "reward = nan is not a finite number"),
        (with_field("reward", 10**400), "int too large|reward"),
        (with_field("reward", "1"), "reward = '1' is not a finite number"),
        (with_field("episode", "won"), "[Ee]pisode"),
        (with_field("episode", {}), "ended"),
        (with_field("episode", {"ended": "won"}), "ended"),
        (with_field("episode", {"ended": "done", "messages": ["look"]}), "messages"),
        (with_field("episode", {"ended": "done", "reward": math.inf}), "episode.reward = inf is not finite"),
        (with_field("episode", {"ended": "done", "tool_calls": -1}), "episode.tool_calls = -1 is not"),
        (with_field("episode", {"ended": "done", "tool_errors": 2**31}), "episode.tool_errors = 2147483648"),
        (with_field("episode", {"ended": "done", "seconds": math.nan}), "episode.seconds = nan is not"),
        (with_field("odd", 1), "unexpected keyword argument 'odd'"),
        (lambda sample: sample.pop("text"), "missing .* 'text'"),
        (dict.clear, "missing"),
    ],
)
def test_a_sample_that_cannot_be_trained_on_is_named(
    change: Callable[[Record], Any], reason: str, tmp_path: Path
) -> None:
    """The sample is the second of the first group. The reasons follow from the docstring of ``Sample``."""
    save_groups(tmp_path, 1, dict(enumerate(groups_to_save())))
    file = tmp_path / "step_000001" / "rank_00000.jsonl"
    first, second = map(json.loads, file.read_text().splitlines())
    change(first["samples"][1])
    file.write_text(f"{json.dumps(first)}\n{json.dumps(second)}\n")
    with pytest.raises(InputError) as error:
        load_groups(tmp_path, 1, VOCAB)
    line = rf"rollout\.replay_path: line 1, sample 1 of .*rank_00000\.jsonl is broken \(.*({reason}).*\): "
    assert re.match(line, str(error.value)), error.value
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "has no groups"),
        (b"\xff\xfe\n", "line 1 of .* is broken"),
        (b"[" * 100_000 + b"\n", "line 1 of .* is broken"),
        (b'{"prompt": {"id": "p", "answer": ""}, "samples": []}\n', "one without samples"),
        (b'{"prompt": {"id": "p", "answer": ""}, "samples": 3}\n', "line 1 of .* is broken"),
        (b'{"prompt": {"id": "p", "answer": ""}, "samples": {"a": 1}}\n', "line 1, sample 0 of .* is broken"),
        (b'{"prompt": {"id": 7, "answer": ""}, "samples": []}\n', "line 1 of .* is broken .*id"),
        (
            b'{"prompt": {"id": "p", "answer": "", "input_ids": ["x"]}, "samples": []}\n',
            "line 1 of .* is broken",
        ),
        (b'{"prompt": null, "samples": []}\n', "line 1 of .* is broken"),
    ],
)
def test_a_file_that_holds_no_groups_is_named(content: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "step_000001.jsonl").write_bytes(content)
    with pytest.raises(InputError, match=rf"^rollout\.replay_path: .*{reason}") as error:
        load_groups(tmp_path, 1, VOCAB)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("index", "line"),
    [
        (b"", "index.json is broken: save the step again"),
        (b"[", "index.json is broken: save the step again"),
        (b'[["../step_000000/rank_00000.jsonl", 0]]', "index.json is broken: save the step again"),
        (b'[["rank_00000.jsonl", -1]]', "index.json is broken: save the step again"),
        (b'[["rank_00000.jsonl"]]', "index.json is broken: save the step again"),
        (b"[]", "index.json has no groups, or one without samples: save it again"),
        (b'[["rank_00007.jsonl", 0]]', "rank_00007.jsonl is missing, which index.json names: copy all files"),
        (b'[["rank_00000.jsonl", 3]]', "line 1 of .*rank_00000.jsonl is broken .*: save "),
        (b'[["rank_00000.jsonl", 9000000]]', "line 1 of .*rank_00000.jsonl is broken .*: save "),
    ],
)
def test_a_broken_index_of_shards_is_refused(index: bytes, line: str, tmp_path: Path) -> None:
    save_groups(tmp_path, 1, dict(enumerate(groups_to_save())))
    (tmp_path / "step_000001" / "index.json").write_bytes(index)
    with pytest.raises(InputError, match=rf"^rollout\.replay_path: .*{line}") as error:
        load_groups(tmp_path, 1, VOCAB)
    assert "\n" not in str(error.value)


def test_transcripts_are_for_people(tmp_path: Path) -> None:
    file = tmp_path / "transcripts.jsonl"
    groups = groups_to_save()
    append_transcripts(file, 1, dict(enumerate(groups)), limit=1)
    append_transcripts(file, 2, dict(enumerate(groups)), limit=9)
    append_transcripts(file, 3, dict(enumerate(groups)), limit=0)
    assert "Zoë 🍎" in file.read_text()
    lines = [json.loads(line) for line in file.read_bytes().split(b"\n")[:-1]]
    assert [(line["step"], line["prompt_id"]) for line in lines] == [(1, "set/1"), (2, "set/1"), (2, "set/2")]
    assert lines[0] == {
        "step": 1,
        "prompt_id": "set/1",
        "prompt": groups[0].prompt.messages,
        "answer": "42\u2028\n",
        "samples": [
            {"text": "Zoë 🍎", "reward": -1 / 7, "finish_reason": "length", "length": 5},
            {"text": "", "reward": 0.0, "finish_reason": "abort", "length": 1},
        ],
    }
    assert lines[2]["prompt"] == '"quoted"\n'


def test_a_resume_draws_what_was_not_trained_on(tmp_path: Path) -> None:
    """After any step, with resampling and steps generated ahead: the next steps train on the same prompts."""
    script = {f"{i}": ["a", "b"] if i % 5 % 2 else ["b", "b"] for i in range(90)}  # two of five vary
    cfg = RolloutConfig(
        engine="sglang",
        prompts_per_step=3,
        samples_per_prompt=2,
        max_staleness=2,
        dynamic_sampling="resample",
        max_resample_rounds=2,
    )

    def run(state: str, steps: range) -> tuple[list[list[str]], list[str], int]:
        """Return the prompts of each step, the state after each step, and the number of prompts drawn."""
        engine = AheadEngine(script)
        stream = PromptStream([Prompt(name, answer="a") for name in script], seed=1, shuffle=True)
        if state:
            stream.load_state_dict(StreamState.model_validate(json.loads(state)))
        collector = Collector(engine, stream, arithmetic_reward, cfg)
        trained, states = [], []
        for step in steps:
            engine.update_weights([], step)
            trained.append(names(collector.collect(steps_left=8 - step).groups))
            states.append(json.dumps(collector.state_dict()))
        return trained, states, sum(len(drawn) for drawn, _ in engine.calls)

    trained, states, drawn = run("", range(8))
    assert drawn > 8 * 3  # prompts were drawn between those that were generated ahead
    assert len({name for step in trained for name in step}) == sum(map(len, trained))
    for step in range(1, 8):
        resumed, _, _ = run(states[step - 1], range(step, 8))
        assert resumed == trained[step:]
