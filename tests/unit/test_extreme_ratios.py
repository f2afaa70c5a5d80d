"""Log ratios beyond the range of fp32: loss and gradient are those of the definition, rounded to fp32.

The definition is written out below in Python's floats and without autograd, so it has no product of 0 and
infinity.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from megatron_gmpo.batch.columns import TrainBatch
from megatron_gmpo.losses import LossOutput, LossTokens
from megatron_gmpo.losses.correction import importance_weights, rollout_mismatch
from megatron_gmpo.losses.registry import LOSSES, default_clips
from megatron_gmpo.metrics.figures import value_of

DELTAS = [-2000.0, -100.0, -94.0, -21.0, -1.0, 0.0, 0.125, 1.0, 21.0, 60.0, 94.0, 100.0, 700.0, 2000.0]
"""Log ratios, exact in fp32. fp32's exp overflows from 88.7 on, and float64's from 709.8 on."""
MAX_RESPONSE = 4
BOUND = 20.0  # of the exponent of k3

quick = settings(
    deadline=None, max_examples=60, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)


def exp(x: float) -> float:
    return math.exp(x) if x < 709.0 else math.inf


@dataclass
class Sequence:
    advantage: float
    weight: float
    logprobs: list[float]
    deltas: list[float]
    kept: list[bool]
    token_weights: list[float]
    shifts: list[float]
    off_policy: bool


def several(values: Any, count: int) -> st.SearchStrategy[list[Any]]:
    return st.lists(st.sampled_from(values), min_size=count, max_size=count)


@st.composite
def sequences(draw: st.DrawFn) -> list[Sequence]:
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        n = draw(st.integers(1, MAX_RESPONSE))
        rows.append(
            Sequence(
                advantage=draw(st.sampled_from([0.0, 1.0, -1.0, 0.5, -2.0])),
                weight=draw(st.sampled_from([1.0, 1.0, 0.0, 0.5])),
                logprobs=draw(several([-0.25, -1.5, -8.0], n)),
                deltas=draw(several(DELTAS, n)),
                kept=draw(several([True, True, True, False], n)),
                token_weights=draw(several([1.0, 1.0, 0.0, 2.0], n)),
                shifts=draw(several([1.0, 0.5], n)),
                off_policy=draw(st.sampled_from([False, False, True])),
            )
        )
    return rows


CASES = {
    **{name: (name, {}) for name in LOSSES},
    "gmpo no clip": ("gmpo", {"clip_mode": "none"}),
    "gmpo sequence clip": ("gmpo", {"clip_mode": "sequence"}),
    "gmpo no 1/n": ("gmpo", {"length_normalize": False}),
    "gmpo dual clip": ("gmpo", {"dual_clip": 3.0}),
    "cispo almost without a clip": ("cispo", {"clip_high": 1e36}),
}


def definition(case: str, row: Sequence) -> tuple[float, list[float]]:
    """Return a sequence's loss and its gradient by the log probabilities."""
    name, options = CASES[case]
    clips = default_clips(name, LOSSES[name], is_moe=False)[0] | options
    low, high = clips["clip_low"], clips["clip_high"]
    A, n = row.advantage, len(row.deltas)
    nothing = 0.0, [0.0] * n
    if A == 0 or row.weight == 0 or not any(row.kept) or (row.off_policy and A < 0):
        return nothing
    if name in ("gmpo", "rspo", "gspo"):
        loss, gradient = _of_sequence(name, options, row, low, high)
        return -row.weight * A * loss, [-row.weight * A * g for g in gradient]
    loss, gradient = 0.0, []
    divisor = {"grpo": n, "dr_grpo": MAX_RESPONSE}.get(name, 1)
    for logprob, delta, kept, weight in zip(
        row.logprobs, row.deltas, row.kept, row.token_weights, strict=True
    ):
        factor = row.weight * weight * A / divisor
        if not kept or weight == 0:
            gradient.append(0.0)
            continue
        ratio = exp(delta)
        if name == "cispo":
            clipped = min(max(ratio, 1 - low), 1 + high)
            loss -= factor * clipped * logprob
            gradient.append(-factor * clipped)
        else:
            clipped = min(ratio, 1 + high) if A > 0 else max(ratio, 1 - low)
            loss -= factor * clipped
            gradient.append(-factor * ratio if ratio == clipped else 0.0)
    return loss, gradient


def _of_sequence(
    name: str, options: dict, row: Sequence, low: float, high: float
) -> tuple[float, list[float]]:
    """Return the clipped ratio of a sequence and its gradient."""
    A, n = row.advantage, len(row.deltas)
    mode = options.get("clip_mode", "sequence" if name == "gspo" else "token")
    lowest, highest = (math.log(1 - low), math.log(1 + high)) if name == "gspo" else (-low, high)
    power = 1 / n if options.get("length_normalize", True) else 1.0

    def clip(x: float) -> float:
        x = min(x, highest) if A > 0 else max(x, lowest)
        return min(x, options["dual_clip"]) if A < 0 and "dual_clip" in options else x

    shifts = [math.log(max(s, 0.8)) if name == "rspo" else 0.0 for s in row.shifts]
    deltas = [d + s if kept else 0.0 for d, s, kept in zip(row.deltas, shifts, row.kept, strict=True)]
    tokens = [clip(d) for d in deltas] if mode == "token" else deltas
    exponent = sum(tokens) * power
    clipped = clip(exponent) if mode == "sequence" else exponent
    ratio = exp(clipped)
    moves = [
        kept and token == delta and clipped == exponent
        for kept, token, delta in zip(row.kept, tokens, deltas, strict=True)
    ]
    return ratio, [ratio * power if moving else 0.0 for moving in moves]


def run(case: str, rows: list[Sequence], **others) -> tuple[LossOutput, Tensor]:
    """Return the fp32 output of the loss and the gradient of the log probabilities."""
    name, options = CASES[case]
    flat = lambda column: [x for row in rows for x in getattr(row, column)]  # noqa: E731
    logprobs = torch.tensor(flat("logprobs"), requires_grad=True)
    off_policy = [row.off_policy for row in rows for _ in row.deltas]
    token_weights = torch.tensor(flat("token_weights")) if LOSSES[name].token_weights else None
    tokens = LossTokens(
        logprobs,
        logprobs.detach() - torch.tensor(flat("deltas")),
        torch.ones(len(logprobs), dtype=torch.bool),
        torch.repeat_interleave(torch.arange(len(rows)), torch.tensor([len(row.deltas) for row in rows])),
        torch.tensor([row.advantage for row in rows]),
        rollout_logprobs=logprobs.detach() + torch.tensor(off_policy),
        sequence_weights=torch.tensor([row.weight for row in rows]),
        token_weights=token_weights,
        kept=torch.tensor(flat("kept")),
        max_kl=0.5,
        max_response_tokens=MAX_RESPONSE,
        columns={"router_shift": torch.tensor(flat("shifts"))},
        **others,
    )
    output = LOSSES[name].function(tokens, **default_clips(name, LOSSES[name], is_moe=False)[0] | options)
    output.loss.backward()
    assert logprobs.grad is not None
    return output, logprobs.grad


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@quick
@given(rows=sequences())
def test_loss_and_gradient_are_the_definition_rounded_to_fp32(case: str, rows: list[Sequence]) -> None:
    output, gradient = run(case, rows)
    losses, gradients = zip(*[definition(case, row) for row in rows], strict=True)
    expected = torch.tensor([g for row in gradients for g in row], dtype=torch.float64).float()
    assert_close(gradient, expected, rtol=1e-4, atol=1e-30)
    rounded = torch.tensor(losses, dtype=torch.float64).float()
    if {math.inf, -math.inf} <= set(rounded.tolist()):
        return  # without a clip, losses of both signs are infinite, and their sum has no value
    assert_close(output.loss.detach(), rounded.sum(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("delta", [88.0, 94.0, 95.0, 100.0, 2000.0])
def test_the_clip_ends_the_gradient_and_no_advantage_is_nothing(loss: str, delta: float) -> None:
    def of(advantage: float) -> tuple[float, float]:
        row = Sequence(advantage, 1.0, [-1.0], [delta], [True], [1.0], [1.0], False)
        output, gradient = run(loss, [row])
        return output.loss.item(), gradient.item()

    assert of(0.0) == (0.0, 0.0)
    found, slope = of(1.0)
    clips = default_clips(loss, LOSSES[loss], is_moe=False)[0]
    bound = math.exp(clips["clip_high"]) if loss in ("gmpo", "rspo") else 1 + clips["clip_high"]
    divisor = MAX_RESPONSE if loss == "dr_grpo" else 1
    # cispo multiplies the stopped ratio by the log probability, which is -1, and keeps the gradient
    sign = 1 if loss == "cispo" else -1
    assert found == pytest.approx(sign * bound / divisor, rel=1e-6)
    assert slope == (pytest.approx(-bound) if loss == "cispo" else 0.0)


@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES)
@quick
@given(
    deltas=st.lists(
        st.tuples(st.sampled_from(DELTAS), st.sampled_from(DELTAS)), min_size=1, max_size=MAX_RESPONSE
    )
)
def test_k3_is_exact_up_to_its_bound_and_flat_beyond(loss: str, deltas: list[tuple[float, float]]) -> None:
    """The penalty uses log pi_ref - log pi, and ``kl_old`` uses log pi - log pi_old."""
    n = len(deltas)
    row = Sequence(0.0, 1.0, [-1.0] * n, [old for old, _ in deltas], [True] * n, [1.0] * n, [1.0] * n, False)
    references = torch.tensor([-1.0 + ref for _, ref in deltas])
    output, gradient = run(loss, [row], ref_logprobs=references, kl_coef=0.5)

    def k3(x: float) -> float:
        return math.exp(min(x, BOUND)) - 1 - min(x, BOUND)

    divisor = {"dr_grpo": MAX_RESPONSE, "dapo": 1, "cispo": 1}.get(loss, n)
    penalty = 0.5 * sum(k3(ref) for _, ref in deltas) / divisor
    assert output.loss.item() == pytest.approx(penalty, rel=1e-5)
    slopes = [-0.5 * (math.exp(ref) - 1) / divisor if ref < BOUND else 0.0 for _, ref in deltas]
    assert gradient.tolist() == pytest.approx(slopes, rel=1e-5)
    figures = {name: value_of(metric) for name, metric in output.metrics.items()}
    assert figures["policy/kl_old"] == pytest.approx(sum(k3(old) for old, _ in deltas) / n, rel=1e-5)
    assert figures["policy/kl_ref"] == pytest.approx(sum(k3(ref) for _, ref in deltas) / n, rel=1e-5)
    beyond = sum(old > BOUND or ref > BOUND for old, ref in deltas)
    assert figures["policy/kl_bounded"] == pytest.approx(beyond / n)


def test_an_engine_that_disagrees_without_limit_gives_finite_figures() -> None:
    batch = TrainBatch(
        tokens=torch.arange(4),
        lengths=torch.tensor([4]),
        response_mask=torch.tensor([False, True, True, True]),
        advantages=torch.ones(1),
        rollout_logprobs=torch.tensor([0.0, -2000.0, -1.0, -1.0]),
        old_logprobs=torch.tensor([0.0, -1.0, -1.0, -1.0]),
    )
    figures = {name: value_of(metric) for name, metric in rollout_mismatch(batch).items()}
    assert figures["rollout/k3_kl"] == pytest.approx((math.exp(BOUND) - 1 - BOUND) / 3)
    assert figures["rollout/k3_kl_bounded"] == pytest.approx(1 / 3)
    assert figures["rollout/effective_sample_size"] == pytest.approx(1 / 3)  # one weight outweighs the others
    for level in ("token", "sequence", "geometric"):
        weights, metrics = importance_weights(batch, level, cap=2.0)
        assert weights.isfinite().all()
        assert all(math.isfinite(value_of(metric)) for metric in metrics.values())
