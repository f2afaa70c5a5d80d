"""An SGLang server on the policy's GPU: weight sync by CUDA IPC and released memory.

These tests have not run on a GPU yet. They need SGLang for CUDA in .venv-sglang (docs/install_gpu.md).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_gmpo.batch.columns import TrainBatch
from megatron_gmpo.config import WeightSyncConfig
from megatron_gmpo.policy.policy import Policy
from megatron_gmpo.rollout.sglang.memory import release_memory, resume_memory
from megatron_gmpo.rollout.sglang.servers import Server
from megatron_gmpo.rollout.sglang.sync import make_weight_sync
from tests.support.sglang_servers import generate, local_servers, needs_sglang

from .conftest import Open
from .test_policy import FAMILIES, steps

pytestmark = [pytest.mark.gpu, needs_sglang]

PROMPT = [5, 6, 7, 8]
TIMEOUT_S = 60.0


def disagreement(policy: Policy, server: Server) -> float:
    """Return the mean difference in nats between the server's and the policy's logprobs of a response."""
    answer = generate(server, PROMPT, max_new_tokens=32).json()
    tokens = torch.tensor(PROMPT + answer["output_ids"])
    response = torch.arange(len(tokens)) >= len(PROMPT)
    batch = TrainBatch(tokens, torch.tensor([len(tokens)]), response, torch.ones(1), torch.zeros(len(tokens)))
    theirs = torch.tensor([logprob for logprob, *_ in answer["meta_info"]["output_token_logprobs"]])
    ours: Tensor = policy.logprobs(batch)[response]
    return (ours - theirs).abs().mean().item()


@pytest.mark.parametrize("family", FAMILIES)
def test_cuda_ipc_and_memory_release(policy_of: Open, batch: TrainBatch, family: str, tmp_path: Path) -> None:
    with policy_of(family, optimizer={"lr": 1e-3}) as policy:
        args = {"enable_memory_saver": True, "mem_fraction_static": 0.3}
        folder = policy.cfg.model.path
        with local_servers(folder, tmp_path, dtype="bf16", device=policy.device, args=args) as servers:
            servers.start()
            servers.wait_ready()
            cfg = WeightSyncConfig(route="tensor", timeout_s=TIMEOUT_S)
            sync = make_weight_sync(cfg, "colocated", policy.device, tmp_path)
            batch.old_logprobs = policy.logprobs(batch)
            steps(policy, batch, 5)
            assert disagreement(policy, servers.servers[0]) > 0.1
            assert sync.update(servers.servers, policy.export_hf(), "run-1").failed == ()
            assert disagreement(policy, servers.servers[0]) < 0.05

            free, total = torch.cuda.mem_get_info()
            release_memory(servers.servers, TIMEOUT_S)
            released, _ = torch.cuda.mem_get_info()
            assert released - free > 0.15 * total
            steps(policy, batch, 1)
            released_before = resume_memory(servers.servers, ("weights",), TIMEOUT_S)
            assert sync.update(servers.servers, policy.export_hf(), "run-2").failed == ()
            resume_memory(released_before, ("kv_cache",), TIMEOUT_S)
            assert disagreement(policy, servers.servers[0]) < 0.05
            sync.close()
