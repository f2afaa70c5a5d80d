"""Weight sync: send new weights from the trainer to SGLang servers.

``weight_sync.route`` selects the module: disk.py for ``disk``, broadcast.py for ``distributed``, and
shared.py for ``tensor``. ``auto`` selects it by the servers' placement.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal
from urllib.parse import quote

import torch

from ....config import WeightSyncConfig
from ....distributed import Nodes
from ....errors import InputError
from ....supervision.records import node_name
from .broadcast import BroadcastSync
from .disk import DiskSync
from .route import SyncReport, WeightSync
from .shared import CudaIpcSync, SharedMemorySync

__all__ = ["SyncReport", "WeightSync", "make_weight_sync"]


def make_weight_sync(
    cfg: WeightSyncConfig,
    placement: Literal["disaggregated", "colocated"],
    device: torch.device,
    run_dir: Path,
    *,
    nodes: Nodes | None = None,
    quantized: bool = False,
) -> WeightSync:
    """Make the weight sync of ``cfg.route``. Collective.

    Args:
        cfg: the ``weight_sync`` section.
        placement: ``rollout.placement``.
        device: this rank's device.
        run_dir: the run's folder; the disk route writes below it unless ``cfg.folder`` is set.
        nodes: the ranks by node; None makes them.
        quantized: send block-wise FP8; the servers must have been started for it.

    Raises:
        InputError: the route does not support ``placement`` on GPUs.
    """
    is_cuda, route = device.type == "cuda", cfg.route_to(placement)
    if is_cuda and route == "tensor" and placement != "colocated":
        raise InputError(
            "weight_sync.route = 'tensor' needs rollout.placement = 'colocated': "
            "servers on other GPUs cannot map the trainer's memory"
        )
    if is_cuda and route == "distributed" and placement == "colocated":
        raise InputError(
            "weight_sync.route = 'distributed' needs rollout.placement = 'disaggregated': "
            "NCCL allows one rank per GPU"
        )
    match route:
        case "disk":
            # one level, so that runs of several users can share cfg.folder
            name = quote(str(run_dir.absolute())[1:], safe="")
            folder = Path(cfg.folder, name) if cfg.folder else run_dir / "weight_sync"
            return DiskSync(cfg, folder, quantized)
        case "distributed":
            return BroadcastSync(cfg, device, quantized)
        case "tensor":
            return (CudaIpcSync if is_cuda else SharedMemorySync)(
                cfg, device, quantized, nodes or Nodes(node_name())
            )
