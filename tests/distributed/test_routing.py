"""Routing replay: every layout trains on the recorded experts like a float64 model forced to use them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from megatron_gmpo.batch.assembly import whole_batch
from megatron_gmpo.batch.columns import TrainBatch
from megatron_gmpo.batch.samples import Prompt
from megatron_gmpo.config import Config
from megatron_gmpo.rollout.embedded import EmbeddedEngine
from megatron_gmpo.rollout.engine import SamplingParams
from megatron_gmpo.testing.tiny_tokenizers import text_tokenizer

from ..support import cases, reference
from ..support.groups import in_order
from ..support.ranks import RankPool
from .test_layouts import (
    CLIP,
    CLIP_GRAD,
    EP,
    EPS,
    LR,
    MOE,
    PP,
    STEPS,
    VPP,
    Reference,
    check,
    config,
    distance,
    make_batch,
)
from .test_layouts import LAYOUTS as DATA

pytestmark = pytest.mark.distributed

LAYOUTS = {
    **{
        name: (DATA | MOE)[name][:2]
        for name in ("one rank", "dp2", "tp2 ep2", "cp2 ep2", "tp2 cp2 ep2", "pp2 cp2 ep2")
    },
    "pp2 vpp2 ep2": (4, {PP: 2, VPP: 2, EP: 2}),
}
RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


@pytest.fixture(scope="session")
def batch() -> TrainBatch:
    """Return the batch of the layout tests with all tokens different."""
    plain = make_batch()
    tokens = 3 + torch.randperm(256, generator=torch.Generator().manual_seed(3))[: len(plain.tokens)]
    return replace(plain, tokens=tokens)


@pytest.fixture(scope="session")
def own(expected: Reference, batch: TrainBatch) -> Tensor:
    """Return the model's own choice of experts, (L, layers, topk)."""
    return reference.own_routing(expected.model("qwen3_moe"), batch)


def train_forced(path: Path, batch: TrainBatch, folder: Path, **options: Any) -> dict[str, Any]:
    """Train the reference with random experts; return its results and the batch with their record.

    Like an engine's record, it has no experts for last tokens.
    """
    experts = torch.rand(len(batch.tokens), 4, 4, generator=torch.Generator().manual_seed(2)).topk(2).indices
    old = reference.batch_logprobs(path, batch, experts=experts)
    noise = torch.randn(len(old), generator=torch.Generator().manual_seed(1)) * 0.4
    noisy = replace(batch, old_logprobs=torch.where(batch.response_mask, old.float() + noise, 0.0))
    settings = {
        "loss": "gmpo",
        "clip_low": CLIP,
        "clip_high": CLIP,
        "kl_coef": 0.0,
        "entropy_coef": 0.0,
    } | options
    known = reference.train(
        path, noisy, STEPS, folder, lr=LR, eps=EPS, clip_grad=CLIP_GRAD, experts=experts, **settings
    )
    record = experts.short()
    record[batch.lengths.cumsum(0) - 1] = -1
    recorded = replace(batch, routed_experts=record)
    before = reference.saved_tensors(path)
    return known | {
        "path": path,
        "before": before,
        "batch": recorded,
        "logprobs": old,
        "old_logprobs": noisy.old_logprobs,
    }


@pytest.fixture(scope="session")
def forced(
    expected: Reference, batch: TrainBatch, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    return train_forced(expected.model("qwen3_moe"), batch, tmp_path_factory.mktemp("forced"))


def replaying(path: Any, layout: str, kind: str, *, max_tokens: int, **sections: Any) -> tuple[int, Config]:
    world_size, parallel = LAYOUTS[layout]
    sections = {
        "algorithm": {"moe_routing_replay": kind},
        "rollout": {"routed_experts": kind != "policy"},
    } | sections
    return world_size, config(path, parallel, max_tokens=max_tokens, **sections)


def routings(results: list[dict[str, Any]], batch: TrainBatch) -> Tensor:
    """Return the experts that the routers of all ranks chose, (L, layers, topk), with -2 for none.

    All passes must choose the same experts.
    """
    place = {token: i for i, token in enumerate(batch.tokens.tolist())}
    found = torch.full((len(batch.tokens), 4, 2), -2)
    for (token, layer), chosen in (
        (key, value) for result in results for key, value in result["chosen"].items() if key[0] in place
    ):
        (experts,) = chosen
        found[place[token], layer] = torch.tensor(experts)
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("budget", ["a sequence each", "a few"])
def test_random_experts_in_every_layout(
    ranks: RankPool, forced: dict[str, Any], layout: str, budget: str
) -> None:
    batch = forced["batch"]
    world_size, cfg = replaying(
        forced["path"], layout, "rollout", max_tokens={"a sequence each": 1, "a few": 40}[budget]
    )
    results = ranks.run(world_size, cases.replay, cfg, batch, 1, STEPS, forced["old_logprobs"])
    check(results, forced)
    known = batch.routed_experts[:, 0, 0] >= 0
    assert torch.equal(routings(results, batch)[known], batch.routed_experts[known].sort().values.long())
    gates = [name for name in forced["weights"] if name.endswith("mlp.gate.weight")]
    assert len(gates) == 4
    only = {key: {name: forced[key][name] for name in gates} for key in ("weights", "before")}
    assert distance({name: results[0]["weights"][name] for name in gates}, only) < 1e-4


def test_experts_and_log_probabilities_of_the_engine(ranks: RankPool, forced: dict[str, Any]) -> None:
    """R3 without a pass for old log probabilities; the training passes still compare the routing."""
    batch = replace(forced["batch"], rollout_logprobs=forced["old_logprobs"])
    algorithm = {"moe_routing_replay": "rollout", "old_logprobs": "rollout"}
    world_size, cfg = replaying(forced["path"], "tp2 ep2", "rollout", max_tokens=40, algorithm=algorithm)
    results = ranks.run(world_size, cases.learn, cfg, batch, STEPS, False)
    for result in results:
        assert [step["loss"] for step in result["history"]] == pytest.approx(forced["losses"], rel=1e-4)
        assert [step["grad_norm"] for step in result["history"]] == pytest.approx(forced["norms"], rel=1e-4)
        assert all(step["moe/routing_differs"] > 0.1 for step in result["history"])
    assert distance(results[0]["weights"], forced) < 1e-4


@pytest.mark.parametrize("minibatches", [1, 3])
@pytest.mark.parametrize("kind", ["none", "policy", "rollout"])
def test_a_step_without_needless_passes_routes_like_a_step_with_them(
    ranks: RankPool, forced: dict[str, Any], kind: str, minibatches: int
) -> None:
    """The batch has the engine's record, whose experts are not the policy's. Only R3 replays it."""
    world_size, cfg = replaying(
        forced["path"],
        "tp2 ep2",
        kind,
        max_tokens=40,
        rollout={"routed_experts": True},
        train={"minibatches_per_step": minibatches},
    )
    whole, lean = (
        ranks.run(world_size, cases.learn, cfg, forced["batch"], 1, everything)
        for everything in (True, False)
    )
    for got, wanted in zip(lean, whole, strict=True):
        for update, reference_update in zip(got["history"], wanted["history"], strict=True):
            for name in ("loss", "grad_norm"):
                assert update[name] == pytest.approx(reference_update[name], rel=1e-5, abs=1e-7), name
        differs = got["history"][0] if minibatches == 1 else got["figures"]
        assert differs["moe/routing_differs"] > 0.3
        if kind == "policy" and minibatches == 3:
            assert got["history"][0]["moe/routing_drift"] == 0


@pytest.mark.versions
@pytest.mark.parametrize("layout", ["one rank", "tp2 ep2", "pp2 vpp2 ep2"])
def test_recomputed_activations_take_the_same_experts(
    ranks: RankPool, forced: dict[str, Any], layout: str
) -> None:
    world_size, cfg = replaying(forced["path"], layout, "rollout", max_tokens=40, megatron=RECOMPUTE)
    check(ranks.run(world_size, cases.replay, cfg, forced["batch"], 1, STEPS, forced["old_logprobs"]), forced)


@pytest.mark.versions
@pytest.mark.parametrize("layout", ["tp2 ep2", "pp2 cp2 ep2", "pp2 vpp2 ep2"])
def test_layers_without_experts(
    ranks: RankPool, expected: Reference, batch: TrainBatch, layout: str, tmp_path: Path
) -> None:
    """One stage (0 1 | 2 3), or one chunk of each stage (0 2 | 1 3), has no router."""
    hf = AutoConfig.from_pretrained(expected.model("qwen3_moe"))
    hf.mlp_only_layers = [0, 1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(hf).save_pretrained(tmp_path / "mixed")
    known = train_forced(tmp_path / "mixed", batch, tmp_path / "trained")
    world_size, cfg = replaying(known["path"], layout, "rollout", max_tokens=40)
    nonsense = known["batch"].routed_experts.clone()
    nonsense[:, [0, 1]] = -1
    recorded = replace(known["batch"], routed_experts=nonsense)
    results = ranks.run(world_size, cases.replay, cfg, recorded, 1, STEPS, known["old_logprobs"])
    check(results, known)
    assert {layer for result in results for _, layer in result["chosen"]} == {2, 3}


def test_the_reference_policy_routes_for_itself(
    ranks: RankPool, expected: Reference, forced: dict[str, Any]
) -> None:
    ref_path = expected.model("qwen3_moe", seed=1)
    penalty = {
        "algorithm": {"moe_routing_replay": "rollout", "kl_coef": 0.2},
        "model": {"reference_path": str(ref_path)},
    }
    world_size, cfg = replaying(forced["path"], "tp2 ep2", "rollout", max_tokens=40, **penalty)
    own = reference.batch_logprobs(ref_path, forced["batch"])
    for result in ranks.run(world_size, cases.replay, cfg, forced["batch"], 1, 1):
        assert_close(result["ref_logprobs"].double(), own, atol=1e-4, rtol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_policys_own_experts_are_replayed(
    ranks: RankPool, expected: Reference, batch: TrainBatch, own: Tensor, layout: str
) -> None:
    world_size, cfg = replaying(expected.model("qwen3_moe"), layout, "policy", max_tokens=40)
    # A split into minibatches changes the microbatches and the ranks of the sequences.
    minibatches = 1 if layout == "one rank" else 2
    results = ranks.run(world_size, cases.replay, cfg, batch, minibatches, STEPS)
    for result in results:
        assert result["routed_experts"].dtype == torch.int16
        assert torch.equal(result["routed_experts"].sort().values.long(), own.sort().values)
        assert "moe/routing_differs" not in result["compared"]  # the rollout recorded nothing
        first, last = result["history"][0], result["history"][-1]
        extremes = [first["policy/log_ratio_max"], first["policy/log_ratio_min"]]
        assert extremes == ([0, 0] if layout == "one rank" else pytest.approx([0, 0], abs=1e-6))
        assert first["moe/routing_drift"] == 0
        assert last["moe/routing_drift"] > 0  # the changed weights choose other experts
    assert torch.equal(routings(results, batch), own.sort().values)


@pytest.mark.parametrize("layout", ["one rank", "tp2 cp2 ep2", "pp2 vpp2 ep2"])
@pytest.mark.parametrize("kind", ["none", "policy"])
def test_share_of_routings_that_differ(
    ranks: RankPool, expected: Reference, batch: TrainBatch, own: Tensor, layout: str, kind: str
) -> None:
    ends = batch.lengths.cumsum(0) - 1
    record = own.flip(-1).short()  # the order of the experts has no meaning
    changed = [(0, 0), (0, 3), (20, 1), (60, 2), (int(ends[0]), 1)]
    for token, layer in changed:
        record[token, layer] = torch.tensor([e for e in range(4) if e not in own[token, layer]])
    record[ends] = -1
    world_size, cfg = replaying(
        expected.model("qwen3_moe"), layout, kind, max_tokens=40, rollout={"routed_experts": True}
    )
    known = len(batch.tokens) - len(batch)
    for result in ranks.run(world_size, cases.replay, cfg, replace(batch, routed_experts=record), 1, 1):
        assert result["compared"]["moe/routing_differs"] == 4 / (4 * known)
        assert result["compared"]["moe/routing_differs_tokens"] == 3 / known
        first = result["history"][0]
        # The weights still equal those of the old policy.
        assert (first["moe/routing_drift"], first["moe/routing_drift_tokens"]) == (
            0,
            0,
        )


def test_what_a_disturbed_engine_chose_is_replayed(ranks: RankPool, tiny_model: Any) -> None:
    """Old log probabilities equal those of a float64 model forced to the engine's experts."""
    path = tiny_model("qwen3_moe", num_layers=2, num_experts=4, initializer_range=0.15)
    tokenizer = AutoTokenizer.from_pretrained(path)
    engine = EmbeddedEngine(
        str(path), tokenizer, device="cpu", dtype=torch.float32, batch_size=64, seed=0, routed_experts=True
    )
    prompts = [
        Prompt(text, answer="", input_ids=tokenizer(text)["input_ids"])
        for text in ("07+45=", "1", "3 - 2 + 10 = 8")
    ]
    found = {}
    for noise, kind in ((0.0, "none"), (1.0, "none"), (1.0, "rollout")):
        sampling = SamplingParams(n=4, max_new_tokens=12, router_noise=noise)
        groups = in_order(engine.generate(prompts, sampling))
        recorded = whole_batch(groups)
        assert recorded.routed_experts is not None
        cfg = config(
            path, {}, max_tokens=64, algorithm={"moe_routing_replay": kind}, rollout={"routed_experts": True}
        )
        (found[noise, kind],) = ranks.run(1, cases.policy_mismatch, cfg, recorded)
    undisturbed, free, replayed = found.values()
    assert undisturbed["moe/routing_differs"] == 0
    assert undisturbed["rollout/logprob_diff_mean"] < 1e-5
    # Under replay, the routing is compared with the policy's own choice.
    assert min(free["moe/routing_differs"], replayed["moe/routing_differs"]) > 0.3
    assert min(free["rollout/logprob_diff_mean"], replayed["rollout/logprob_diff_mean"]) > 0.05

    experts = recorded.routed_experts.long()
    experts[recorded.lengths.cumsum(0) - 1] = torch.tensor([0, 1])  # last tokens, which predict nothing
    model = reference.load_float64(path)
    reference.force_experts(model, lambda layer: experts[span, layer])
    for span in reference.spans(recorded):
        logprobs, _ = reference.sequence_logprobs(model, recorded.tokens[span], 1.0)
        mask = recorded.response_mask[span]
        assert_close(replayed["old_logprobs"][span][mask].double(), logprobs[mask], atol=1e-4, rtol=0)


def test_router_gradients_of_one_layer(ranks: RankPool, batch: TrainBatch, tiny_model: Any) -> None:
    path = tiny_model(
        "qwen3_moe",
        num_layers=1,
        hidden_size=32,
        ffn_hidden_size=32,
        head_dim=16,
        num_experts=4,
        tokenizer=text_tokenizer(),
    )
    experts = torch.rand(len(batch.tokens), 1, 4, generator=torch.Generator().manual_seed(4)).topk(2).indices
    old = reference.batch_logprobs(path, batch, experts=experts).float()
    recorded = replace(batch, old_logprobs=old, routed_experts=experts.short())
    _, cfg = replaying(path, "one rank", "rollout", max_tokens=40, optimizer={"clip_grad": 0.0})
    (gradients,) = ranks.run(1, cases.router_gradients, cfg, recorded)
    model = reference.load_float64(path)
    reference.force_routing(model, batch, experts)
    settings = {
        "loss": "gmpo",
        "clip_low": CLIP,
        "clip_high": CLIP,
        "kl_coef": 0.0,
        "entropy_coef": 0.0,
        "temperature": 1.0,
    }
    reference.batch_loss(model, recorded, old, **settings).backward()
    (wanted,) = (layer.mlp.gate.weight.grad for layer in model.model.layers)
    assert wanted.norm() > 1e-4
    assert_close(gradients[0].double(), wanted, atol=1e-5 * float(wanted.norm()), rtol=0)
