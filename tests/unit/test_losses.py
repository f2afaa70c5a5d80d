"""The policy losses against the papers' formulas in float64 and against TRL's own code."""

from __future__ import annotations

import math
import os
from collections import defaultdict
from dataclasses import dataclass, fields, replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from megatron_gmpo.errors import InputError
from megatron_gmpo.losses import LossOutput, LossTokens, gmpo
from megatron_gmpo.losses.registry import LOSSES, default_clips, resolve_loss
from megatron_gmpo.losses.rspo import log_router_shift
from megatron_gmpo.losses.signature import check_options

EXACT = {"rtol": 1e-9, "atol": 1e-12}
TOKEN_MEAN_LOSSES = {"dapo", "cispo"}


ATTRIBUTES = {field.name for field in fields(LossTokens)}


@dataclass
class Packed:
    """One microbatch in float64; ``logprobs`` is a leaf with gradient."""

    logprobs: Tensor
    old_logprobs: Tensor
    mask: Tensor
    sequence_ids: Tensor
    advantages: Tensor
    ref_logprobs: Tensor
    entropy: Tensor

    def run(self, name: str, **keywords) -> LossOutput:
        """Run the project's loss; gradients land in ``logprobs.grad`` and ``entropy.grad``.

        Keywords are attributes of ``LossTokens`` or arguments of the loss. Dr. GRPO's normalizer is 6 tokens.
        """
        self.logprobs.grad = self.entropy.grad = None
        keywords = {"columns": {"router_shift": router_shift(self.old_logprobs)}} | keywords
        attributes = {key: keywords.pop(key) for key in ATTRIBUTES & keywords.keys()}
        tokens = LossTokens(
            self.logprobs,
            self.old_logprobs,
            self.mask,
            self.sequence_ids,
            self.advantages,
            ref_logprobs=self.ref_logprobs,
            entropy=self.entropy,
            max_response_tokens=6,
            **attributes,
        )
        clips, _ = default_clips(name, LOSSES[name], is_moe=False)
        output = LOSSES[name].function(tokens, **clips | keywords)
        output.loss.backward()
        return replace(output, loss=output.loss.detach())

    def select(self, tokens: Tensor, sequences: Tensor) -> Packed:
        """Return the given slots of the given sequences, which are renumbered in their order."""
        number = torch.full_like(self.advantages, -1, dtype=torch.int64)
        number[sequences] = torch.arange(len(sequences))
        leaf = lambda x: x.detach()[tokens].clone().requires_grad_()  # noqa: E731
        return Packed(
            leaf(self.logprobs),
            self.old_logprobs[tokens],
            self.mask[tokens],
            number[self.sequence_ids[tokens]],
            self.advantages[sequences],
            self.ref_logprobs[tokens],
            leaf(self.entropy),
        )


def router_shift(old_logprobs: Tensor) -> Tensor:
    """Return a gamma for each token, on both sides of rspo's lower bound of 0.8."""
    return torch.exp(0.5 * torch.cos(40 * old_logprobs.double()) - 0.5)


@st.composite
def packed(draw, min_response: int = 0) -> Packed:
    """Draw 1-4 sequences of 1-6 slots, with deltas beyond every clip and advantages of both signs and 0."""
    rows = []
    for i in range(draw(st.integers(1, 4))):
        advantage = draw(st.sampled_from([0.0, 1.0, -1.0]) | st.floats(-2, 2))
        mask = draw(st.lists(st.booleans(), min_size=1, max_size=6).filter(lambda m: sum(m) >= min_response))
        rows += [(i, advantage, m, *(draw(st.floats(lo, hi)) for lo, hi in _RANGES)) for m in mask]
    ids, advantages, mask, logprobs, delta, ref_delta, entropy = (
        torch.tensor(column) for column in zip(*rows, strict=True)
    )
    logprobs, delta, ref_delta, entropy = (x.double() for x in (logprobs, delta, ref_delta, entropy))
    per_sequence = torch.stack([advantages[ids == i][0] for i in range(int(ids.max()) + 1)]).double()
    refs = logprobs - ref_delta
    return Packed(
        logprobs.requires_grad_(),
        logprobs.detach() - delta,
        mask,
        ids,
        per_sequence,
        refs.detach(),
        entropy.requires_grad_(),
    )


_RANGES = [(-8.0, -0.01), (-1.5, 2.0), (-1.0, 1.0), (0.0, 3.0)]  # logprob, delta, ref delta, entropy


def random_packed(seed: int, lengths: list[int], prompt: int = 2) -> Packed:
    """Return sequences with ``prompt`` masked slots and the given numbers of response tokens."""
    g = torch.Generator().manual_seed(seed)
    rand = lambda n, lo, hi: torch.rand(n, generator=g, dtype=torch.float64) * (hi - lo) + lo  # noqa: E731
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths) + prompt)
    mask = torch.cat([torch.arange(n + prompt) >= prompt for n in lengths])
    logprobs, delta, ref_delta, entropy = (rand(len(ids), lo, hi) for lo, hi in _RANGES)
    advantages = rand(len(lengths), -2, 2)
    old, ref = logprobs - delta, logprobs - ref_delta
    return Packed(logprobs.requires_grad_(), old, mask, ids, advantages, ref, entropy.requires_grad_())


# --- the papers' formulas for one sequence; new and old are the (n,) log probabilities of its response ---


def gmpo_paper(new, old, A, low=0.4, high=0.4, mode="token", normalize=True):
    """Return the paper's loss of a sequence in ratio space.

    With s = sgn(A), the product over the tokens is prod_t min(rho^s, clip(rho, e^-low, e^high)^s)^s.
    """
    s = 1.0 if A > 0 else -1.0
    power = 1 / len(new) if normalize else 1.0
    rho = torch.exp(new - old)
    if mode == "sequence":
        rho = torch.exp(((new - old).sum() * power)[None])
        power = 1.0
    clipped = rho if mode == "none" else rho.clamp(math.exp(-low), math.exp(high))
    return -A * torch.minimum(rho**s, clipped**s).prod() ** (s * power)


def rspo_paper(new, old, A, low=0.2, high=0.2, floor=0.8):
    """Return GMPO of the ratios gamma_t rho_t, in ratio space."""
    gamma = router_shift(old).clamp(min=floor)
    return gmpo_paper(new, old - gamma.log(), A, low, high)


def gmpo_dual(new, old, A, cap):
    delta = new - old
    clipped = (
        torch.minimum(delta, delta.new_tensor(0.4)) if A > 0 else torch.maximum(delta, delta.new_tensor(-0.4))
    )
    if A < 0:
        clipped = torch.minimum(clipped, delta.new_tensor(cap))
    return -A * torch.exp(clipped.mean())


def ppo_min(ratio, A, low, high):
    return torch.minimum(ratio * A, torch.clamp(ratio, 1 - low, 1 + high) * A)


def gspo_paper(new, old, A, low=3e-4, high=4e-4):
    return -ppo_min(torch.exp((new - old).sum() / len(new)), A, low, high)


def cispo_paper(new, old, A, low=1.0, high=4.0):
    return -(torch.exp(new - old).clamp(1 - low, 1 + high).detach() * A * new).sum()


FORMULAS = {
    "gmpo": ("gmpo", {}, gmpo_paper),
    "gmpo asymmetric": (
        "gmpo",
        {"clip_low": 0.1, "clip_high": 0.7},
        lambda new, old, A: gmpo_paper(new, old, A, 0.1, 0.7),
    ),
    "gmpo no clip": ("gmpo", {"clip_mode": "none"}, lambda new, old, A: gmpo_paper(new, old, A, mode="none")),
    "gmpo sequence clip": (
        "gmpo",
        {"clip_mode": "sequence", "clip_low": 0.2, "clip_high": 0.3},
        lambda new, old, A: gmpo_paper(new, old, A, 0.2, 0.3, mode="sequence"),
    ),
    "gmpo no 1/n": (
        "gmpo",
        {"length_normalize": False},
        lambda new, old, A: gmpo_paper(new, old, A, normalize=False),
    ),
    "gmpo sequence clip no 1/n": (
        "gmpo",
        {"clip_mode": "sequence", "length_normalize": False},
        lambda new, old, A: gmpo_paper(new, old, A, mode="sequence", normalize=False),
    ),
    "gmpo dual clip": ("gmpo", {"dual_clip": 0.97}, lambda new, old, A: gmpo_dual(new, old, A, 0.97)),
    "rspo": ("rspo", {}, rspo_paper),
    "rspo wide, low floor": (
        "rspo",
        {"clip_low": 0.5, "clip_high": 0.7, "min_router_shift": 0.5},
        lambda new, old, A: rspo_paper(new, old, A, 0.5, 0.7, 0.5),
    ),
    "grpo": ("grpo", {}, lambda new, old, A: -ppo_min(torch.exp(new - old), A, 0.2, 0.2).mean()),
    "grpo asymmetric": (
        "grpo",
        {"clip_low": 0.5, "clip_high": 0.9},
        lambda new, old, A: -ppo_min(torch.exp(new - old), A, 0.5, 0.9).mean(),
    ),
    "dr_grpo": ("dr_grpo", {}, lambda new, old, A: -ppo_min(torch.exp(new - old), A, 0.2, 0.2).sum() / 6),
    "dapo": ("dapo", {}, lambda new, old, A: -ppo_min(torch.exp(new - old), A, 0.2, 0.28).sum()),
    "gspo": ("gspo", {}, gspo_paper),
    "gspo wide": (
        "gspo",
        {"clip_low": 0.2, "clip_high": 0.4},
        lambda new, old, A: gspo_paper(new, old, A, 0.2, 0.4),
    ),
    "cispo": ("cispo", {}, cispo_paper),
    "cispo two-sided": (
        "cispo",
        {"clip_low": 0.3, "clip_high": 0.5},
        lambda new, old, A: cispo_paper(new, old, A, 0.3, 0.5),
    ),
}

# Derandomized, because a value exactly on a kink of a clip has several correct gradients.
quick = settings(
    deadline=None, max_examples=60, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)


def formula_loss(batch: Packed, formula, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return (loss, gradient) of a per-sequence formula."""
    leaf = batch.logprobs.detach().clone().requires_grad_()
    loss = leaf.sum() * 0
    for i, A in enumerate(batch.advantages):
        rows = batch.mask & (batch.sequence_ids == i)
        if rows.any():
            loss = loss + (1 if weights is None else weights[i]) * formula(
                leaf[rows], batch.old_logprobs[rows], A
            )
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient


@pytest.mark.parametrize("case", FORMULAS)
@quick
@given(batch=packed())
def test_value_and_gradient_match_the_formula(case: str, batch: Packed):
    name, options, formula = FORMULAS[case]
    output = batch.run(name, **options)
    loss, gradient = formula_loss(batch, formula)
    assert_close(output.loss, loss, **EXACT)
    assert_close(batch.logprobs.grad, gradient, **EXACT)


@quick
@given(batch=packed())
def test_gmpo_gradient_is_the_analytic_one(batch: Packed):
    batch.run("gmpo", clip_low=0.3, clip_high=0.5)
    expected = torch.zeros_like(batch.logprobs)
    for i, A in enumerate(batch.advantages):
        rows = batch.mask & (batch.sequence_ids == i)
        delta = (batch.logprobs - batch.old_logprobs).detach()[rows]
        kept = delta <= 0.5 if A > 0 else delta >= -0.3
        c = delta.clamp(max=0.5) if A > 0 else delta.clamp(min=-0.3)
        expected[rows] = -A * torch.exp(c.mean()) * kept / max(len(delta), 1)
    assert_close(batch.logprobs.grad, expected, **EXACT)


# --- TRL's code, with given log probabilities instead of its model's forward pass ---


@pytest.fixture(scope="module")
def trl():
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from trl import GRPOTrainer
    from trl.experimental.gmpo import GMPOTrainer

    return {"gmpo": GMPOTrainer, "grpo": GRPOTrainer}


TRL_SETTINGS = {
    "gmpo": {"epsilon_low": 0.3, "epsilon_high": 0.5},
    "grpo": {"epsilon_low": 0.2, "epsilon_high": 0.2, "loss_type": "grpo"},
    "dr_grpo": {"epsilon_low": 0.2, "epsilon_high": 0.2, "loss_type": "dr_grpo", "max_completion_length": 6},
    "dapo": {"epsilon_low": 0.2, "epsilon_high": 0.28, "loss_type": "dapo"},
    "gspo": {
        "epsilon_low": 3e-4,
        "epsilon_high": 4e-4,
        "loss_type": "grpo",
        "importance_sampling_level": "sequence",
    },
    "cispo": {"epsilon_low": None, "epsilon_high": 5.0, "loss_type": "cispo"},
}


def trl_loss(trainer_class, batch: Packed, beta: float, **attributes) -> tuple[Tensor, Tensor, dict]:
    """Return (loss, gradient in packed order, metrics) of TRL's ``_compute_loss``.

    The batch is padded to (B, T).
    """
    S, width = len(batch.advantages), int(torch.bincount(batch.sequence_ids).max())
    column = torch.cat([torch.arange(n) for n in torch.bincount(batch.sequence_ids)])
    place = batch.sequence_ids, column  # ids ascend, so this is each slot's (row, column)

    def pad(x: Tensor) -> Tensor:
        out = torch.zeros(S, width, dtype=x.dtype)
        out[place] = x.detach()
        return out

    logprobs = pad(batch.logprobs).requires_grad_()
    mask = pad(batch.mask.double())
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs, pad(batch.entropy), None),
        top_entropy_quantile=1.0,
        beta=beta,
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
        accelerator=SimpleNamespace(reduce=lambda x, reduction: x, gather=lambda x: x, num_processes=1),
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        importance_sampling_level="token",
        off_policy_mask_threshold=None,
        aux_loss_enabled=False,
        use_vllm=False,
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
    )
    vars(trainer).update(attributes)
    inputs = {
        "prompt_ids": torch.zeros(S, 1, dtype=torch.int64),
        "prompt_mask": torch.ones(S, 1),
        "completion_ids": torch.zeros(S, width, dtype=torch.int64),
        "completion_mask": mask,
        "advantages": batch.advantages,
        "old_per_token_logps": pad(batch.old_logprobs),
        "ref_per_token_logps": pad(batch.ref_logprobs),
        "num_items_in_batch": mask.sum(),
    }
    loss = trainer_class._compute_loss(trainer, None, inputs)
    loss.backward()
    return loss.detach(), logprobs.grad[place], trainer._metrics["train"]


@pytest.mark.parametrize("beta", [0.0, 0.07])
@pytest.mark.parametrize("name", TRL_SETTINGS)
@settings(quick, max_examples=15)
@given(batch=packed(min_response=1))
def test_matches_trl(trl, name: str, beta: float, batch: Packed):
    attributes = TRL_SETTINGS[name]
    loss, gradient, metrics = trl_loss(trl.get(name, trl["grpo"]), batch, beta, **attributes)
    clip = (
        {"clip_low": attributes["epsilon_low"], "clip_high": attributes["epsilon_high"]}
        if name == "gmpo"
        else {}
    )
    output = batch.run(name, kl_coef=beta, **clip)
    divisor = batch.mask.sum() if name in TOKEN_MEAN_LOSSES else len(batch.advantages)
    assert_close(output.loss / divisor, loss, **EXACT)
    assert_close(batch.logprobs.grad / divisor, gradient, **EXACT)
    if name in ("gmpo", "grpo", "dapo"):
        for side in ("low", "high"):
            assert mean(output, f"policy/clip_fraction_{side}") == pytest.approx(
                metrics[f"clip_ratio/{side}_mean"][0]
            )


# --- properties of all losses ---

all_losses = pytest.mark.parametrize("name", LOSSES)


def mean(output: LossOutput, name: str) -> float:
    metric = output.metrics[name]
    assert metric.op == "mean"
    return float(metric.total / metric.count)


@all_losses
def test_fully_masked_sequences_contribute_nothing(name: str):
    batch = random_packed(0, [3, 5, 0, 2])
    full = batch.run(name, kl_coef=0.1, entropy_coef=0.1)
    rest = batch.select((batch.sequence_ids != 2).nonzero()[:, 0], torch.tensor([0, 1, 3]))
    assert_close(rest.run(name, kl_coef=0.1, entropy_coef=0.1).loss, full.loss, rtol=0, atol=0)
    assert (batch.logprobs.grad[batch.sequence_ids == 2] == 0).all()

    empty = random_packed(0, [0, 0])
    output = empty.run(name, kl_coef=0.1, entropy_coef=0.1)
    assert output.loss == 0
    assert (empty.logprobs.grad == 0).all()
    assert output.metrics["policy/log_ratio_max"].total == -math.inf
    assert output.metrics["policy/ratio_min"].total == math.inf
    assert output.metrics["policy/clip_fraction_high"].count == 0


@all_losses
def test_garbage_outside_the_mask_changes_nothing(name: str):
    clean = random_packed(1, [3, 4, 0], prompt=3)
    options = {"kl_coef": 0.1, "entropy_coef": 0.2}
    expected = clean.run(name, **options)
    outside = ~clean.mask
    garbage = torch.tensor([math.nan, math.inf, -math.inf], dtype=torch.float64).repeat(len(clean.mask))[
        : len(clean.mask)
    ]

    def spoil(x: Tensor, shift: int) -> Tensor:
        return torch.where(outside, garbage.roll(shift), x.detach())

    dirty = replace(
        clean,
        logprobs=spoil(clean.logprobs, 0).requires_grad_(),
        old_logprobs=spoil(clean.old_logprobs, 1),
        ref_logprobs=spoil(clean.ref_logprobs, 2),
        entropy=spoil(clean.entropy, 1).requires_grad_(),
    )
    output = dirty.run(name, **options)
    assert_close(output.loss, expected.loss, rtol=0, atol=0)
    assert_close(dirty.logprobs.grad, clean.logprobs.grad, rtol=0, atol=0)
    assert_close(dirty.entropy.grad, clean.entropy.grad, rtol=0, atol=0)
    assert (dirty.logprobs.grad[outside] == 0).all()
    assert (dirty.logprobs.grad[clean.mask] != 0).any()
    totals = [
        {k: torch.as_tensor(m.total).tolist() for k, m in o.metrics.items()} for o in (output, expected)
    ]
    assert totals[0] == totals[1]


@all_losses
def test_packing_order_does_not_matter(name: str):
    batch = random_packed(2, [3, 1, 6, 2])
    expected = batch.run(name, kl_coef=0.1)
    tokens, sequences = torch.randperm(len(batch.mask)), torch.tensor([2, 0, 3, 1])
    shuffled = batch.select(tokens, sequences)
    assert_close(shuffled.run(name, kl_coef=0.1).loss, expected.loss, **EXACT)
    assert_close(shuffled.logprobs.grad, batch.logprobs.grad[tokens], **EXACT)


@all_losses
def test_microbatches_sum_to_the_whole(name: str):
    batch = random_packed(3, [3, 1, 6, 0, 2])
    whole = batch.run(name, kl_coef=0.1, entropy_coef=0.1)
    parts, gradient = [], torch.zeros_like(batch.logprobs)
    for sequences in (torch.tensor([4, 0]), torch.tensor([1]), torch.tensor([2, 3])):
        tokens = torch.isin(batch.sequence_ids, sequences).nonzero()[:, 0]
        part = batch.select(tokens, sequences)
        parts.append(part.run(name, kl_coef=0.1, entropy_coef=0.1))
        gradient[tokens] = part.logprobs.grad
    assert_close(sum(part.loss for part in parts), whole.loss, **EXACT)
    assert_close(gradient, batch.logprobs.grad, **EXACT)
    for key, metric in whole.metrics.items():
        totals = torch.stack([part.metrics[key].total for part in parts])
        if metric.op == "histogram":
            assert_close(totals.sum(0), metric.total, **EXACT)
        elif metric.op == "mean":
            assert_close(totals.sum(), metric.total, **EXACT)
            assert_close(sum(part.metrics[key].count for part in parts), metric.count, **EXACT)
        else:
            assert metric.total == (totals.max() if metric.op == "max" else totals.min())


@all_losses
def test_weights_multiply_the_policy_term_and_not_the_penalty(name: str):
    batch = random_packed(4, [3, 2, 5])
    weights = torch.tensor([0.0, 0.5, 3.0], dtype=torch.float64)
    formula = FORMULAS[name][2]
    policy, policy_gradient = formula_loss(batch, formula, weights)

    def penalty(new, _, __):
        rows = torch.isin(batch.logprobs.detach(), new.detach())
        ref, entropy = batch.ref_logprobs[rows], batch.entropy.detach()[rows]
        divisor = 1 if name in TOKEN_MEAN_LOSSES else 6 if name == "dr_grpo" else len(new)
        return (0.3 * (torch.exp(ref - new) - (ref - new) - 1) - 0.2 * entropy).sum() / divisor

    extra, extra_gradient = formula_loss(batch, penalty)
    output = batch.run(name, kl_coef=0.3, entropy_coef=0.2, sequence_weights=weights)
    assert_close(output.loss, policy + extra, **EXACT)
    assert_close(batch.logprobs.grad, policy_gradient + extra_gradient, **EXACT)
    assert (batch.entropy.grad[batch.mask] < 0).all()


@all_losses
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_arithmetic_is_fp32(name: str, dtype: torch.dtype):
    batch = random_packed(5, [40, 30, 1])
    low = replace(
        batch,
        logprobs=batch.logprobs.detach().to(dtype).requires_grad_(),
        old_logprobs=batch.old_logprobs.to(dtype),
        advantages=batch.advantages.float(),
    )
    exact = replace(
        low, logprobs=low.logprobs.detach().double().requires_grad_(), old_logprobs=low.old_logprobs.double()
    )
    output = low.run(name)
    assert output.loss.dtype == torch.float32
    assert low.logprobs.grad.dtype == dtype
    assert_close(output.loss.double(), exact.run(name).loss, rtol=2e-5, atol=1e-5)


@all_losses
def test_metrics_are_means_and_extremes_over_tokens(name: str):
    batch = random_packed(6, [4, 3, 5])
    output = batch.run(name)
    assert not any(
        torch.as_tensor(x).requires_grad for m in output.metrics.values() for x in (m.total, m.count)
    )
    delta = (batch.logprobs - batch.old_logprobs).detach()[batch.mask]
    ref = (batch.ref_logprobs - batch.logprobs).detach()[batch.mask]
    assert float(output.metrics["policy/log_ratio_max"].total) == pytest.approx(float(delta.max()))
    assert float(output.metrics["policy/log_ratio_min"].total) == pytest.approx(float(delta.min()))
    assert mean(output, "policy/kl_old") == pytest.approx(float((delta.exp() - 1 - delta).mean()))
    assert mean(output, "policy/kl_ref") == pytest.approx(float((ref.exp() - 1 - ref).mean()))
    assert mean(output, "policy/entropy") == pytest.approx(float(batch.entropy.detach()[batch.mask].mean()))
    if name not in ("gmpo", "rspo", "gspo"):
        assert float(output.metrics["policy/ratio_max"].total) == pytest.approx(float(delta.max().exp()))
        assert float(output.metrics["policy/ratio_min"].total) == pytest.approx(float(delta.min().exp()))


def example(deltas: list[list[float]], advantages: list[float]) -> Packed:
    """Return sequences with the given log ratios."""
    batch = random_packed(7, [len(row) for row in deltas], prompt=0)
    delta = torch.tensor([x for row in deltas for x in row], dtype=torch.float64)
    return replace(
        batch,
        old_logprobs=batch.logprobs.detach() - delta,
        advantages=torch.tensor(advantages, dtype=torch.float64),
    )


# --- tokens and sequences that a mask excludes from the policy term ---


def left_out(batch: Packed, kept: Tensor, drifted: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Return (loss, gradient) according to the definition.

    The formula applies to the kept tokens; the divisor counts all tokens of the sequence.
    """
    leaf = batch.logprobs.detach().clone().requires_grad_()
    loss = leaf.sum() * 0
    formula = FORMULAS[name][2]
    for i, A in enumerate(batch.advantages):
        rows = batch.mask & (batch.sequence_ids == i)
        stays = rows & kept
        if drifted[i] or not stays.any():
            continue
        if name in ("gmpo", "rspo", "gspo"):  # an excluded token has the ratio 1
            old = torch.where(stays, batch.old_logprobs, leaf.detach())
            new = torch.where(stays, leaf, leaf.detach())
            if name == "rspo":
                gamma = router_shift(batch.old_logprobs).clamp(min=0.8).where(stays, 1.0)
                loss = loss + gmpo_paper(new[rows], (old - gamma.log())[rows], A, 0.2, 0.2)
            else:
                loss = loss + formula(new[rows], old[rows], A)
        else:
            term = formula(leaf[stays], batch.old_logprobs[stays], A)
            loss = loss + (term * stays.sum() / rows.sum() if name == "grpo" else term)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient


@pytest.mark.slow
@all_losses
@quick
@given(batch=packed(), seed=st.integers(0, 9))
def test_tokens_left_out_lose_their_term_and_stay_in_the_divisor(name: str, batch: Packed, seed: int):
    kept = torch.rand(len(batch.mask), generator=torch.Generator().manual_seed(seed)) < 0.6
    output = batch.run(name, kept=kept)
    loss, gradient = left_out(batch, kept, torch.zeros(len(batch.advantages), dtype=torch.bool), name)
    assert_close(output.loss, loss, **EXACT)
    assert_close(batch.logprobs.grad, gradient, **EXACT)
    masked = output.metrics["policy/masked_fraction"]
    assert (masked.total, masked.count) == ((batch.mask & ~kept).sum(), batch.mask.sum())


def off_policy(batch: Packed, rollout: Tensor, max_kl: float) -> Tensor:
    """Return (S,) bool by DeepSeek-V3.2's rule: A < 0 and a mean log(pi_rollout / pi) above the bound."""
    rows = [batch.mask & (batch.sequence_ids == i) for i in range(len(batch.advantages))]
    means = [float((rollout - batch.logprobs.detach())[r].mean()) if r.any() else 0.0 for r in rows]
    return torch.tensor([float(A) < 0 and kl > max_kl for A, kl in zip(batch.advantages, means, strict=True)])


@pytest.mark.slow
@all_losses
@quick
@given(batch=packed(), max_kl=st.sampled_from([0.0, 0.1, 0.5]))
def test_off_policy_sequences_with_a_negative_advantage_are_left_out(name: str, batch: Packed, max_kl: float):
    output = batch.run(name, rollout_logprobs=batch.ref_logprobs, max_kl=max_kl)
    drifted = off_policy(batch, batch.ref_logprobs, max_kl)
    loss, gradient = left_out(batch, torch.ones_like(batch.mask), drifted, name)
    assert_close(output.loss, loss, **EXACT)
    assert_close(batch.logprobs.grad, gradient, **EXACT)
    nonempty = torch.bincount(batch.sequence_ids[batch.mask], minlength=len(drifted)) > 0
    masked = output.metrics["policy/masked_sequences"]
    assert (masked.total, masked.count) == ((drifted & nonempty).sum(), nonempty.sum())


@settings(quick, max_examples=15)
@given(batch=packed(min_response=1))
def test_off_policy_masking_matches_trl(trl, batch: Packed):
    width = int(torch.bincount(batch.sequence_ids).max())

    def pad(x: Tensor) -> Tensor:
        return torch.stack([torch.nn.functional.pad(x[r], (0, width - int(r.sum()))) for r in rows])

    rows = [batch.sequence_ids == i for i in range(len(batch.advantages))]
    keep = trl["grpo"].get_off_policy_mask(
        batch.advantages[:, None],
        pad(batch.logprobs.detach()),
        pad(batch.ref_logprobs),
        pad(batch.mask.double()),
        0.1,
    )
    assert_close(keep[:, 0] == 0, off_policy(batch, batch.ref_logprobs, 0.1))


@all_losses
def test_a_step_with_everything_left_out_is_nothing(name: str):
    batch = random_packed(8, [3, 4])
    batch.old_logprobs[batch.mask] -= 2000  # ratios of infinity
    nothing = torch.zeros_like(batch.mask)
    output = batch.run(name, kept=nothing)
    assert output.loss == 0
    assert (batch.logprobs.grad == 0).all()
    assert (
        output.metrics["policy/masked_fraction"].total == output.metrics["policy/masked_fraction"].count == 7
    )
    assert output.metrics["policy/masked_sequences"].total == 2
    with_penalty = batch.run(name, kept=nothing, kl_coef=0.1)
    assert float(with_penalty.loss) == pytest.approx(
        0.1 * float(random_packed(8, [3, 4]).run(name, kl_coef=1.0, **silent(name)).loss)
    )


def silent(name: str) -> dict:
    """Return attributes with which the policy term of two sequences is 0."""
    return {"sequence_weights": torch.zeros(2, dtype=torch.float64)}


def test_gmpo_without_length_normalization_survives_a_weight_of_zero():
    batch = random_packed(8, [3, 4])
    batch.old_logprobs[batch.mask] -= 2000
    batch.advantages = torch.tensor([-1.0, -1.0], dtype=torch.float64)
    output = batch.run("gmpo", length_normalize=False, sequence_weights=torch.zeros(2, dtype=torch.float64))
    assert output.loss == 0
    assert (batch.logprobs.grad == 0).all()


def test_router_shift_is_the_formula():
    g = torch.Generator().manual_seed(0)
    scores, old = (torch.randn(5, 2, generator=g).log_softmax(-1) for _ in range(2))
    expected = [-sum(abs(float(scores[t, k] - old[t, k])) for k in range(2)) / 2 for t in range(5)]
    assert_close(log_router_shift(scores.requires_grad_(), old), torch.tensor(expected))
    assert not log_router_shift(scores, old).requires_grad


def test_rspo_without_a_shift_is_gmpo_and_reports_the_shift():
    batch = random_packed(9, [4, 5])
    known = batch.run("gmpo", clip_low=0.2, clip_high=0.2)
    gradient = batch.logprobs.grad
    still = torch.ones_like(batch.logprobs)
    assert_close(batch.run("rspo", columns={"router_shift": still}).loss, known.loss, **EXACT)
    assert_close(batch.logprobs.grad, gradient, **EXACT)
    moved = still.clone().requires_grad_()
    output = batch.run("rspo", columns={"router_shift": moved * 0.9})
    assert mean(output, "policy/router_shift") == pytest.approx(0.9)
    assert mean(output, "policy/router_shift_floored") == 0
    assert mean(batch.run("rspo", columns={"router_shift": still * 0.5}), "policy/router_shift_floored") == 1
    assert moved.grad is None


@all_losses
def test_ratios_before_and_after_the_mean(name: str):
    batch = example([[1.0, -1.0, 0.1], [1.0, -1.0, 0.1]], [1.0, -1.0])
    found = {
        key: float(m.total)
        for key, m in batch.run(name, clip_low=0.2, clip_high=0.3).metrics.items()
        if "ratio_m" in key
    }
    delta = [1.0, -1.0, 0.1]
    if name == "gspo":
        tokens = [math.exp(d) for d in delta]
        sequences = [math.exp(sum(delta) / 3)] * 2
    elif name in ("gmpo", "rspo"):
        gamma = router_shift(batch.old_logprobs).clamp(min=0.8).log() if name == "rspo" else torch.zeros(6)
        log = [
            *(torch.tensor(delta) + gamma[:3]).clamp(max=0.3).tolist(),
            *(torch.tensor(delta) + gamma[3:]).clamp(min=-0.2).tolist(),
        ]
        tokens = [math.exp(x) for x in log]
        sequences = [math.exp(sum(log[:3]) / 3), math.exp(sum(log[3:]) / 3)]
    elif name == "cispo":
        tokens = [min(max(math.exp(d), 0.8), 1.3) for d in delta]
        sequences = [sum(tokens) / 3] * 2
    else:
        tokens = [*(min(math.exp(d), 1.3) for d in delta), *(max(math.exp(d), 0.8) for d in delta)]
        sequences = [sum(tokens[:3]) / 3, sum(tokens[3:]) / 3]
    for which, values in (("token", tokens), ("sequence", sequences)):
        assert found[f"policy/{which}_ratio_max"] == pytest.approx(max(values))
        assert found[f"policy/{which}_ratio_min"] == pytest.approx(min(values))


def test_gmpo_clip_counts_only_the_active_side():
    batch = example([[0.5, -0.9, 0.6, 0.1], [0.5, -0.9, 0.1], [0.5, -0.9, 0.0]], [1.0, -1.0, 0.0])
    output = batch.run("gmpo")
    assert (
        output.metrics["policy/clip_fraction_high"].total,
        output.metrics["policy/clip_fraction_high"].count,
    ) == (2, 10)
    assert (
        output.metrics["policy/clip_fraction_low"].total,
        output.metrics["policy/clip_fraction_low"].count,
    ) == (1, 10)
    ratios = [
        math.exp((0.4 - 0.9 + 0.4 + 0.1) / 4),
        math.exp((0.5 - 0.4 + 0.1) / 3),
        math.exp((0.5 - 0.4) / 3),
    ]
    assert float(output.metrics["policy/ratio_max"].total) == pytest.approx(max(ratios))
    assert float(output.metrics["policy/ratio_min"].total) == pytest.approx(min(ratios))
    assert float(output.loss) == pytest.approx(-ratios[0] + ratios[1])


def test_sequence_level_clips_count_sequences():
    batch = example([[0.5, 0.5], [0.5, -0.5], [-0.5, -0.5], []], [1.0, 1.0, -1.0, 1.0])
    for name, options in (("gmpo", {"clip_mode": "sequence"}), ("gspo", {})):
        metrics = batch.run(name, **options).metrics
        for side in ("high", "low"):
            assert (
                metrics[f"policy/clip_fraction_{side}"].total,
                metrics[f"policy/clip_fraction_{side}"].count,
            ) == (1, 3)


def test_cispo_clips_and_counts_both_sides_of_any_sign():
    batch = example([[2.0, -3.0, 0.0], [2.0, 0.0]], [1.0, -1.0])
    metrics = batch.run("cispo", clip_low=0.9).metrics
    high, low = metrics["policy/clip_fraction_high"], metrics["policy/clip_fraction_low"]
    assert (high.total, low.total, high.count, low.count) == (2, 1, 5, 5)
    assert_close(batch.logprobs.grad, torch.tensor([-5, -0.1, -1, 5, 1], dtype=torch.float64), **EXACT)


def test_clip_mode_none_counts_nothing():
    metrics = example([[5.0], [-5.0]], [1.0, -1.0]).run("gmpo", clip_mode="none").metrics
    assert metrics["policy/clip_fraction_high"].total == metrics["policy/clip_fraction_low"].total == 0


def test_dual_clip_bounds_negative_advantages_only():
    batch = example([[3.0, 0.1], [3.0, 0.1]], [-1.0, 1.0])
    output = batch.run("gmpo", dual_clip=1.0, clip_high=10.0)
    assert float(output.loss) == pytest.approx(math.exp(1.1 / 2) - math.exp(3.1 / 2))
    assert batch.logprobs.grad[0] == 0
    assert (batch.logprobs.grad[1:] != 0).all()
    assert (
        output.metrics["policy/clip_fraction_dual"].total,
        output.metrics["policy/clip_fraction_dual"].count,
    ) == (1, 4)


def test_gmpo_of_long_sequences_stays_in_log_space():
    n = 20_000
    batch = example([[0.3] * n, [-0.3] * n], [1.0, -1.0])
    batch = replace(
        batch,
        logprobs=batch.logprobs.detach().float().requires_grad_(),
        old_logprobs=batch.old_logprobs.float(),
    )
    output = batch.run("gmpo")
    assert float(output.loss) == pytest.approx(-math.exp(0.3) + math.exp(-0.3), rel=1e-6)
    assert_close(batch.logprobs.grad[0], torch.tensor(-math.exp(0.3) / n), rtol=1e-6, atol=0)


def test_on_policy_gmpo_has_the_gradient_of_grpo():
    batch = random_packed(8, [3, 5, 2])
    batch = replace(batch, old_logprobs=batch.logprobs.detach())
    batch.run("gmpo")
    gradient = batch.logprobs.grad
    batch.run("grpo")
    assert_close(gradient, batch.logprobs.grad, **EXACT)


@pytest.mark.parametrize(
    ("attribute", "needs"),
    [("kl_coef", "ref_logprobs"), ("entropy_coef", "entropy"), ("max_kl", "rollout_logprobs")],
)
def test_a_coefficient_needs_its_column(attribute: str, needs: str):
    with pytest.raises(AssertionError, match=f"{attribute} needs {needs}"):
        LossTokens(*[torch.ones(1)] * 5, **{attribute: 0.1})


def test_sums_have_names_of_their_own():
    tokens = LossTokens(*[torch.ones(1)] * 2, torch.ones(1) > 0, torch.zeros(1).long(), torch.ones(1))
    assert tokens.sum_per_sequence({"mine": torch.ones(1)}).keys() == {
        "mine",
        "tokens",
        "kept",
        "kl_old",
        "kl_bounded",
    }
    with pytest.raises(AssertionError, match=r"names in use: \['tokens'\]"):
        tokens.sum_per_sequence({"tokens": torch.ones(1)})


# --- the registry ---


def test_default_clips():
    def clips(name: str, is_moe: bool) -> tuple[float, float]:
        found, _ = default_clips(name, LOSSES[name], is_moe)
        return found["clip_low"], found["clip_high"]

    assert clips("gmpo", is_moe=False) == (0.4, 0.4)
    assert clips("gmpo", is_moe=True) == clips("rspo", is_moe=True) == (0.2, 0.2)
    assert clips("grpo", is_moe=True) == clips("dr_grpo", is_moe=False) == (0.2, 0.2)
    assert clips("dapo", is_moe=True) == (0.2, 0.28)
    assert clips("gspo", is_moe=True) == (3e-4, 4e-4)
    assert clips("cispo", is_moe=False) == (1.0, 4.0)
    assert "MoE" in default_clips("gmpo", LOSSES["gmpo"], is_moe=True)[1]


def test_properties_of_the_built_in_losses():
    assert {name for name, loss in LOSSES.items() if loss.divisor == "tokens"} == TOKEN_MEAN_LOSSES
    assert {name for name, loss in LOSSES.items() if loss.clip_space == "log_ratio"} == {"gmpo", "rspo"}
    assert {name for name, loss in LOSSES.items() if loss.needs} == {"rspo"}
    sums = {"grpo", "dr_grpo", "dapo", "cispo"}
    assert {name for name, loss in LOSSES.items() if loss.token_weights} == sums


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("gmpo", {"clip_mod": "token"}, "options.clip_mod .*options.clip_mode"),
        ("gmpo", {"clip_low": 0.1}, "options.clip_low .*algorithm.clip_low"),
        ("gmpo", {"cp_group": None}, "options.cp_group is not an option"),
        ("gmpo", {"clip_mode": "tokens"}, "options.clip_mode = 'tokens'.*'token', 'sequence' or 'none'"),
        ("gmpo", {"dual_clip": -1.0}, "options.dual_clip = -1.0.*greater than 0"),
        ("gmpo", {"length_normalize": 0}, "options.length_normalize = 0.*boolean"),
        ("gmpo", {"length_normalize": "maybe"}, "options.length_normalize = 'maybe'.*boolean"),
        ("gmpo", {"dual_clip": True}, "options.dual_clip = True.*number"),
        ("gmpo", {"dual_clip": "nan"}, "options.dual_clip = 'nan'.*finite"),
        ("dr_grpo", {"length_normalizer": 0}, "options.length_normalizer = 0.*greater than 0"),
    ],
)
def test_options_are_checked_by_their_annotations(name: str, options: dict, message: str):
    with pytest.raises(InputError, match=message) as error:
        check_options(name, LOSSES[name].function, options)
    assert "\n" not in str(error.value)


@all_losses
def test_defaults_pass_the_check(name: str):
    assert resolve_loss(name) is LOSSES[name]
    check_options(name, LOSSES[name].function, {})
    check_options(
        "gmpo", LOSSES["gmpo"].function, {"clip_mode": "none", "dual_clip": 3, "length_normalize": False}
    )


def test_options_written_as_text_have_the_type_of_their_annotation() -> None:
    written = {"clip_mode": "none", "dual_clip": "1.e-3", "length_normalize": "False"}
    assert check_options("gmpo", LOSSES["gmpo"].function, written) == {
        "clip_mode": "none",
        "dual_clip": 0.001,
        "length_normalize": False,
    }


def test_an_overflowing_ratio_without_1_over_n_is_nothing_where_the_advantage_is_0() -> None:
    logprobs = torch.zeros(2000, requires_grad=True)
    old = torch.full((2000,), -0.05)
    tokens = LossTokens(
        logprobs,
        old,
        torch.ones(2000, dtype=torch.bool),
        torch.zeros(2000, dtype=torch.int64),
        torch.zeros(1),
    )
    output = gmpo(tokens, clip_low=0.4, clip_high=0.4, length_normalize=False)
    output.loss.backward()
    assert output.loss.item() == 0
    assert logprobs.grad is not None
    assert logprobs.grad.abs().max() == 0
