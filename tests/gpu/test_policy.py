"""The policy on one NVIDIA GPU against transformers on the same GPU. Written on a machine without one: not yet run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from megatron_gmpo.algorithms.objective import make_objective
from megatron_gmpo.config import Config
from megatron_gmpo.metrics.logger import value_of
from megatron_gmpo.models.config import describe_model
from megatron_gmpo.platform import choose_device, start_process_group
from megatron_gmpo.policy.parallel import start_model_parallel, stop_model_parallel
from megatron_gmpo.policy.policy import Policy
from megatron_gmpo.types import TrainBatch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

LENGTHS, PROMPT = [64, 33, 80], 5


@pytest.fixture(scope="module", params=["qwen3", "qwen3_moe"])
def policy(request: pytest.FixtureRequest, tiny_model: Callable[..., Path]) -> Iterator[Policy]:
    device = choose_device("cuda")
    cfg = Config.model_validate({"model": {"path": str(tiny_model(request.param)), "dtype": "bf16"}, "optimizer": {"lr": 1e-4}})
    start_process_group(device, 60)
    groups = start_model_parallel(cfg.parallel, cfg.seed, cfg.distributed_timeout_s)
    yield Policy(cfg, describe_model(cfg, 1, device), groups, device)
    stop_model_parallel()
    dist.destroy_process_group()


@pytest.fixture
def batch() -> TrainBatch:
    tokens = torch.randint(3, 16, (sum(LENGTHS),), generator=torch.Generator().manual_seed(0))
    mask = torch.cat([torch.arange(length) >= PROMPT for length in LENGTHS])
    return TrainBatch(tokens, torch.tensor(LENGTHS), mask, torch.tensor([1.0, -1.0, 0.5]), torch.zeros(len(tokens)))


def test_logprobs_are_those_of_transformers(policy: Policy, batch: TrainBatch) -> None:
    model = AutoModelForCausalLM.from_pretrained(policy.cfg.model.path, dtype=torch.float32).cuda()
    expected = torch.zeros(len(batch.tokens))
    with torch.no_grad():
        for start, length in zip(batch.starts.tolist(), LENGTHS, strict=True):
            ids = batch.tokens[start : start + length].cuda()
            logprobs = model(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
            expected[start + 1 : start + length] = logprobs.cpu()
    difference = (policy.logprobs(batch) - expected)[batch.response_mask].abs()
    assert difference.mean() < 0.05  # bf16 against fp32


def test_a_step_learns(policy: Policy, batch: TrainBatch) -> None:
    batch.old_logprobs = policy.logprobs(batch)
    objective = make_objective(policy.cfg.algorithm, is_moe=policy.description.is_moe, max_new_tokens=64)
    losses = [value_of(policy.train_step(batch, objective)["loss"]) for _ in range(5)]
    assert losses[-1] < losses[0]
