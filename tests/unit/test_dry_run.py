"""The dry run of a rank equals sizes computed by hand from model and layout.

tests/distributed/test_dry_run.py compares it with real runs.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from megatron_gmpo.config import Config
from megatron_gmpo.models.description import describe_model
from megatron_gmpo.planning.dry_run import dry_run
from megatron_gmpo.planning.model_size import Model
from megatron_gmpo.planning.rank_plan import RankPlan, Traffic
from megatron_gmpo.planning.step_estimate import Batch, StepTraffic

TP, PP, CP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"
EP = "expert_model_parallel_size"
HIDDEN, LAYERS, HEADS, GROUPS, HEAD, FFN, EXPERTS, TOPK, VOCAB = (
    64,
    4,
    4,
    2,
    # Sizes of the tiny models, in bf16.
    32,
    64,
    8,
    2,
    16,
)
LENGTHS = [256, 768]
TOKENS = sum(LENGTHS)
Plan = Callable[..., RankPlan]


@pytest.fixture
def plan(tiny_model: Callable[..., Path]) -> Plan:
    def make(
        family: str = "qwen3",
        world_size: int = 1,
        stage: int = 0,
        num_microbatches: int = 8,
        image_tokens: int = 0,
        **sections: Any,
    ) -> RankPlan:
        model = {"path": str(tiny_model(family)), "dtype": "bf16"} | sections.pop("model", {})
        cfg = Config.model_validate({"model": model, **sections})
        description = describe_model(cfg, world_size, torch.device("cpu"))
        return dry_run(
            cfg,
            description,
            world_size=world_size,
            stage=stage,
            lengths=LENGTHS,
            num_microbatches=num_microbatches,
            image_tokens=image_tokens,
        )

    return make


def sent(traffic: tuple[Traffic, ...], operation: str, group: str) -> int:
    return sum(one.sent for one in traffic if (one.operation, one.group) == (operation, group))


def test_flops_of_a_dense_model(plan: Plan) -> None:
    qkv, out, mlp = HIDDEN * (HEADS + 2 * GROUPS) * HEAD, HEADS * HEAD * HIDDEN, 3 * HIDDEN * FFN
    head = 2 * TOKENS * VOCAB * HIDDEN  # without the padding of the vocabulary
    products = 2 * TOKENS * LAYERS * (qkv + out + mlp) + head
    # Each of the two products has half of its elements masked.
    attention = LAYERS * sum(2 * length**2 * HEADS * HEAD for length in LENGTHS)
    whole = plan()
    assert whole.forward.flops == products + attention
    # the backward pass computes the logits again
    assert whole.training.flops == 3 * products + head + attention * 7 // 2
    assert whole.forward.traffic == whole.training.traffic == ()
    recomputed = plan(
        megatron={"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    )
    assert recomputed.training.flops == whole.training.flops + whole.forward.flops - head
    assert recomputed.activations < whole.activations / 5


@pytest.mark.slow
def test_experts_meet_their_share_of_tokens(plan: Plan) -> None:
    layer = TOPK * 3 * HIDDEN * FFN + EXPERTS * HIDDEN  # the experts of a token and the router
    dense = 3 * HIDDEN * FFN
    assert plan("qwen3_moe").forward.flops == plan("qwen3").forward.flops + 2 * TOKENS * LAYERS * (
        layer - dense
    )


@pytest.mark.slow
def test_traffic_of_expert_and_context_parallelism(plan: Plan) -> None:
    tokens = 2 * TOKENS * TOPK * HIDDEN // 2  # bytes in bf16; one half stays on the rank
    weights = 4 * TOKENS * TOPK // 2  # each token is sent with its fp32 weight, which is not sent back
    experts = plan("qwen3_moe", 2, parallel={EP: 2})
    assert sent(experts.forward.traffic, "all_to_all", "ep") == LAYERS * (2 * tokens + weights)
    context = plan("qwen3", 2, parallel={CP: 2})
    keys_and_values = 2 * 2 * TOKENS * GROUPS * HEAD // 2
    assert sent(context.forward.traffic, "all_gather", "cp") == LAYERS * keys_and_values
    assert sent(context.training.traffic, "reduce_scatter", "cp") == LAYERS * keys_and_values


def test_traffic_of_tensor_parallelism(plan: Plan) -> None:
    hidden = 2 * TOKENS * HIDDEN // 2
    tensor = plan("qwen3", 2, parallel={TP: 2}).forward.traffic
    assert sent(tensor, "all_gather", "tp") == (2 * LAYERS + 1) * hidden  # before attention, MLP and head
    # The reduce-scatters follow embedding, attention and MLP.
    assert sent(tensor, "reduce_scatter", "tp") == (2 * LAYERS + 1) * hidden
    # Each token reduces its largest logit and three sums, in fp32.
    assert sent(tensor, "all_reduce", "tp") == 2 * 4 * 4 * TOKENS // 2


@pytest.mark.slow
def test_the_optimizer_is_shared_by_the_replicas(plan: Plan) -> None:
    alone = plan("qwen3", 1)
    assert alone.weights == pytest.approx(2 * alone.parameters, rel=0.01)
    assert alone.gradients == pytest.approx(4 * alone.parameters, rel=0.01)
    assert alone.optimizer == pytest.approx(12 * alone.parameters, rel=0.01)
    assert plan("qwen3", 8).optimizer == pytest.approx(alone.optimizer / 8, rel=0.02)
    assert plan("qwen3", 8, optimizer={"use_distributed_optimizer": False}).optimizer == 12 * alone.parameters
    assert plan("qwen3", 1, algorithm={"kl_coef": 0.1}).reference == 2 * alone.parameters
    sync = plan("qwen3", 8).gradient_sync
    assert sent(sync, "reduce_scatter", "dp_cp") == 2 * sent(sync, "all_gather", "dp_cp")


@pytest.mark.slow
def test_a_layout_of_many_ranks(plan: Plan) -> None:
    """The parameters of all stages add up to the model's, for a layout larger than any available machine."""
    parallel = {TP: 2, PP: 4, CP: 2, EP: 4}
    stages = [plan("qwen3_moe", 256, stage, parallel=parallel) for stage in range(4)]
    whole = plan("qwen3_moe")
    assert sum(stage.stage_parameters for stage in stages) == whole.parameters == whole.stage_parameters
    assert whole.stage_expert_parameters == LAYERS * EXPERTS * 3 * HIDDEN * FFN
    assert [stage.rank for stage in stages] == [0, 64, 128, 192]
    assert [stage.in_flight for stage in stages] == [4, 3, 2, 1]
    assert plan("qwen3_moe", 256, num_microbatches=2, parallel=parallel).in_flight == 2
    assert not dist.is_initialized()


@pytest.mark.slow
def test_an_optimizer_of_fewer_bytes(plan: Plan) -> None:
    """A parameter takes 4 bytes of main weight and two moments of 4 bytes each.

    Moments in bf16 do not change the size of the main weight.
    """
    whole = plan().optimizer
    assert plan(optimizer={"moments_dtype": "bf16"}).optimizer * 12 == whole * 8
    assert plan(optimizer={"offload_fraction": 0.75}).optimizer * 4 == whole


def test_a_reference_in_host_memory(plan: Plan) -> None:
    assert plan(algorithm={"kl_coef": 0.1}).reference > 0
    assert plan(algorithm={"kl_coef": 0.1}, model={"reference_offload": True}).reference == 0


@pytest.mark.slow
def test_fp8_is_planned_without_its_kernels(plan: Plan) -> None:
    assert plan("qwen3_moe", fp8={"recipe": "mxfp8"}).training == plan("qwen3_moe").training


def flops_of_tower(family: str) -> int:
    """Return the FLOPs of the tiny towers for an image of 4 x 6 tokens, each of 2 x 2 patches.

    The towers have 3 layers of width 32, with MLPs of width 48. Qwen3-VL's have two more mergers. Attention
    is over the image, in Qwen2.5-VL's first and last layer over windows of 4 x 4 patches.
    """
    width, mlp, tokens, patches = 32, 48, 24, 96
    merger = (4 * width) ** 2 + 4 * width * HIDDEN
    if family == "qwen2_5_vl":
        pixels, matrices, mergers, pairs = 3 * 2 * 14**2, 3, 1, patches**2 + 2 * 6 * 16**2
    else:
        pixels, matrices, mergers, pairs = 3 * 2 * 16**2, 2, 3, 3 * patches**2
    block = 4 * width**2 + matrices * width * mlp
    products = patches * (pixels * width + 3 * block) + tokens * mergers * merger
    return 2 * products + 4 * width * pairs


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"])
def test_a_vision_tower(plan: Plan, tiny_model: Callable[..., Path], family: str) -> None:
    text, frozen = plan(family), plan(family, image_tokens=24)
    assert frozen.tower == len(LENGTHS) * flops_of_tower(family)
    assert frozen.forward.flops - text.forward.flops == frozen.tower
    assert frozen.training.flops - text.training.flops == frozen.tower  # it has no backward pass
    assert frozen.activations == pytest.approx(text.activations, rel=0.01)
    stored = load_file(tiny_model(family) / "model.safetensors")
    tower = sum(tensor.numel() for name, tensor in stored.items() if "visual." in name)
    padding = 2 * (384 - 263) * HIDDEN
    assert frozen.stage_parameters - padding == sum(tensor.numel() for tensor in stored.values())
    assert frozen.gradients == pytest.approx(4 * (frozen.parameters - tower), rel=0.01)
    trained = plan(family, image_tokens=24, model={"freeze_vision": False})
    assert trained.gradients == pytest.approx(4 * trained.parameters, rel=0.01)
    # two products backward for each one forward, except for the gradient of the pixels
    more = trained.training.flops - frozen.training.flops
    assert frozen.tower < more < 2.5 * frozen.tower
    assert trained.activations > 1.05 * frozen.activations
    # the first stage alone holds the tower, and each context-parallel rank encodes one of the two images
    first, last = (plan(family, 4, stage, image_tokens=24, parallel={PP: 2, CP: 2}) for stage in (0, 1))
    assert (first.tower, last.tower) == (frozen.tower // 2, 0)
    assert first.stage_parameters + last.stage_parameters == frozen.stage_parameters


def test_a_weight_sync_without_the_frozen_tower() -> None:
    def synced(**sections: Any) -> int:
        model = Model(*[1] * 7, num_experts=0, topk=0, served_weights=100, tower_parameters=10)
        cfg = Config.model_validate({"rollout": {"engine": "sglang"}} | sections)
        return StepTraffic(cfg, model, [], Batch([8], [4], [1]), 1, [8]).synced

    assert synced() == 80
    for sections in (
        {"model": {"freeze_vision": False}},
        {"rollout": {"engine": "sglang", "placement": "colocated"}},
        {"rollout": {"engine": "sglang", "server_urls": ["http://localhost:1"]}},
        {"rollout": {"engine": "embedded"}},
        {"sglang": {"args": {"load_format": "dummy"}}},
    ):
        assert synced(**sections) == 100


@pytest.mark.parametrize(
    ("old_logprobs", "kl_coef", "minibatches", "passes"),
    [
        ("policy", 0.0, 4, 0.75),  # the first of four minibatches needs none
        ("rollout", 0.0, 4, 0.0),
        ("policy", 0.0, 1, 0.0),
        ("rollout", 0.1, 4, 1.0),  # of the reference policy
    ],
)
def test_forward_passes_before_the_updates(
    old_logprobs: str, kl_coef: float, minibatches: int, passes: float
) -> None:
    cfg = Config.model_validate(
        {
            "algorithm": {"old_logprobs": old_logprobs, "kl_coef": kl_coef},
            "train": {"minibatches_per_step": minibatches},
        }
    )
    model = Model(*[1] * 7, num_experts=0, topk=0, served_weights=1)
    assert StepTraffic(cfg, model, [], Batch([8], [4], [1]), 1, [8]).passes == passes
