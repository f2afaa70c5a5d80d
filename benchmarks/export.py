"""Measure the collectives and the time of a weight export against an export that gathers tensor by tensor.

Run: python -m benchmarks.export [--layers 48] [--experts 128]   (about two minutes)

Four processes hold a model of the shape of Qwen3-30B-A3B (48 layers, 128 experts, 18,867 tensors on the
hub) with tiny widths, so that the time is that of the calls and not of the bytes. The layout splits it over
tensor-parallel, expert-parallel and pipeline-parallel ranks. The peer gathers every parameter by itself: one
broadcast among expert-parallel ranks, one all-gather among tensor-parallel ranks, one broadcast among stages.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing

from megatron_gmpo.command_line import Options, one_line_errors, parse_options
from megatron_gmpo.config import Config, Positive
from megatron_gmpo.distributed import rank, world_size
from megatron_gmpo.models.description import describe_model
from megatron_gmpo.models.mapping import Mapping
from megatron_gmpo.platform import prepare_megatron
from megatron_gmpo.policy.build import build_chunks
from megatron_gmpo.policy.parallel import start_model_parallel, stop_model_parallel
from megatron_gmpo.testing.tiny_models import make_tiny_model
from megatron_gmpo.weights.export import Export
from megatron_gmpo.weights.parameters import local_parameters

CPU = torch.device("cpu")
RANKS, ROUNDS = 4, 3
LAYOUTS = {
    "tp2 x pp2": {
        "tensor_model_parallel_size": 2,
        "expert_tensor_parallel_size": 2,
        "pipeline_model_parallel_size": 2,
    },
    "ep2 x pp2": {"expert_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
    "ep4": {"expert_model_parallel_size": 4},
}
CALLS = ("broadcast", "all_gather", "all_gather_into_tensor", "all_gather_object")


class Choices(Options):
    """Shape of the model."""

    layers: Positive = 48
    """Number of layers."""
    experts: Positive = 128
    """Experts per layer."""


@torch.no_grad()
def export_one_by_one(
    chunks: list[torch.nn.Module], mapping: Mapping, groups: Any
) -> Iterator[tuple[str, Tensor]]:
    """Gather every parameter by itself, the peer of ``Export``."""
    mine = {parameter.name: parameter for parameter in local_parameters(chunks, groups)}
    local = {
        name: (groups.pp.rank(), groups.ep.rank() * p.is_expert, p.tensor.shape, p.tensor.dtype, p.is_expert)
        for name, p in mine.items()
    }
    owners: dict[str, Any] = {}
    for per_stage in gather_objects(local, groups.pp):
        for per_expert_rank in gather_objects(per_stage, groups.ep):
            owners = per_expert_rank | owners
    for name, (stage, expert_rank, shape, dtype, is_expert) in owners.items():
        match, tp = mapping.find(name), groups.expt_tp if is_expert else groups.tp
        on_stage = groups.pp.rank() == stage
        shard = mine[name].tensor.detach().clone() if name in mine else torch.empty(shape, dtype=dtype)
        if on_stage and is_expert and groups.ep.size() > 1:
            dist.broadcast(shard, src=dist.get_global_rank(groups.ep, expert_rank), group=groups.ep)
        parts = [torch.empty_like(shard) for _ in range(tp.size())] if tp.size() > 1 else [shard]
        if on_stage and tp.size() > 1:
            dist.all_gather(parts, shard, group=tp)
        full = match.operation.unshard(parts).contiguous()
        if groups.pp.size() > 1:
            dist.broadcast(full, src=dist.get_global_rank(groups.pp, stage), group=groups.pp)
        yield from zip(match.hf, match.operation.separate(full), strict=True)


def gather_objects(item: Any, group: dist.ProcessGroup) -> list[Any]:
    items: list[Any] = [None] * group.size()
    dist.all_gather_object(items, item, group=group)
    return items


def count_calls(counts: Counter[str]) -> None:
    """Count this process's collectives by name in ``counts``."""

    def counted(name: str) -> Callable[..., Any]:
        call = getattr(dist, name)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return call(*args, **kwargs)

        return wrapper

    for name in CALLS:
        setattr(dist, name, counted(name))


def measure(index: int, store: str, model: str, results: Any) -> None:
    """Measure all layouts as rank ``index``; rank 0 puts the results into the queue."""
    torch.set_num_threads(1)
    prepare_megatron(CPU)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=index, world_size=RANKS)
    counts = Counter[str]()
    count_calls(counts)
    for layout, parallel in LAYOUTS.items():
        cfg = Config.model_validate({"model": {"path": model}, "parallel": parallel})
        description = describe_model(cfg, world_size(), CPU)
        groups = start_model_parallel(cfg.parallel, cfg.seed, cfg.distributed_timeout_s)
        chunks = build_chunks(description, groups, CPU)
        found: dict[str, Any] = {"layout": layout}
        for kind, export in (("one by one", export_one_by_one), ("Export", Export)):
            times = []
            for _ in range(ROUNDS):
                counts.clear()
                dist.barrier()
                start = time.perf_counter()
                found["tensors"] = sum(1 for _ in export(chunks, description.mapping, groups))
                times.append(time.perf_counter() - start)
            found[kind] = {"seconds": min(times), "collectives": counts.total()}
        if rank() == 0:
            results.put(found)
        del chunks
        stop_model_parallel()
    dist.destroy_process_group()


def measure_export(choices: Choices) -> dict[str, Any]:
    """Print a line for each layout, and return the worst of them."""
    results = multiprocessing.get_context("spawn").SimpleQueue()
    worst = {"collectives": 0.0, "times": float("inf")}
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        make_tiny_model(
            model, num_layers=choices.layers, num_experts=choices.experts, hidden_size=16, ffn_hidden_size=16
        )
        multiprocessing.spawn(measure, (f"{folder}/store", str(model), results), nprocs=RANKS)
    for _ in LAYOUTS:
        found = results.get()
        old, new = found["one by one"], found["Export"]
        share = new["collectives"] / old["collectives"]
        faster = old["seconds"] / new["seconds"]
        print(
            f"{found['layout']:10} {found['tensors']:6} tensors  collectives {old['collectives']:6} -> "
            f"{new['collectives']:4} ({share:.2%})  {old['seconds']:7.2f} -> {new['seconds']:6.2f} s "
            f"({faster:.1f} times as fast)"
        )
        worst["collectives"] = max(worst["collectives"], share)
        worst["times"] = min(worst["times"], faster)
    return {
        "benchmark": "export",
        "share_of_collectives": round(worst["collectives"], 4),
        "times_as_fast": round(worst["times"], 1),
        "within_limit": worst["collectives"] <= 0.05 and worst["times"] >= 5,
    }


if __name__ == "__main__":
    with one_line_errors():
        choices = parse_options(Choices, sys.argv[1:], "python -m benchmarks.export")
        print(json.dumps(measure_export(choices)))
