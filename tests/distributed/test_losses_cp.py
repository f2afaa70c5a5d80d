"""Under context parallelism, gloo ranks that share the tokens of every sequence equal one process."""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_gmpo.losses import LossTokens
from megatron_gmpo.losses.registry import LOSSES, default_clips

RANKS = 4
S = 5
CASES: list[tuple[str, dict]] = [
    *((name, {}) for name in LOSSES),
    ("gmpo", {"clip_low": 0.1, "clip_high": 0.6, "dual_clip": 0.5}),
    ("gmpo", {"clip_mode": "sequence", "clip_low": 0.05, "clip_high": 0.05}),
    ("gmpo", {"clip_mode": "none"}),
    ("gmpo", {"length_normalize": False}),
    ("rspo", {"min_router_shift": 0.5, "masked": True}),
    ("gmpo", {"masked": True}),
    ("dapo", {"masked": True}),
]
HOLDERS = {
    "every rank has tokens": lambda owner, size: owner >= 0,
    "one rank has none": lambda owner, size: owner > 0,
    "one rank has all": lambda owner, size: owner == size - 1,
}


class CountCollectives(TorchDispatchMode):
    """Record the name of every collective of forward and backward.

    CommDebugMode does the same, but importing it takes seconds.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional"):
            self.seen.append(func.__name__)
        return func(*args, **(kwargs or {}))


def tensors(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return 40 tokens of 5 sequences, equal on every rank; the last sequence is fully masked."""
    g = torch.Generator().manual_seed(0)
    ids = torch.arange(40) % S
    random = {
        name: torch.randn(40, generator=g, dtype=torch.float64) for name in ("new", "old", "ref", "entropy")
    }
    return {
        "logprobs": (random["new"] * 0.5 - 2).to(dtype),
        "old_logprobs": (random["new"] * 0.5 - 2 + random["old"] * 0.5).to(dtype),
        "mask": (ids != S - 1) & (torch.rand(40, generator=g) < 0.8),
        "sequence_ids": ids,
        "advantages": torch.tensor([1.0, -1.5, 0.0, 0.7, 2.0], dtype=dtype),
        "ref_logprobs": (random["ref"] - 2).to(dtype),
        "entropy": random["entropy"].abs().to(dtype),
        "router_shift": torch.exp(-0.2 * random["entropy"].abs()).to(dtype),
        "kept": torch.rand(40, generator=g) < 0.7,
        "weights": torch.tensor([1.0, 0.3, 2.0, 0.0, 1.0], dtype=dtype),
    }


def run(name: str, options: dict, batch: dict, rows: torch.Tensor, group: dist.ProcessGroup | None):
    """Return the output and the gradients of logprobs and entropy on the given slots.

    The option ``masked`` masks tokens and off-policy sequences.
    """
    options, masks = dict(options), {}
    if options.pop("masked", False):
        masks = {"kept": batch["kept"][rows], "rollout_logprobs": batch["ref_logprobs"][rows], "max_kl": 0.1}
    logprobs, entropy = (batch[key][rows].clone().requires_grad_() for key in ("logprobs", "entropy"))
    tokens = LossTokens(
        logprobs,
        *(batch[key][rows] for key in ("old_logprobs", "mask", "sequence_ids")),
        batch["advantages"],
        group,
        sequence_weights=batch["weights"],
        ref_logprobs=batch["ref_logprobs"][rows],
        kl_coef=0.1,
        entropy=entropy,
        entropy_coef=0.2,
        max_response_tokens=16,
        columns={"router_shift": batch["router_shift"][rows]},
        **masks,
    )
    clips, _ = default_clips(name, LOSSES[name], is_moe=False)
    output = LOSSES[name].function(tokens, **clips | options)
    output.loss.backward()
    return output, logprobs.grad, entropy.grad


def check_case(name: str, options: dict, holders: str, dtype: torch.dtype, group: dist.ProcessGroup) -> None:
    tolerance = {"rtol": 1e-10, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-6}
    batch = tensors(dtype)
    owner = torch.arange(40) // 2 % group.size()
    batch["mask"] &= HOLDERS[holders](owner, group.size())
    whole, gradient, entropy_gradient = run(name, options, batch, torch.arange(40), None)
    assert gradient.any()
    rows = (owner == group.rank()).nonzero()[:, 0]
    with CountCollectives() as collectives:
        output, local_gradient, local_entropy_gradient = run(name, options, batch, rows, group)
    assert [name.split(".")[0] for name in collectives.seen] == ["allreduce_"]
    assert_close(output.loss, whole.loss, **tolerance)
    assert_close(local_gradient, gradient[rows], **tolerance)
    assert_close(local_entropy_gradient, entropy_gradient[rows], **tolerance)
    for key, metric in whole.metrics.items():
        local = output.metrics[key]
        if metric.op == "histogram":
            counts = local.total.clone()
            dist.all_reduce(counts, group=group)
            assert_close(counts, metric.total, rtol=0, atol=0)
            assert counts.sum() == batch["mask"].sum()
        elif metric.op == "mean":
            assert_close(torch.as_tensor(local.total), torch.as_tensor(metric.total), **tolerance)
            assert_close(torch.as_tensor(local.count), torch.as_tensor(metric.count), **tolerance)
        else:
            extreme = torch.as_tensor(local.total).clone()
            dist.all_reduce(
                extreme, dist.ReduceOp.MAX if metric.op == "max" else dist.ReduceOp.MIN, group=group
            )
            assert_close(extreme, torch.as_tensor(metric.total), **tolerance)


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/init",
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(seconds=60),
    )
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    groups = {2: pairs[rank // 2], RANKS: dist.group.WORLD}
    done = 0
    for size, group in groups.items():
        for name, options in CASES:
            for holders in HOLDERS:
                for dtype in (torch.float64, torch.float32) if size == RANKS else (torch.float64,):
                    try:
                        check_case(name, options, holders, dtype, group)
                    except AssertionError as error:
                        raise AssertionError(
                            f"{name} {options}, cp {size}, {holders}, {dtype}: {error}"
                        ) from error
                    done += 1
    assert done == 3 * len(CASES) * len(HOLDERS)
    (Path(folder) / f"done{rank}").touch()
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.distributed
def test_context_parallel_equals_one_process(tmp_path: Path):
    context = mp.spawn(worker, args=(str(tmp_path),), nprocs=RANKS, join=False)
    deadline = time.monotonic() + 180
    try:
        while not context.join(timeout=5):
            assert time.monotonic() < deadline, "the ranks did not end within 180 s"
    finally:
        for process in context.processes:
            process.kill()
    assert len(list(tmp_path.glob("done*"))) == RANKS
