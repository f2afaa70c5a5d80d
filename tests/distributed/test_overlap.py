"""Overlapped communication and weights in host memory do not change the results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch.testing import assert_close

from ..support import cases
from ..support.ranks import RankPool
from .test_layouts import CP, EP, PP, STEPS, TP, VPP, Reference, check, config

pytestmark = pytest.mark.distributed

OVERLAP = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
LAYOUTS: dict[str, tuple[int, dict[str, int]]] = {
    "dp2": (2, {}),
    "cp2 ep2": (2, {CP: 2, EP: 2}),
    "dp2 pp2 vpp2": (4, {PP: 2, VPP: 2}),
    "dp2 tp2 ep2": (4, {TP: 2, EP: 2}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_overlap_of_gradients_and_weights(ranks: RankPool, expected: Reference, layout: str) -> None:
    known = expected("qwen3_moe")
    world_size, parallel = LAYOUTS[layout]
    cfg = config(known["path"], parallel, max_tokens=40, optimizer=OVERLAP)  # several microbatches
    check(ranks.run(world_size, cases.train, cfg, known["batch"], STEPS), known)


def test_overlap_of_gradients_alone(ranks: RankPool, expected: Reference) -> None:
    known = expected("qwen3")
    cfg = config(known["path"], {}, max_tokens=40, optimizer={"overlap_grad_reduce": True})
    check(ranks.run(2, cases.train, cfg, known["batch"], STEPS), known)


def test_weights_are_whole_wherever_they_are_read(
    ranks: RankPool, expected: Reference, tmp_path: Path
) -> None:
    """Log probabilities, exports and checkpoints use whole weights after an update and after a load."""
    known = expected("qwen3_moe")
    plain = config(known["path"], {}, max_tokens=40, optimizer={"use_distributed_optimizer": True})
    overlapped = config(known["path"], {}, max_tokens=40, optimizer=OVERLAP)
    for result, other in zip(
        ranks.run(2, cases.read_weights, overlapped, known["batch"], tmp_path / "overlapped"),
        ranks.run(2, cases.read_weights, plain, known["batch"], tmp_path / "plain"),
        strict=True,
    ):
        for name in ("logprobs", "exported", "loaded", "logprobs_after_load"):
            assert_close(result[name], other[name], atol=1e-6, rtol=1e-5)
        assert result["updates"] == other["updates"] == 3  # loading also restored the number of updates


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_are_freed_while_colocated_servers_generate(
    ranks: RankPool, expected: Reference, layout: str
) -> None:
    """No byte of the buffers is allocated from an export to the next step; results equal to the last bit."""
    known = expected("qwen3_moe")
    world_size, parallel = LAYOUTS[layout]
    results: dict[str, list[Any]] = {}
    for placement in ("disaggregated", "colocated"):
        rollout = {"engine": "sglang", "placement": placement}
        cfg = config(known["path"], parallel, max_tokens=40, optimizer=OVERLAP, rollout=rollout)
        results[placement] = ranks.run(world_size, cases.train_beside_servers, cfg, known["batch"], 3)
    for apart, together in zip(*results.values(), strict=True):
        history, weights, sizes = together
        assert history == apart[0]
        assert_close(weights, apart[1], atol=0, rtol=0)
        size = apart[2][0]
        assert size > 0
        assert apart[2] == [size] * 6
        assert sizes == [0, size] * 3


def test_a_reference_in_host_memory(ranks: RankPool, expected: Reference) -> None:
    path = expected.model("qwen3", seed=1)
    known = expected("qwen3", ref_path=path, kl_coef=0.2)
    model = {"reference_path": str(path), "reference_offload": True}
    cfg = config(known["path"], {TP: 2}, max_tokens=64, algorithm={"kl_coef": 0.2}, model=model)
    check(ranks.run(2, cases.train, cfg, known["batch"], STEPS), known)
