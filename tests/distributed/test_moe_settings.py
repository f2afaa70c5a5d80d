"""Megatron's MoE settings have their documented effect in training.

The tests cover load balancing, z-loss, the router's dtype, its bias, and a frozen router.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from megatron_gmpo.batch.columns import TrainBatch

from ..support import cases, reference
from ..support.ranks import RankPool
from .test_layouts import CLIP, CLIP_GRAD, EPS, LR, MOE, STEPS, VOCAB, Reference, check, config
from .test_layouts import LAYOUTS as DATA

pytestmark = pytest.mark.distributed

EXPERTS, TOPK = 4, 2
COEFFICIENT, Z_COEFFICIENT = 2.0, 0.05
LAYOUTS = ("one rank", "tp2 ep2", "cp2 ep2", "pp2 cp2 ep2")
"""These layouts have one data-parallel rank, so that one microbatch contains the whole batch."""


@pytest.fixture(scope="module")
def batch() -> TrainBatch:
    """Return four sequences in two pairs of equal length.

    No layout pads these lengths, because padding counts in these losses.
    """
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([12, 20, 12, 20])
    mask = torch.cat([torch.arange(length) >= 4 for length in lengths.tolist()])
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5])
    tokens = torch.randint(3, VOCAB, (int(lengths.sum()),), generator=generator)
    return TrainBatch(tokens, lengths, mask, advantages, torch.zeros(len(tokens)))


def balancing(logits: list[Tensor]) -> Tensor:
    """Return the load-balancing loss over all sequences together.

    transformers' function counts all of the top k, so it is k times Megatron's.
    """
    loss = load_balancing_loss_func((torch.cat(logits),), EXPERTS, TOPK)
    assert isinstance(loss, Tensor)
    return loss / TOPK


def over_all(logits: list[list[Tensor]]) -> Tensor:
    return torch.stack([balancing(of_layer) for of_layer in logits]).sum()


def over_sequences(logits: list[list[Tensor]]) -> Tensor:
    return torch.stack(
        [torch.stack([balancing([sequence]) for sequence in of_layer]).mean() for of_layer in logits]
    ).sum()


def z_loss(logits: list[list[Tensor]]) -> Tensor:
    return torch.stack([torch.cat(of_layer).logsumexp(-1).square().mean() for of_layer in logits]).sum()


@pytest.fixture(scope="module")
def known(
    expected: Reference, batch: TrainBatch, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., dict[str, Any]]:
    """Return ``train(**options of reference.train)``, which runs three steps of GMPO with the reference."""
    path = expected.model("qwen3_moe")
    old = reference.batch_logprobs(path, batch)
    noise = torch.randn(len(old), generator=torch.Generator().manual_seed(1)) * 0.4
    noisy = replace(batch, old_logprobs=torch.where(batch.response_mask, old.float() + noise, 0.0))
    settings = {"loss": "gmpo", "clip_low": CLIP, "clip_high": CLIP, "kl_coef": 0.0, "entropy_coef": 0.0}
    plain = reference.train(
        path, noisy, STEPS, tmp_path_factory.mktemp("plain"), lr=LR, eps=EPS, clip_grad=CLIP_GRAD, **settings
    )

    def train(**options: Any) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp("reference")
        found = reference.train(
            path, noisy, STEPS, folder, lr=LR, eps=EPS, clip_grad=CLIP_GRAD, **settings, **options
        )
        # The options must change the result.
        assert found["losses"][-1] != pytest.approx(plain["losses"][-1], rel=5e-4)
        return found | {
            "path": path,
            "batch": noisy,
            "before": reference.saved_tensors(path),
            "logprobs": old,
        }

    return train


def run(
    ranks: RankPool, known: dict[str, Any], layout: str, *, max_tokens: int = 4096, **sections: Any
) -> list[dict[str, Any]]:
    world_size, parallel, distributed = (DATA | MOE)[layout]
    optimizer = {"use_distributed_optimizer": distributed}
    cfg = config(known["path"], parallel, max_tokens=max_tokens, optimizer=optimizer, **sections)
    results = ranks.run(world_size, cases.train, cfg, known["batch"], STEPS)
    check(results, known)
    return results


@pytest.mark.parametrize("layout", LAYOUTS)
def test_load_balancing_and_z_loss(
    ranks: RankPool, known: Callable[..., dict[str, Any]], layout: str
) -> None:
    values: list[tuple[float, float]] = []

    def auxiliary(logits: list[list[Tensor]]) -> Tensor:
        balance, z = over_all(logits), z_loss(logits)
        values.append((balance.item(), z.item()))
        return COEFFICIENT * balance + Z_COEFFICIENT * z

    table = {"moe_aux_loss_coeff": COEFFICIENT, "moe_z_loss_coeff": Z_COEFFICIENT}
    for result in run(ranks, known(auxiliary=auxiliary), layout, megatron=table):
        found = [(step["moe/load_balancing_loss"], step["moe/z_loss"]) for step in result["history"]]
        assert found == [pytest.approx(expected, rel=1e-4) for expected in values]


@pytest.mark.parametrize("layout", ["one rank", "cp2 ep2"])
def test_sequence_load_balancing(ranks: RankPool, known: Callable[..., dict[str, Any]], layout: str) -> None:
    table = {"moe_router_load_balancing_type": "seq_aux_loss", "moe_aux_loss_coeff": COEFFICIENT}
    run(
        ranks,
        known(auxiliary=lambda logits: COEFFICIENT * over_sequences(logits)),
        layout,
        max_tokens=1,
        megatron=table,
    )


@pytest.mark.parametrize("layout", ["ep2", "tp2 ep2"])
def test_global_load_balancing(ranks: RankPool, known: Callable[..., dict[str, Any]], layout: str) -> None:
    """The first layout has two data-parallel ranks with half of the tokens each."""
    values: list[float] = []

    def auxiliary(logits: list[list[Tensor]]) -> Tensor:
        values.append(over_all(logits).item())
        return COEFFICIENT * over_all(logits)

    table = {"moe_router_load_balancing_type": ["global_aux_loss"], "moe_aux_loss_coeff": [COEFFICIENT]}
    for result in run(ranks, known(auxiliary=auxiliary), layout, megatron=table):
        assert [step["moe/global_load_balancing_loss"] for step in result["history"]] == pytest.approx(
            values, rel=1e-4
        )


@pytest.mark.parametrize("layout", ["one rank", "tp2 ep2", "ep2 distributed optimizer"])
def test_a_frozen_router_stays(ranks: RankPool, known: Callable[..., dict[str, Any]], layout: str) -> None:
    frozen = known(freeze_router=True)
    results = run(ranks, frozen, layout, train={"freeze_router": True})
    gates = [name for name in frozen["before"] if name.endswith("mlp.gate.weight")]
    assert len(gates) == 4
    for name in gates:
        assert torch.equal(results[0]["weights"][name], frozen["before"][name])


@pytest.mark.parametrize("layout", ["one rank", "ep2 distributed optimizer"])
def test_a_resumed_run_may_freeze_its_routers(
    ranks: RankPool, known: Callable[..., dict[str, Any]], layout: str, tmp_path: Path
) -> None:
    frozen = known(freeze_router=True)
    world_size, parallel, distributed = (DATA | MOE)[layout]
    sections = {"max_tokens": 4096, "optimizer": {"use_distributed_optimizer": distributed}}
    free, fixed = (
        config(frozen["path"], parallel, train={"freeze_router": freeze}, **sections)
        for freeze in (False, True)
    )
    first = ranks.run(world_size, cases.run_on, free, frozen["batch"], tmp_path, 0, 1, [1])[0]["weights"]
    second = ranks.run(world_size, cases.run_on, fixed, frozen["batch"], tmp_path, 1, 2, [2])[0]["weights"]
    third = ranks.run(world_size, cases.run_on, fixed, frozen["batch"], tmp_path, 2, 3, [])[0]["weights"]
    for name, tensor in frozen["before"].items():
        is_gate = name.endswith("mlp.gate.weight")
        assert not torch.equal(first[name], tensor)
        assert torch.equal(first[name], second[name]) == torch.equal(second[name], third[name]) == is_gate


@torch.no_grad()
def loads(path: Path, batch: TrainBatch) -> dict[str, Tensor]:
    """Return the tokens per expert as transformers routes them, by the name of the layer's bias."""
    model = reference.load_float64(path)
    chosen: dict[str, list[Tensor]] = {}
    for name, gate in model.named_modules():
        if hasattr(gate, "e_score_correction_bias"):
            of_layer = chosen[f"{name}.e_score_correction_bias"] = []
            gate.register_forward_hook(
                lambda _, __, output, of_layer=of_layer: of_layer.append(output[2].flatten())
            )
    for span in reference.spans(batch):
        model(batch.tokens[span][None])
    return {name: torch.bincount(torch.cat(of_layer), minlength=EXPERTS) for name, of_layer in chosen.items()}


@pytest.mark.parametrize("layout", ["one rank", "tp2 ep2", "pp2 cp2 ep2", "ep2"])
def test_a_router_bias_moves_when_asked(
    ranks: RankPool, expected: Reference, batch: TrainBatch, layout: str
) -> None:
    """The bias moves by the rate, towards the experts that had fewer tokens than the mean.

    test_layouts checks that it does not move by default.
    """
    path = expected.model("glm4_moe")
    before, counts = reference.saved_tensors(path), loads(path, batch)
    noisy = replace(batch, old_logprobs=reference.batch_logprobs(path, batch).float())
    world_size, parallel, distributed = (DATA | MOE)[layout]
    optimizer = {"use_distributed_optimizer": distributed}
    cfg = config(
        path, parallel, max_tokens=4096, optimizer=optimizer, megatron={"moe_router_bias_update_rate": 0.25}
    )
    weights = ranks.run(world_size, cases.train, cfg, noisy, 1)[0]["weights"]
    assert counts
    for name, load in counts.items():
        assert_close(
            weights[name],
            before[name] + 0.25 * torch.sign(load.double().mean() - load).float(),
            atol=1e-6,
            rtol=0,
        )


@pytest.mark.parametrize(
    ("setting", "dtype"), [({}, torch.float32), ({"moe_router_dtype": "fp64"}, torch.float64)]
)
def test_the_routers_dtype(
    ranks: RankPool, expected: Reference, batch: TrainBatch, setting: dict[str, str], dtype: torch.dtype
) -> None:
    cfg = config(expected.model("qwen3_moe"), {}, max_tokens=4096, model={"dtype": "bf16"}, megatron=setting)
    assert ranks.run(1, cases.router_logits_dtype, cfg, batch) == [{dtype}]
