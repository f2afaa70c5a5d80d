"""FP8 against bf16 on one NVIDIA GPU, forward and backward.

These tests have not run yet: they were written on a machine without a GPU. The bounds follow from 3 bits of
mantissa for tiny random models; they are not measured.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_gmpo.batch.columns import TrainBatch
from megatron_gmpo.policy.policy import Policy

from .conftest import Open, make_batch
from .test_policy import FAMILIES, difference, steps

pytestmark = pytest.mark.gpu

RECIPES = ["delayed", "tensorwise", "blockwise", "mxfp8"]
LOGPROBS = 0.1
"""Maximum mean difference of log probabilities over response tokens, in nats."""
GRADIENTS = {"qwen3": 0.95, "qwen3_moe": 0.85}
"""Minimum cosine between the gradients. In a MoE, FP8 routes some tokens to other experts."""


def forward_and_backward(policy: Policy, batch: TrainBatch) -> tuple[Tensor, Tensor]:
    """Return log probabilities and all gradients in one row, after steps that fill the amax history.

    Delayed scaling needs this history. The learning rate of the tests is too small to change the weights.
    """
    for count in (2, 1):
        batch.old_logprobs = policy.logprobs(batch)
        steps(policy, batch, count)
    parameters: list[Any] = [parameter for chunk in policy.chunks for parameter in chunk.parameters()]
    return policy.logprobs(batch), torch.cat(
        [parameter.main_grad.flatten().float() for parameter in parameters]
    )


STILL = {"lr": 1e-12}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_recipe_is_close_to_bf16(policy_of: Open, batch: TrainBatch, family: str, recipe: str) -> None:
    with policy_of(family, fp8={"recipe": recipe}, optimizer=STILL) as policy:
        logprobs, gradients = forward_and_backward(policy, batch)
    with policy_of(family, optimizer=STILL) as policy:
        expected, expected_gradients = forward_and_backward(policy, batch)
    assert 0 < difference(logprobs, expected, batch) < LOGPROBS  # a difference of 0 would mean bf16
    assert torch.cosine_similarity(gradients, expected_gradients, dim=0) > GRADIENTS[family]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("lengths", [[3], [130, 17]])
def test_experts_with_few_tokens_or_none(policy_of: Open, recipe: str, lengths: list[int]) -> None:
    """Padding by the router and padding by a copy agree with each other and with bf16.

    If an expert has only one scale, the scale also depends on the tokens with which the router pads.
    """
    one_scale = recipe in ("delayed", "tensorwise")
    batch = make_batch(lengths)
    found = []
    for padding in (True, False):
        fp8 = {"recipe": recipe, "moe_router_padding_for_quantization": padding}
        with policy_of("qwen3_moe", fp8=fp8, optimizer=STILL) as policy:
            found.append(forward_and_backward(policy, batch))
    (logprobs, gradients), (copied, copied_gradients) = found
    assert difference(logprobs, copied, batch) < (LOGPROBS if one_scale else 0.02)
    assert torch.cosine_similarity(gradients, copied_gradients, dim=0) > (
        GRADIENTS["qwen3_moe"] if one_scale else 0.99
    )
    with policy_of("qwen3_moe", optimizer=STILL) as policy:
        # There are few tokens, so one token that changes its expert counts.
        assert difference(logprobs, policy.logprobs(batch), batch) < 3 * LOGPROBS


@pytest.mark.parametrize("recipe", RECIPES)
def test_layers_that_stay_in_bf16(policy_of: Open, batch: TrainBatch, recipe: str) -> None:
    if recipe == "delayed":
        pytest.skip("delayed scaling has no layers in bf16")
    with policy_of("qwen3") as policy:
        expected = policy.logprobs(batch)
    off = []
    for count in (4, 2, 0):  # number of bf16 layers among the four, counted from the start
        with policy_of("qwen3", fp8={"recipe": recipe, "num_layers_at_start_in_bf16": count}) as policy:
            off.append(difference(policy.logprobs(batch), expected, batch))
    assert off[0] < off[2] / 2
    assert off[1] < off[2]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_learns_in_fp8(policy_of: Open, batch: TrainBatch, family: str, recipe: str) -> None:
    with policy_of(family, fp8={"recipe": recipe}, optimizer={"lr": 1e-4}) as policy:
        batch.old_logprobs = policy.logprobs(batch)
        losses = steps(policy, batch, 5)
        assert losses[-1] < losses[0]


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise"])
def test_weights_in_fp8(policy_of: Open, batch: TrainBatch, recipe: str) -> None:
    """FP8 weights start from the folder's weights, train, and are exported with the values that GEMMs use."""
    with policy_of("qwen3", optimizer={"lr": 1e-3}) as policy:
        start = policy.logprobs(batch)
        batch.old_logprobs = start
        steps(policy, batch, 3)
        learned = policy.logprobs(batch)
        weights = {name: tensor.float() for name, tensor in policy.export_hf()}
    with policy_of("qwen3", fp8={"recipe": recipe, "param": True}, optimizer={"lr": 1e-3}) as policy:
        assert difference(policy.logprobs(batch), start, batch) < LOGPROBS
        steps(policy, batch, 3)
        assert difference(policy.logprobs(batch), learned, batch) < 2 * LOGPROBS
        for name, tensor in policy.export_hf():
            off = (tensor.float() - weights[name]).norm() / weights[name].norm()
            assert off < 0.05, name
