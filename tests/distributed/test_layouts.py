"""In every layout, loss, gradient norm and weights after three steps equal a float64 reference.

The reference runs in a single process.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from megatron_gmpo.batch.columns import TrainBatch
from megatron_gmpo.config import Config
from megatron_gmpo.testing import Family
from megatron_gmpo.testing.tiny_tokenizers import text_tokenizer

from ..support import cases, reference
from ..support.batches import split
from ..support.ranks import RankPool

pytestmark = pytest.mark.distributed

TP, PP, VPP = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
)
CP, EP, ETP = "context_parallel_size", "expert_model_parallel_size", "expert_tensor_parallel_size"
VOCAB = 259  # of the text tokenizer; coprime to 128 and to all parallel sizes
STEPS = 3
LR, EPS, CLIP_GRAD, CLIP = 5e-3, 1e-4, 0.3, 0.3


def make_batch() -> TrainBatch:
    """Return eight sequences: of one token, of two, without response, with advantage 0, and four others."""
    generator = torch.Generator().manual_seed(0)
    lengths = [13, 1, 29, 7, 40, 2, 18, 5]
    prompts = [3, 1, 5, 7, 8, 1, 3, 4]  # sequence 3 is all prompt
    mask = torch.cat(
        [torch.arange(length) >= prompt for length, prompt in zip(lengths, prompts, strict=True)]
    )
    advantages = torch.tensor([1.0, 2.0, -1.0, 0.5, -0.5, 2.0, 0.0, -0.7])
    # The embedding of <pad>, 0, has no gradient in transformers.
    tokens = torch.randint(3, VOCAB, (sum(lengths),), generator=generator)
    return TrainBatch(tokens, torch.tensor(lengths), mask, advantages, torch.zeros(len(tokens)))


class Reference:
    """Model, batch and the expected results of three steps, computed once for each set of options."""

    def __init__(self, tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> None:
        self._tiny_model, self._tmp, self._known = tiny_model, tmp_path_factory, {}
        self._tokenizer = text_tokenizer()

    def model(self, family: Family, seed: int = 0, **others: int) -> Path:
        shape = {"hidden_size": 32, "ffn_hidden_size": 32, "head_dim": 16, "num_experts": 4}
        return self._tiny_model(family, tokenizer=self._tokenizer, seed=seed, **shape, **others)

    def __call__(self, family: Family, minibatches: int = 1, **options: Any) -> dict[str, Any]:
        """Train on the first of ``minibatches`` and return the results.

        ``options`` are those of ``reference.train``.
        """
        key = (family, minibatches, *sorted(options.items()))
        if key not in self._known:
            path, batch = self.model(family), split(make_batch(), minibatches)[0]
            settings = {
                "loss": "gmpo",
                "clip_low": CLIP,
                "clip_high": CLIP,
                "kl_coef": 0.0,
                "entropy_coef": 0.0,
                "temperature": 1.0,
            }
            settings |= {"lr": LR, "eps": EPS, "clip_grad": CLIP_GRAD} | options
            old = reference.batch_logprobs(path, batch, settings["temperature"])
            noise = torch.randn(len(old), generator=torch.Generator().manual_seed(1)) * 0.4
            batch.old_logprobs = torch.where(batch.response_mask, old.float() + noise, 0.0)
            known = reference.train(path, batch, STEPS, self._tmp.mktemp("reference"), **settings)
            assert min(known["norms"]) > settings["clip_grad"]  # gradients are clipped in every step
            known |= {"path": path, "batch": batch, "before": reference.saved_tensors(path), "logprobs": old}
            self._known[key] = known
        return self._known[key]


def config(path: Path, parallel: dict[str, int], *, max_tokens: int, **changes: Any) -> Config:
    tree = {
        "model": {"path": str(path), "dtype": "fp32"},
        "device": "cpu",
        "parallel": parallel,
        "optimizer": {"lr": LR, "adam_eps": EPS, "clip_grad": CLIP_GRAD, "use_distributed_optimizer": False},
        "algorithm": {"clip_low": CLIP, "clip_high": CLIP},
        "train": {"max_tokens_per_microbatch": max_tokens, "logprob_chunk_tokens": 16},
    }
    for section, fields in changes.items():
        tree[section] = {**tree.get(section, {}), **fields}
    return Config.model_validate(tree)


def distance(weights: dict[str, Tensor], expected: dict[str, Any]) -> float:
    """Return |weights - expected| relative to |update|, over all weights together."""
    assert weights.keys() == expected["weights"].keys()
    off = sum(
        (weights[name].double() - tensor).square().sum() for name, tensor in expected["weights"].items()
    )
    moved = sum(
        (tensor - expected["before"][name].double()).square().sum()
        for name, tensor in expected["weights"].items()
    )
    return float((off / moved).sqrt())


def check(results: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    for result in results:
        assert_close(result["logprobs"].double(), expected["logprobs"], atol=1e-4, rtol=0)
        assert [step["loss"] for step in result["history"]] == pytest.approx(expected["losses"], rel=1e-4)
        assert [step["grad_norm"] for step in result["history"]] == pytest.approx(expected["norms"], rel=1e-4)
        assert result["history"] == results[0]["history"]
    assert distance(results[0]["weights"], expected) < 1e-4


LAYOUTS: dict[str, tuple[int, dict[str, int], bool]] = {
    "one rank": (1, {}, False),
    "dp2": (2, {}, False),
    "pp2": (2, {PP: 2}, False),
    "pp2 vpp2": (2, {PP: 2, VPP: 2}, False),
    "cp2": (2, {CP: 2}, False),
    "dp2 distributed optimizer": (2, {}, True),
    "cp2 pp2": (4, {CP: 2, PP: 2}, False),
}
DENSE: dict[str, tuple[int, dict[str, int], bool]] = {
    "tp2": (2, {TP: 2}, False),
    "tp2 cp2": (4, {TP: 2, CP: 2}, False),
    "tp2 pp2 vpp2": (4, {TP: 2, PP: 2, VPP: 2}, True),
}
MOE: dict[str, tuple[int, dict[str, int], bool]] = {
    "ep2": (2, {EP: 2}, False),
    "ep2 distributed optimizer": (2, {EP: 2}, True),
    "tp2 etp2": (2, {TP: 2, ETP: 2}, False),
    "tp2 ep2": (2, {TP: 2, EP: 2}, False),
    "cp2 ep2": (2, {CP: 2, EP: 2}, False),
    "etp2 ep2": (4, {ETP: 2, EP: 2}, False),
    "tp2 cp2 ep2": (4, {TP: 2, CP: 2, EP: 2}, False),
    "tp2 cp2 etp2": (4, {TP: 2, CP: 2, ETP: 2}, True),
    "pp2 cp2 ep2": (4, {PP: 2, CP: 2, EP: 2}, False),
    "tp2 pp2 ep2": (4, {TP: 2, PP: 2, EP: 2}, True),
    "dp2 tp2 ep4": (4, {TP: 2, EP: 4}, True),
    "tp2 ep2 etp2": (4, {TP: 2, EP: 2, ETP: 2}, False),
    "cp2 ep2 etp2": (4, {CP: 2, EP: 2, ETP: 2}, False),
    "dp2 tp2 ep2": (4, {TP: 2, EP: 2}, True),
}


BUDGETS = {"a sequence each": 1, "a few": 64, "all in one": 4096}
PRODUCTS = [
    "tp2 cp2",
    "tp2 cp2 ep2",
    "tp2 cp2 etp2",
    "etp2 ep2",
    "tp2 ep2 etp2",
    "cp2 ep2 etp2",
    "dp2 tp2 ep4",
    "dp2 tp2 ep2",
]
"""Combined layouts whose parts are tested with every token budget."""


EVERY_VERSION = {
    ("qwen3", "dp2 distributed optimizer", "all in one"),
    ("qwen3", "cp2 pp2", "all in one"),
    ("qwen3", "tp2 pp2 vpp2", "a sequence each"),
    ("qwen3_moe", "tp2 cp2 ep2", "a few"),
    ("qwen3_moe", "tp2 ep2 etp2", "a few"),
    ("qwen3_moe", "tp2 pp2 ep2", "all in one"),
}
"""Cases that run on every tested pair of Python and megatron-core, with every kind of parallelism."""


@pytest.mark.parametrize(
    ("family", "layout", "budget"),
    [
        pytest.param(*case, marks=[pytest.mark.versions] if case in EVERY_VERSION else [])
        for family, layouts in {"qwen3": LAYOUTS | DENSE, "qwen3_moe": LAYOUTS | MOE}.items()
        for layout in layouts
        for budget in (["a few"] if layout in PRODUCTS else ["a sequence each", "all in one"])
        for case in [(family, layout, budget)]
    ],
)
def test_layout_equals_float64_reference(
    ranks: RankPool, expected: Reference, family: Family, layout: str, budget: str
) -> None:
    known = expected(family)
    world_size, parallel, distributed = (LAYOUTS | DENSE | MOE)[layout]
    optimizer = {"use_distributed_optimizer": distributed}
    cfg = config(known["path"], parallel, max_tokens=BUDGETS[budget], optimizer=optimizer)
    check(ranks.run(world_size, cases.train, cfg, known["batch"], STEPS), known)


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        ("deepseek_v3", "one rank"),
        ("deepseek_v3", "tp2 ep2"),
        ("deepseek_v3", "tp2 cp2 etp2"),
        ("deepseek_v3", "pp2 cp2 ep2"),
        ("glm4_moe", "one rank"),
        ("glm4_moe", "tp2 ep2"),
    ],
)
def test_shared_experts_and_a_router_bias(
    ranks: RankPool, expected: Reference, family: Family, layout: str
) -> None:
    known = expected(family, clip_grad=0.1)
    world_size, parallel, distributed = (LAYOUTS | MOE)[layout]
    optimizer = {"use_distributed_optimizer": distributed, "clip_grad": 0.1}
    cfg = config(known["path"], parallel, max_tokens=64, optimizer=optimizer)
    results = ranks.run(world_size, cases.train, cfg, known["batch"], STEPS)
    check(results, known)
    biases = [name for name in known["before"] if name.endswith("e_score_correction_bias")]
    assert biases
    for name in biases:  # neither gradients nor balancing changes it
        assert torch.equal(results[0]["weights"][name], known["before"][name])


@pytest.mark.parametrize("layout", ["one rank", "tp2 ep2", "tp2 cp2 ep2", "tp2 pp2 ep2"])
def test_shared_expert(ranks: RankPool, expected: Reference, layout: str) -> None:
    """The expert is sharded over the ranks of the dense part.

    Each rank has a complete gate, which sees only that rank's part of the sequence.
    """
    known = expected("qwen2_moe", clip_grad=0.1)
    world_size, parallel, distributed = (LAYOUTS | MOE)[layout]
    optimizer = {"clip_grad": 0.1, "use_distributed_optimizer": distributed}
    cfg = config(known["path"], parallel, max_tokens=64, optimizer=optimizer)
    check(ranks.run(world_size, cases.train, cfg, known["batch"], STEPS), known)


@pytest.mark.parametrize(("family", "layout"), [("qwen3", "tp2 cp2"), ("qwen3_moe", "pp2 cp2 ep2")])
def test_token_mean_loss(ranks: RankPool, expected: Reference, family: Family, layout: str) -> None:
    known = expected(family, loss="dapo")
    world_size, parallel, _ = (DENSE | MOE)[layout]
    cfg = config(known["path"], parallel, max_tokens=40, algorithm={"loss": "dapo"})
    check(ranks.run(world_size, cases.train, cfg, known["batch"], STEPS), known)


@pytest.mark.parametrize(("family", "layout"), [("qwen3", "cp2 pp2"), ("qwen3_moe", "tp2 ep2")])
def test_kl_and_entropy_penalties(ranks: RankPool, expected: Reference, family: Family, layout: str) -> None:
    ref_path = expected.model(family, seed=1)
    known = expected(family, ref_path=ref_path, kl_coef=0.2, entropy_coef=0.05)
    assert known["losses"][0] != pytest.approx(expected(family)["losses"][0], rel=0.01)
    world_size, parallel, _ = (LAYOUTS | MOE)[layout]
    penalties = {"kl_coef": 0.2, "entropy_coef": 0.05}
    cfg = config(
        known["path"], parallel, max_tokens=40, algorithm=penalties, model={"reference_path": str(ref_path)}
    )
    check(ranks.run(world_size, cases.train, cfg, known["batch"], STEPS), known)


def test_temperature(ranks: RankPool, expected: Reference) -> None:
    known = expected("qwen3", temperature=0.7)
    cfg = config(known["path"], {TP: 2}, max_tokens=40, rollout={"temperature": 0.7})
    check(ranks.run(2, cases.train, cfg, known["batch"], STEPS), known)


@pytest.mark.parametrize("layout", ["one rank", "tp2 ep2", "pp2 vpp2"])
def test_activation_recomputation(ranks: RankPool, expected: Reference, layout: str) -> None:
    known = expected("qwen3_moe")
    world_size, parallel, _ = (LAYOUTS | MOE)[layout]
    recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    cfg = config(known["path"], parallel, max_tokens=40, megatron=recompute)
    check(ranks.run(world_size, cases.train, cfg, known["batch"], STEPS), known)


@pytest.mark.parametrize("layout", ["dp2 distributed optimizer", "ep2"])
def test_gradient_norm_is_reported_without_clipping(
    ranks: RankPool, expected: Reference, layout: str
) -> None:
    # Only the norm of the first step is comparable; the update is not.
    known = expected("qwen3_moe", clip_grad=1e-9)
    world_size, parallel, distributed = (LAYOUTS | MOE)[layout]
    optimizer = {"clip_grad": 0.0, "use_distributed_optimizer": distributed}
    cfg = config(known["path"], parallel, max_tokens=40, optimizer=optimizer)
    for result in ranks.run(world_size, cases.train, cfg, known["batch"], 1):
        assert result["history"][0]["grad_norm"] == pytest.approx(known["norms"][0], rel=1e-4)


@pytest.mark.parametrize("layout", [{EP: 2}, {}, {EP: 4}])
def test_fewer_sequences_than_data_parallel_ranks(
    ranks: RankPool, expected: Reference, layout: dict[str, int]
) -> None:
    known = expected("qwen3_moe", minibatches=3)
    assert len(known["batch"]) == 3
    cfg = config(known["path"], layout, max_tokens=4096)
    check(ranks.run(4, cases.train, cfg, known["batch"], STEPS), known)


def test_minibatch_without_response_tokens(ranks: RankPool, expected: Reference) -> None:
    known = expected("qwen3")
    batch = replace(known["batch"], response_mask=torch.zeros_like(known["batch"].response_mask))
    for result in ranks.run(2, cases.train, config(known["path"], {CP: 2}, max_tokens=40), batch, 1):
        assert math.isnan(result["history"][0]["loss"])  # mean over no tokens
        assert result["history"][0]["grad_norm"] == 0
        for name, tensor in (result["weights"] or {}).items():
            assert_close(tensor, known["before"][name], atol=0, rtol=0)


def test_a_loss_that_is_not_finite_stops_every_rank(ranks: RankPool, expected: Reference) -> None:
    known = expected("qwen3")
    advantages = known["batch"].advantages.clone()
    advantages[2] = math.nan
    cfg = config(known["path"], {PP: 2}, max_tokens=1)
    assert (
        ranks.run(4, cases.failure, cfg, replace(known["batch"], advantages=advantages))
        == ["loss is nan"] * 4
    )


@pytest.mark.parametrize(
    ("family", "layout"), [("qwen3", "tp2"), ("qwen3_moe", "ep2 distributed optimizer"), ("qwen3_moe", "ep2")]
)
def test_bf16(ranks: RankPool, expected: Reference, family: Family, layout: str) -> None:
    known = expected(family)
    world_size, parallel, distributed = (DENSE | MOE)[layout]
    optimizer = {"use_distributed_optimizer": distributed}
    cfg = config(known["path"], parallel, max_tokens=40, model={"dtype": "bf16"}, optimizer=optimizer)
    results = ranks.run(world_size, cases.train, cfg, known["batch"], 1)
    assert results[0]["history"][0]["loss"] == pytest.approx(known["losses"][0], abs=0.03)
    assert results[0]["history"][0]["grad_norm"] == pytest.approx(known["norms"][0], rel=0.05)
    assert {tensor.dtype for tensor in results[0]["weights"].values()} == {torch.bfloat16}
    for name, tensor in results[0]["weights"].items():
        # A norm near 1 may round back, and an expert may receive no token.
        may_stay = tensor.ndim == 1 or ".experts." in name
        assert may_stay or not torch.equal(tensor, known["before"][name].bfloat16()), name
