"""FP8 against bf16 on one NVIDIA GPU, forward and backward. Not yet run: written on a machine without a GPU.

The bounds are what 3 bits of mantissa suggest for tiny random models, not what was measured.
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
"""Most that log probabilities may differ, on average over response tokens, in nats."""
GRADIENTS = {"qwen3": 0.95, "qwen3_moe": 0.85}
"""Least cosine between the gradients; in a MoE, FP8 sends some tokens to other experts."""


def forward_and_backward(policy: Policy, batch: TrainBatch) -> tuple[Tensor, Tensor]:
    """Log probabilities and all gradients in one row, once delayed scaling has a history; the learning rate moves nothing."""
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
    assert 0 < difference(logprobs, expected, batch) < LOGPROBS  # it did run in FP8
    assert torch.cosine_similarity(gradients, expected_gradients, dim=0) > GRADIENTS[family]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("lengths", [[3], [130, 17]])
def test_experts_with_few_tokens_or_none(policy_of: Open, recipe: str, lengths: list[int]) -> None:
    """Padding by the router and by a copy give the same, and what bf16 gives.

    The tokens that the router pads with are among the values that an expert's one scale is chosen for, where it has only one.
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
        assert (
            difference(logprobs, policy.logprobs(batch), batch) < 3 * LOGPROBS
        )  # few tokens: one that changes its expert counts


@pytest.mark.parametrize("recipe", RECIPES)
def test_layers_that_stay_in_bf16(policy_of: Open, batch: TrainBatch, recipe: str) -> None:
    if recipe == "delayed":
        pytest.skip("delayed scaling has no layers in bf16")
    with policy_of("qwen3") as policy:
        expected = policy.logprobs(batch)
    off = []
    for count in (4, 2, 0):  # of the four at the start
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
    """They start from the weights of the folder, take steps, and are exported with the values that the products see."""
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
