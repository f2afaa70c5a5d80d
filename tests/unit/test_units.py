"""The units of the loss: an episode with holes in its mask, or each of its turns."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from megatron_gmpo.batch.columns import TrainBatch, turn_numbers
from megatron_gmpo.batch.packing import pack
from megatron_gmpo.config import AlgorithmConfig, Config
from megatron_gmpo.losses.correction import correct, rollout_mismatch
from megatron_gmpo.losses.objective import make_objective
from megatron_gmpo.losses.registry import LOSSES
from megatron_gmpo.metrics.figures import figures_of

from ..support.reference import loss_places

EPISODES = ["ppsssoosooss", "pps", "ppp", "psosososo", "ppssoooos"]
"""Prompt, sampled and observed tokens."""


def episodes(masks: list[str], seed: int = 0) -> TrainBatch:
    """Return a batch with random columns. Their values on prompts and observations must not matter."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.tensor([kind == "s" for episode in masks for kind in episode])
    old, rollout, ref = (torch.where(mask, -torch.rand(len(mask), generator=g), 0) for _ in range(3))
    return TrainBatch(
        torch.randint(1, 99, (len(mask),), generator=g),
        torch.tensor([len(episode) for episode in masks]),
        mask,
        torch.randn(len(masks), generator=g),
        rollout,
        old_logprobs=old,
        ref_logprobs=ref,
        router_shift=0.7 + 0.3 * torch.rand(len(mask), generator=g),
    )


def rebuilt(batch: TrainBatch, places: list[tuple[int, Tensor, Tensor]]) -> tuple[TrainBatch, Tensor]:
    """Return a batch of sequences that are parts of those of ``batch``, and where their tokens come from.

    Args:
        places: for each new sequence its old row, the old places of its tokens and those that carry loss.
    """
    rows = torch.tensor([row for row, _, _ in places])
    origin = torch.cat([tokens for _, tokens, _ in places])
    mask = torch.cat([torch.isin(tokens, sampled) for _, tokens, sampled in places])
    columns = {
        name: getattr(batch, name)[origin] * mask
        for name in ("rollout_logprobs", "old_logprobs", "ref_logprobs")
    }
    # the shift of the input token before a sampled one
    shift = torch.ones(len(origin))
    shift[:-1] = batch.router_shift[(origin[1:] - 1).clamp(min=0)]
    lengths = torch.tensor([len(tokens) for _, tokens, _ in places])
    advantages = batch.advantages[rows]
    new = TrainBatch(batch.tokens[origin], lengths, mask, advantages, router_shift=shift, **columns)
    return new, origin


def places_of(batch: TrainBatch, unit: str) -> list[tuple[int, Tensor, Tensor]]:
    """Return the sequences of the loss, each with the prompt before it alone.

    A turn is a response to all tokens before it. An episode is a prompt and all sampled tokens.
    """
    found = []
    for row, (start, length) in enumerate(zip(batch.starts.tolist(), batch.lengths.tolist(), strict=True)):
        tokens = torch.arange(start, start + length)
        for sampled in loss_places(batch.response_mask[tokens], unit):
            at = tokens[sampled]
            if unit == "turn":
                found.append((row, torch.arange(start, int(at[-1]) + 1) if len(at) else tokens, at))
            else:
                first = int(at[0]) if len(at) else start + length
                found.append((row, torch.cat([torch.arange(start, first), at]), at))
    return found


def outcome(batch: TrainBatch, origin: Tensor, new: Tensor, cfg: AlgorithmConfig) -> tuple[Any, ...]:
    """Return the loss of a step, its gradients by (L,) log probabilities and entropies, and all figures.

    Args:
        origin: where the tokens of the batch lie among the L tokens.
        new: (L,) the current log probabilities; the entropies are minus these.
    """
    batch = replace(batch)
    figures = correct(batch, cfg) | rollout_mismatch(batch)
    packed = pack(batch, list(range(len(batch))))
    objective = make_objective(cfg, is_moe=True, max_new_tokens=16)
    leaf, entropy = new.clone().requires_grad_(), new.neg().requires_grad_()
    slots = origin[packed.flat_index.clamp(min=0)]
    output = objective(leaf[slots], entropy[slots], packed, None)
    lengths = torch.zeros(int(batch.units.sum())).index_add(0, batch.unit_ids, batch.response_mask.float())
    count = objective.count(int((lengths > 0).sum()), int(lengths.sum()))
    value = output.loss / count
    gradients = torch.autograd.grad(value, [leaf, entropy], materialize_grads=True)
    return value.detach(), *gradients, figures_of(figures | output.metrics)


SETTINGS: list[dict[str, Any]] = [
    *({"loss": loss} for loss in LOSSES),
    {"loss": "gmpo", "correction": "sequence", "mask": "geometric", "mask_low": 0.7, "mask_high": 1.4},
    {"loss": "gmpo", "correction": "geometric", "mask": "icepop", "mask_low": 0.7, "mask_high": 1.4},
    {"loss": "gspo", "mask": "off_policy", "mask_kl": 0.0, "clip_low": 0.1, "clip_high": 0.1},
    {"loss": "grpo", "correction": "token", "kl_coef": 0.1, "entropy_coef": 0.2},
    {"loss": "gmpo", "kl_coef": 0.1, "entropy_coef": 0.2, "options": {"clip_mode": "sequence"}},
    {"loss": "dr_grpo", "kl_coef": 0.1, "correction": "geometric"},
]


def check(masks: list[str], fields: dict[str, Any], unit: str, seed: int) -> None:
    batch = episodes(masks, seed)
    cfg = AlgorithmConfig(unit=unit, **fields)
    new = -torch.rand(len(batch.tokens), generator=torch.Generator().manual_seed(seed + 1))
    parts, origin = rebuilt(batch, places_of(batch, unit))
    batch.turns = turn_numbers(batch.response_mask, batch.lengths) if unit == "turn" else None
    found = outcome(batch, torch.arange(len(batch.tokens)), new, cfg)
    wanted = outcome(parts, origin, new, cfg)
    for a, b in zip(found[:3], wanted[:3], strict=True):
        assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert found[3] == pytest.approx(wanted[3], rel=1e-5, abs=1e-6, nan_ok=True)


@pytest.mark.parametrize("unit", ["episode", "turn"])
@pytest.mark.parametrize("fields", SETTINGS, ids=lambda fields: "-".join(map(str, fields.values())))
def test_a_unit_is_a_response_to_the_tokens_before_it(fields: dict[str, Any], unit: str) -> None:
    """A turn equals a sample whose prompt is all before it; an episode, one without its observations.

    The tokens have the same log probabilities in both: only the loss, its weights, masks and metrics differ.
    """
    check(EPISODES, fields, unit, seed=0)


@settings(deadline=None, max_examples=12)
@given(
    masks=st.lists(st.text("so", max_size=9).map("p".__add__), min_size=1, max_size=5),
    unit=st.sampled_from(["episode", "turn"]),
    fields=st.sampled_from(SETTINGS),
    seed=st.integers(0, 99),
)
def test_any_mask(masks: list[str], unit: str, fields: dict[str, Any], seed: int) -> None:
    if any("s" in mask for mask in masks):
        check(masks, fields, unit, seed)


def formula(
    loss: str, delta: list[float], advantage: float, low: float, high: float
) -> tuple[float, list[float]]:
    """Return a sequence's term, to minimize, and its derivatives by the log probabilities, in float64."""
    n = len(delta)
    if loss == "gmpo":  # arXiv 2507.20673, equation 4
        clipped = [min(d, high) if advantage > 0 else max(d, -low) for d in delta]
        rho = math.exp(math.fsum(clipped) / n)
        free = [c == d for c, d in zip(clipped, delta, strict=True)]
        return -advantage * rho, [-advantage * rho / n * keeps for keeps in free]
    if loss == "grpo":  # arXiv 2402.03300, equation 3
        gains = [(math.exp(d), min(max(math.exp(d), 1 - low), 1 + high)) for d in delta]
        terms = [min(r * advantage, c * advantage) for r, c in gains]
        free = [r * advantage <= c * advantage for r, c in gains]
        grads = [-r * advantage / n * keeps for (r, _), keeps in zip(gains, free, strict=True)]
        return -math.fsum(terms) / n, grads
    ratio = math.exp(math.fsum(delta) / n)  # gspo: arXiv 2507.18071, equation 5
    clipped = min(max(ratio, 1 - low), 1 + high)
    keeps = ratio * advantage <= clipped * advantage
    return -min(ratio * advantage, clipped * advantage), [-ratio * advantage / n * keeps] * n


@pytest.mark.parametrize("unit", ["episode", "turn"])
@pytest.mark.parametrize(("loss", "clip"), [("gmpo", 0.3), ("grpo", 0.2), ("gspo", 0.1)])
def test_value_and_gradient_are_the_papers_in_float64(loss: str, clip: float, unit: str) -> None:
    batch = episodes(EPISODES)
    batch.turns = turn_numbers(batch.response_mask, batch.lengths) if unit == "turn" else None
    g = torch.Generator().manual_seed(3)
    new = -torch.rand(len(batch.tokens), generator=g, dtype=torch.float64)
    delta = (new - batch.old_logprobs.double()).tolist()
    terms, gradient = [], torch.zeros_like(new)
    for row, _, places in places_of(batch, unit):
        if not len(places):
            continue
        advantage = float(batch.advantages[row])
        values = formula(loss, [delta[at] for at in places.tolist()], advantage, clip, clip)
        terms.append(values[0])
        gradient[places] = torch.tensor(values[1], dtype=torch.float64)
    n = {"episode": 4, "turn": 3 + 1 + 4 + 2}[unit]
    assert len(terms) == n
    cfg = AlgorithmConfig(loss=loss, unit=unit, clip_low=clip, clip_high=clip)
    found, found_gradient, _, figures = outcome(batch, torch.arange(len(new)), new, cfg)
    assert float(found) == pytest.approx(math.fsum(terms) / n, rel=1e-12)
    assert_close(found_gradient, gradient / n, rtol=1e-12, atol=1e-15)
    assert 0 < figures["policy/clip_fraction_low"] + figures["policy/clip_fraction_high"] < 1


def test_the_limit_of_a_unit_divides_dr_grpo() -> None:
    def limit(**algorithm: Any) -> int:
        rollout = {"environment": "m:E", "max_new_tokens": 10, "max_episode_tokens": 70}
        return Config.model_validate({"rollout": rollout, "algorithm": algorithm}).max_sequence_tokens

    assert (limit(), limit(unit="turn")) == (70, 10)
    assert Config.model_validate({"rollout": {"max_new_tokens": 9}}).max_sequence_tokens == 9
