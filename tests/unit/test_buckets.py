"""Packing tensors into buckets: sizes, alignment, and tensors that must share a bucket."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_gmpo.models.fp8_blocks import SCALE
from megatron_gmpo.rollout.sglang.sync.buckets import BucketPacker
from megatron_gmpo.weights.safetensors_folder import SafetensorsFolder


def packer(capacity: int, *, quantized: bool = False) -> BucketPacker:
    return BucketPacker(capacity, lambda nbytes: torch.empty(nbytes, dtype=torch.uint8), quantized=quantized)


def test_buckets_are_bounded_and_aligned() -> None:
    generator = torch.Generator().manual_seed(0)
    # Like an embedding, the first tensor is too large for a bucket.
    shapes = [(2, 1024), (7,), (3, 5), (1,), (33, 3), (2, 1024), (5,), (100, 2)]
    dtypes = [torch.bfloat16, torch.float32, torch.bfloat16]
    tensors = [
        (f"{round_}.{i}", torch.randn(shape, generator=generator).to(dtypes[(i + round_) % 3]))
        for round_ in range(4)
        for i, shape in enumerate(shapes)
    ]
    sent: list[tuple[str, Tensor]] = []
    for bucket, last in packer(1024).pack(iter(tensors)):
        assert bucket.nbytes <= 1024 or len(bucket.contents) == 1
        assert bucket.nbytes == len(bucket.data) == sum(tensor.nbytes for _, tensor in bucket.named_tensors())
        sent += [(name, tensor.clone()) for name, tensor in bucket.named_tensors()]
        assert last == (len(sent) == len(tensors))
    assert [name for name, _ in sent] == [name for name, _ in tensors]
    for (_, a), (_, b) in zip(sent, tensors, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def packed(tensors: list[tuple[str, Tensor]], capacity: int, *, quantized: bool) -> list[dict[str, Tensor]]:
    return [
        {name: tensor.clone() for name, tensor in bucket.named_tensors()}
        for bucket, _ in packer(capacity, quantized=quantized).pack(tensors)
    ]


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_tensors_that_sglang_fuses_share_a_bucket(
    quantized: bool, reverse: bool, tiny_model: Callable[..., Path]
) -> None:
    folder = SafetensorsFolder(tiny_model("deepseek_v3"))
    tensors = [(name, folder.get(name).bfloat16()) for name in sorted(folder.names, reverse=reverse)]
    buckets = packed(tensors, 10_000, quantized=quantized)
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


def test_a_model_without_q_a_proj_sends_kv_a_proj_alone() -> None:
    tensors = [
        (f"model.layers.{i}.self_attn.{name}.weight", torch.ones(4, 4))
        for i in range(3)
        for name in ("q_proj", "kv_a_proj_with_mqa")
    ]
    buckets = packed(tensors, 64, quantized=False)
    assert sorted(name for bucket in buckets for name in bucket) == sorted(name for name, _ in tensors)
