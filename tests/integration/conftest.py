"""One SGLang server for all tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_gmpo.rollout.sglang.processes import LocalServers

from ..support.sglang_servers import local_servers


@pytest.fixture(scope="session")
def sglang_model(tiny_model: Callable[..., Path]) -> Path:
    """Return the folder of the tiny MoE with which ``sglang_server`` starts."""
    return tiny_model("qwen3_moe", num_layers=2)


@pytest.fixture(scope="session")
def sglang_server(sglang_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServers]:
    """Yield one ready server in fp32 that can return routed experts.

    The previous test determines its weights and their version.
    """
    args = {"enable_return_routed_experts": True}
    with local_servers(sglang_model, tmp_path_factory.mktemp("servers"), args=args) as servers:
        servers.start()
        servers.wait_ready()
        yield servers
