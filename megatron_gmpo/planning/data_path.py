"""Estimate what the tokens of a step cost a node on their way from the servers to the ranks."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import Config
from .hardware import COLUMNS_S, EXPERTS_S, GPUS_PER_NODE

_COLUMNS = 4 + 1 + 4
"""Bytes of a token's columns: token, mask and log probability (``batch.exchange.Columns``)."""


@dataclass(frozen=True)
class DataPath:
    """The tokens that one node trains in a step.

    Attributes:
        tokens: tokens of the replicas that have a rank on the node.
        nbytes: bytes of their columns, which the node's ranks share.
        seconds: time of the node for them.
    """

    tokens: int
    nbytes: int
    seconds: float


def data_path(cfg: Config, tokens: int, expert_bytes: int, world_size: int) -> DataPath:
    """Return the data path of a node, as if every sequence of the step had a gradient.

    Megatron orders ranks tp-cp-ep-dp-pp. So a node's ranks belong to one stage of as many replicas as there
    are groups of tensor- and context-parallel ranks on the node.

    Args:
        tokens: tokens of the step.
        expert_bytes: bytes of the record of one token's experts.
    """
    parallel = cfg.parallel
    replicas = world_size // parallel.model_parallel_size
    group = parallel.tensor_model_parallel_size * parallel.context_parallel_size
    on_node = tokens * min(replicas, max(1, GPUS_PER_NODE // group)) // replicas
    experts = expert_bytes if cfg.needs_rollout_routing else 0
    return DataPath(on_node, on_node * (_COLUMNS + experts), on_node * (COLUMNS_S + experts * EXPERTS_S))
