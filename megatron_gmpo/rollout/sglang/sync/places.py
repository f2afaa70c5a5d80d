"""The nodes and GPUs of the trainer's ranks, and the servers that share them."""

from __future__ import annotations

from collections.abc import Iterable

import torch.distributed as dist

from ....distributed import Nodes, rank
from ....errors import InputError
from ....supervision.records import node_name
from ..servers import Server


class Places:
    """The trainer's ranks by node. Every rank makes one together: the constructor is collective.

    The ranks of a node use its GPUs in the order of their numbers, as under torchrun.

    Attributes:
        node: name of this rank's node.
        ranks: ranks of this node, in ascending order. The first one sends the weights to the node's servers.
    """

    def __init__(self) -> None:
        nodes = Nodes(node_name())
        self.node, self._nodes, self.ranks = nodes.name, nodes.ranks, nodes.local_ranks

    @property
    def is_first(self) -> bool:
        """Return whether this rank is its node's first one."""
        return rank() == self.ranks[0]

    def new_node_group(self) -> dist.ProcessGroup | None:
        """Make a gloo group of each node's ranks and return this rank's. Collective. None without ranks."""
        if not dist.is_initialized():
            return None
        group, _ = dist.new_subgroups_by_enumeration(list(self._nodes.values()), backend="gloo")
        assert isinstance(group, dist.ProcessGroup)
        return group

    def check(self, servers: Iterable[Server], *, gpus: bool) -> None:
        """Check that every server runs on a node of the trainer.

        With ``gpus``, also check that it runs on GPUs of the trainer there, and shares none with another
        server.

        Raises:
            InputError: a server does not.
        """
        owners: dict[tuple[str, int], Server] = {}
        for server in servers:
            if server.node not in self._nodes:
                raise InputError(
                    f"rollout server {server.url} runs on node {server.node!r}, and the trainer has ranks on "
                    f"{_listed(self._nodes)} only: start the server there, or set weight_sync.route = 'disk'"
                )
            if not gpus:
                continue
            where = f"of node {server.node!r}"
            if (end := server.gpus.stop) > (count := len(self._nodes[server.node])):
                raise InputError(
                    f"rollout server {server.url} uses GPU {end - 1} {where}, and the trainer has {count} "
                    "ranks there: start fewer servers on each node, or more ranks"
                )
            for gpu in server.gpus:
                if other := owners.get((server.node, gpu)):
                    raise InputError(
                        f"rollout servers {other.url} and {server.url} both use GPU {gpu} {where}: "
                        "give each server GPUs of its own with --base-gpu-id"
                    )
                owners[server.node, gpu] = server


def _listed(names: Iterable[str]) -> str:
    first, *others = map(repr, names)
    return f"{first} and {len(others)} others" if len(others) > 3 else ", ".join((first, *others))
