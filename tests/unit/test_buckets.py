"""Tensors on their way to the servers: what goes together, and where buckets end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_gmpo.config import WeightSyncConfig
from megatron_gmpo.models.fp8_blocks import SCALE
from megatron_gmpo.rollout.sglang.sync.weight_sync import _Route, make_weight_sync
from megatron_gmpo.weights.safetensors_folder import SafetensorsFolder


def buckets_of(
    tensors: list[tuple[str, Tensor]], tmp_path: Path, *, quantized: bool, bucket_bytes: int
) -> list[dict[str, Tensor]]:
    cfg = WeightSyncConfig(route="tensor", bucket_bytes=bucket_bytes)
    route = make_weight_sync(cfg, "disaggregated", torch.device("cpu"), tmp_path, quantized=quantized)
    assert isinstance(route, _Route)
    found = [
        {name: tensor.clone() for name, tensor in bucket.named_tensors()}
        for bucket, _ in route._buckets(iter(tensors))
    ]
    route.close()
    return found


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_what_sglang_loads_together_is_in_one_bucket(
    quantized: bool, reverse: bool, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = SafetensorsFolder(tiny_model("deepseek_v3"))
    tensors = [(name, folder.get(name).bfloat16()) for name in sorted(folder.names, reverse=reverse)]
    buckets = buckets_of(tensors, tmp_path, quantized=quantized, bucket_bytes=20_000)
    assert len(buckets) > 20
    pairs = 0
    for bucket in buckets:
        for name in (name for name in bucket if ".q_a_proj." in name):
            assert name.replace("q_a_proj", "kv_a_proj_with_mqa") in bucket
            pairs += name.endswith(".weight")
    assert pairs == 4
    arrived = {name: tensor for bucket in buckets for name, tensor in bucket.items()}
    assert {name for name in arrived if not name.endswith(SCALE)} == folder.names
    if not quantized:
        assert all(torch.equal(arrived[name], tensor) for name, tensor in tensors)


def test_without_a_low_rank_for_queries_nothing_waits_in_vain(tmp_path: Path) -> None:
    tensors = [
        (f"model.layers.{i}.self_attn.{name}.weight", torch.ones(4, 4))
        for i in range(3)
        for name in ("q_proj", "kv_a_proj_with_mqa")
    ]
    buckets = buckets_of(tensors, tmp_path, quantized=False, bucket_bytes=128)
    assert sorted(name for bucket in buckets for name in bucket) == sorted(name for name, _ in tensors)
