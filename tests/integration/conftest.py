"""One SGLang server for all tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_gmpo.rollout.sglang.processes import LocalServers

from ..support.sglang_servers import local_servers


@pytest.fixture(scope="session")
def sglang_model(tiny_model: Callable[..., Path]) -> Path:
    """The tiny MoE that ``sglang_server`` starts with."""
    return tiny_model("qwen3_moe", num_layers=2)


@pytest.fixture(scope="session")
def sglang_server(sglang_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServers]:
    """One server, ready, in fp32, that can return routed experts. Its weights and their version are what the last test left."""
    args = {"enable_return_routed_experts": True}
    with local_servers(sglang_model, tmp_path_factory.mktemp("servers"), args=args) as servers:
        servers.start()
        servers.wait_ready()
        yield servers
