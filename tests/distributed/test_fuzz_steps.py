"""Random batches: what a step leaves out changes neither its loss nor its gradients.

A batch makes a step with every combination of three parts left out: the sequences without gradient, the pass
for the old log probabilities of the first minibatch, and the logits of all tokens. Each step is compared with
transformers in float64, or with the step that leaves out nothing where ``tests/support/reference.py`` has no
formula of the loss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_gmpo.config import Config
from megatron_gmpo.testing import Family
from megatron_gmpo.testing.tiny_tokenizers import character_tokenizer

from ..support import fuzz_steps
from ..support.ranks import RankPool
from . import test_layouts

pytestmark = pytest.mark.distributed


def gspo(delta: Tensor, advantage: Tensor) -> Tensor:
    """Return the term of a sequence, arXiv 2507.18071, equation 5, with the clips of the test."""
    ratio = delta.mean().exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage)


def grpo(delta: Tensor, advantage: Tensor) -> Tensor:
    """Return the term of a sequence, arXiv 2402.03300, equation 3, without its KL term."""
    ratio = delta.exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage).mean()


CLIP = 0.1
TOKENIZER = character_tokenizer("".join(map(chr, range(33, 95))))  # a vocabulary of 64


@dataclass(frozen=True)
class Case:
    """Settings of 16 batches.

    Attributes:
        minibatches: updates of a step.
        algorithm, megatron: settings of these sections.
        family: kind of the model.
        formula: the loss for ``reference.batch_loss``; None means that it has none.
        temperature: of the rollout.
        tied: whether the model has one matrix for embedding and output.
        max_tokens: limit of a microbatch.
    """

    minibatches: int
    algorithm: dict[str, Any] = field(default_factory=dict)
    family: Family = "qwen3"
    formula: Any = "gmpo"
    megatron: dict[str, Any] = field(default_factory=dict)
    temperature: float = 1.0
    tied: bool = False
    max_tokens: int = 300


PENALTIES = {"kl_coef": 0.1, "entropy_coef": 0.05}
CASES = {
    "one update": Case(1),
    "two updates": Case(2, max_tokens=64),
    "five updates": Case(5, tied=True),
    "three updates": Case(3, temperature=0.7),
    "penalties": Case(2, PENALTIES),
    "token clip and token divisor": Case(2, {"loss": "dapo"}, formula="dapo"),
    "token clip": Case(3, {"loss": "grpo"}, formula=grpo),
    "sequence clip": Case(3, {"loss": "gspo"}, formula=gspo),
    "old policy of the rollout": Case(3, {"old_logprobs": "rollout"}),
    "weights": Case(2, {"correction": "geometric"}, formula=None),
    "masks": Case(3, {"mask": "off_policy", "mask_kl": 0.0}, formula=None),
    "MoE, one update": Case(1, family="qwen3_moe"),
    "MoE, three updates": Case(3, family="qwen3_moe", max_tokens=1000),
    "MoE, old policy of the rollout": Case(2, {"old_logprobs": "rollout"}, family="qwen3_moe"),
    "MoE, auxiliary loss": Case(
        2, family="qwen3_moe", formula=None, megatron={"moe_aux_loss_coeff": 0.1, "moe_z_loss_coeff": 0.1}
    ),
    "MoE, experts with a capacity": Case(
        2, family="qwen3_moe", formula=None, megatron={"moe_expert_capacity_factor": 1.0}
    ),
    "MoE, routers with a bias": Case(2, family="glm4_moe"),
    "MoE, routing of the old policy": Case(
        2, {"moe_routing_replay": "policy"}, family="qwen3_moe", formula=None
    ),
    "MoE, routing of the rollout": Case(
        1, {"moe_routing_replay": "rollout"}, family="qwen3_moe", formula=None
    ),
    "turns, sequence clip": Case(2, {"unit": "turn", "loss": "gspo"}, formula=gspo),
    "turns, weights and masks": Case(
        2, {"unit": "turn", "correction": "geometric", "mask": "geometric"}, formula=None
    ),
}
EVERY_TOKEN = ("penalties", "MoE, auxiliary loss", "MoE, experts with a capacity")
"""Cases in which a sequence without advantage changes the loss or the routing of the others."""
BATCHES = 16
SEEDS_OF_LAYOUTS = range(1000, 1003)
EVERY_VERSION = {("three updates", "tp2 pp2 vpp2"), ("MoE, one update", "tp2 cp2 ep2")}
"""Layouts that run on every tested pair of Python and megatron-core."""


def config(
    model: Callable[..., Path], case: Case, num_layers: int = 2, parallel: dict[str, int] | None = None
) -> Config:
    shape = {
        "num_layers": num_layers,
        "hidden_size": 16,
        "ffn_hidden_size": 16,
        "head_dim": 8,
        "num_experts": 4,
    }

    shape |= {"initializer_range": 0.3, "tie_word_embeddings": case.tied, "tokenizer": TOKENIZER}
    path, other = (model(case.family, seed=seed, **shape) for seed in (0, 1))
    is_moe = case.family != "qwen3"
    return Config.model_validate(
        {
            "model": {"path": str(path), "reference_path": str(other), "dtype": "fp32"},
            "device": "cpu",
            "parallel": parallel or {},
            "megatron": ({"moe_router_dtype": "fp64"} if is_moe else {}) | case.megatron,
            "optimizer": {"lr": 0.01, "adam_eps": 1e-3, "clip_grad": 0.0, "use_distributed_optimizer": False},
            "algorithm": {"clip_low": CLIP, "clip_high": CLIP} | case.algorithm,
            "rollout": {
                "temperature": case.temperature,
                "routed_experts": case.algorithm.get("moe_routing_replay") == "rollout",
            },
            "train": {
                "minibatches_per_step": case.minibatches,
                "max_tokens_per_microbatch": case.max_tokens,
                "logprob_chunk_tokens": 16,
            },
        }
    )


@pytest.mark.parametrize("name", CASES)
def test_every_combination(ranks: RankPool, tiny_model: Callable[..., Path], name: str) -> None:
    case, first = CASES[name], BATCHES * list(CASES).index(name)
    cfg = config(tiny_model, case)
    seeds = range(first, first + BATCHES)
    ((failures, leaner),) = ranks.run(1, fuzz_steps.compare, cfg, seeds, case.formula)
    assert not failures, "\n".join(failures)
    assert (leaner == 0) == (name in EVERY_TOKEN)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        pytest.param(*run, marks=[pytest.mark.versions] if run in EVERY_VERSION else [])
        for name, layouts in {
            "three updates": test_layouts.LAYOUTS | test_layouts.DENSE,
            "MoE, one update": test_layouts.LAYOUTS | test_layouts.MOE,
        }.items()
        for layout in layouts
        # it keeps only a part of the gradients on each rank; test_computed_tokens.py has it
        if "distributed optimizer" not in layout
        for run in [(name, layout)]
    ],
)
def test_everything_left_out_in_every_layout(
    ranks: RankPool, tiny_model: Callable[..., Path], name: str, layout: str
) -> None:
    world_size, parallel, _ = (test_layouts.LAYOUTS | test_layouts.DENSE | test_layouts.MOE)[layout]
    case = CASES[name]
    cfg = config(tiny_model, case, num_layers=4, parallel=parallel)
    everything = frozenset(fuzz_steps.SAVINGS)
    results = ranks.run(world_size, fuzz_steps.compare, cfg, SEEDS_OF_LAYOUTS, case.formula, everything)
    failures, leaner = results[0]
    assert not failures, "\n".join(failures)
    assert leaner > 0
