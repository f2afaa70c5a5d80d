"""The trainer's nodes and GPUs, and the servers that share them."""

from __future__ import annotations

from collections.abc import Iterable

from ....distributed import Nodes
from ....errors import InputError
from ..servers import Server


def check_places(servers: Iterable[Server], nodes: Nodes, *, gpus: bool) -> None:
    """Check that every server runs on a node of the trainer.

    With ``gpus``, also check that it runs on GPUs of the trainer there, and shares none with another server.
    The ranks of a node use its GPUs in the order of their numbers, as under torchrun.

    Raises:
        InputError: a server does not.
    """
    owners: dict[tuple[str, int], Server] = {}
    for server in servers:
        if server.node not in nodes.ranks:
            raise InputError(
                f"rollout server {server.url} runs on node {server.node!r}, and the trainer has ranks on "
                f"{_listed(nodes.ranks)} only: start the server there, or set weight_sync.route = 'disk'"
            )
        if not gpus:
            continue
        where = f"of node {server.node!r}"
        if (end := server.gpus.stop) > (count := len(nodes.ranks[server.node])):
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
