"""The route of the weights and the size of its buckets, by the servers' placement and the device."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import torch

from megatron_gmpo.config import Config, WeightSyncConfig
from megatron_gmpo.errors import InputError
from megatron_gmpo.rollout.sglang import start
from megatron_gmpo.rollout.sglang.servers import node_of
from megatron_gmpo.rollout.sglang.sync import make_weight_sync
from megatron_gmpo.rollout.sglang.sync.broadcast import BroadcastSync
from megatron_gmpo.rollout.sglang.sync.disk import DiskSync
from megatron_gmpo.rollout.sglang.sync.shared import CudaIpcSync, SharedMemorySync
from megatron_gmpo.supervision.records import node_name

GIB, MIB = 2**30, 2**20


@pytest.mark.parametrize(
    ("route", "placement", "device", "kind", "bucket"),
    [
        ("auto", "colocated", "cpu", SharedMemorySync, 256 * MIB),
        ("auto", "colocated", "cuda", CudaIpcSync, 2 * GIB),
        ("auto", "disaggregated", "cpu", BroadcastSync, 256 * MIB),
        ("auto", "disaggregated", "cuda", BroadcastSync, 2 * GIB),
        ("tensor", "disaggregated", "cpu", SharedMemorySync, 256 * MIB),
        ("distributed", "colocated", "cpu", BroadcastSync, 256 * MIB),
        ("disk", "colocated", "cuda", DiskSync, 256 * MIB),  # buckets of the disk route are host memory
        ("tensor", "disaggregated", "cuda", None, 0),  # servers on other GPUs cannot map the memory
        ("distributed", "colocated", "cuda", None, 0),  # NCCL allows one rank per GPU
    ],
)
def test_route(
    route: str,
    placement: Literal["colocated", "disaggregated"],
    device: str,
    kind: type | None,
    bucket: int,
    tmp_path: Path,
) -> None:
    cfg = WeightSyncConfig.model_validate({"route": route})
    if kind is None:
        with pytest.raises(InputError, match=rf"weight_sync\.route = '{route}' needs rollout\.placement"):
            make_weight_sync(cfg, placement, torch.device(device), tmp_path)
        return
    sync = make_weight_sync(cfg, placement, torch.device(device), tmp_path)
    assert type(sync) is kind
    assert sync._packer._capacity == bucket


@pytest.mark.parametrize("route", ["auto", "distributed"])
def test_different_nccl_names_the_route_as_it_was_set(
    route: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 2.27.3\n")
    python.chmod(0o700)
    # torch without CUDA has no NCCL to ask
    monkeypatch.setattr(start.nccl, "version", lambda: (2, 28, 9))
    with pytest.raises(
        InputError, match=rf"^weight_sync\.route = '{route}' broadcasts .* 2\.28\.9 .* 2\.27\.3: set it to"
    ):
        start._check_nccl(str(python), route)


def test_node_of_a_server() -> None:
    assert {node_of(f"http://{host}:30000") for host in ("127.0.0.1", "localhost")} == {node_name()}
    assert node_of("http://[2001:db8::7]:30000") == "2001:db8::7"


@pytest.mark.parametrize(
    ("ways", "addresses"),
    [
        # as on two machines whose /etc/hosts follow Debian's
        ([("127.0.0.1", "127.0.1.1"), ("10.0.0.2", "10.0.0.1")], ["10.0.0.1", "10.0.0.2"]),
        ([("10.0.0.1", "10.0.0.1"), ("10.0.0.2", "10.0.0.1")], ["10.0.0.1", "10.0.0.2"]),
        # rank 0 is not on the first node of the list
        ([("10.0.0.2", "10.0.0.1"), ("127.0.0.1", "127.0.1.1")], ["10.0.0.2", "10.0.0.1"]),
        # nodes that are emulated on one machine
        ([("127.0.0.1", "127.0.0.1")] * 2, ["127.0.0.1"] * 2),
    ],
)
def test_other_nodes_reach_a_nodes_servers(ways: list[tuple[str, str]], addresses: list[str]) -> None:
    assert [start.reachable_address(ways, here) for here in range(len(ways))] == addresses


@pytest.mark.parametrize(
    ("host", "address", "bound", "in_url"),
    [
        (None, None, "127.0.0.1", "127.0.0.1"),
        (None, "127.0.0.2", "127.0.0.2", "127.0.0.2"),
        ("127.0.0.3", "127.0.0.2", "127.0.0.3", "127.0.0.3"),  # the user's choice
        ("0.0.0.0", None, "0.0.0.0", "127.0.0.1"),
        ("0.0.0.0", "127.0.0.2", "0.0.0.0", "127.0.0.2"),
    ],
)
def test_the_host_of_a_server(
    host: str | None, address: str | None, bound: str, in_url: str, tmp_path: Path
) -> None:
    sections = {"model": {"path": "no model"}, "sglang": {"host": host} if host else {}}
    cfg = Config.model_validate(sections)
    servers = start.local_servers(cfg, torch.device("cpu"), tmp_path, address=address)
    assert servers._options[0]["host"] == bound
    assert servers.servers[0].url.startswith(f"http://{in_url}:")
