"""Run the SGLang servers of one node, for trainers on other nodes:

    python -m megatron_gmpo.rollout.sglang.serve CONFIG.toml --section.key value ...

A job step runs this command once on each rollout node (examples/moe/launch.sh). It starts the node's share of
``rollout.num_servers`` with the keys in ``server_keys.json`` of the run folder, and restarts servers that die
or hang. When the servers of all nodes are ready, task 0 writes their addresses to ``servers.json``; trainers
wait for that file (``rollout.servers_file``). On failure it writes ``{"error": "...", "code": 1}`` instead.

Reads MASTER_ADDR, the address of trainer rank 0, and Slurm's SLURM_PROCID, SLURM_NTASKS, SLURM_JOB_ID and
SLURM_RESTART_COUNT from the environment.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ... import files
from ...command_line import exit_with_one_line, load_config
from ...config import Config
from ...errors import InputError, RunError, ServerError
from ...models.snapshot import local_folders
from ...platform import choose_device
from ...supervision.records import node_name
from .processes import LocalServers
from .servers import PROBE_TIMEOUT_S, address_towards
from .start import local_servers

log = logging.getLogger(__name__)

_POLL_S = 0.5


def serve(cfg: Config) -> None:
    """Run the servers of this node until SIGTERM.

    Raises:
        ServerError: a server does not start, the servers of another node are not ready in time, or this is
            the only node and has lost all its servers.
        InputError: ``rollout.num_servers`` is not a multiple of the number of nodes; or see ``local_folders``
            and ``LocalServers``.
    """
    run_dir, task, tasks = Path(cfg.run_dir), int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"])
    share, rest = divmod(cfg.rollout.num_servers, tasks)
    if rest:
        raise InputError(
            f"rollout.num_servers = {cfg.rollout.num_servers} cannot be divided among {tasks} nodes: "
            f"choose a multiple of {tasks}"
        )
    path = local_folders({"model.path": cfg.model.path})["model.path"]
    cfg = cfg.model_copy(
        update={
            "model": cfg.model.model_copy(update={"path": path}),
            "rollout": cfg.rollout.model_copy(update={"num_servers": share}),
            "seed": cfg.seed + task * share,
        }
    )
    keys = json.loads((run_dir / "server_keys.json").read_text())
    servers = local_servers(
        cfg,
        choose_device(cfg.device),
        run_dir / "servers" / node_name(),
        keys=(keys["api_key"], keys["admin_key"]),
        address=address_towards(os.environ["MASTER_ADDR"]),
    )
    try:
        servers.start()
        servers.wait_ready()
        _publish(cfg, servers, task, tasks)
        _restart_lost_servers(cfg, servers)
        times = cfg.sglang.max_restarts + 1
        lost = f"every SGLang server of {node_name()} was lost {times} times in a row: see its log"
        if tasks == 1:
            raise ServerError(lost)
        log.error(lost)
        signal.pause()  # if this task ended, srun would end the tasks of the other nodes
    finally:
        servers.stop()


@dataclass
class _Health:
    """Health of one server.

    Attributes:
        last_answer: time of the server's last answer, on the monotonic clock; during a start, the deadline
            for its first answer.
        first_version: first weight version that the server reported after its start.
        losses: consecutive losses; a weight sync resets the count.
    """

    last_answer: float
    first_version: str | None = None
    losses: int = 0


def _restart_lost_servers(cfg: Config, servers: LocalServers) -> None:
    """Restart servers that die or hang, each up to ``sglang.max_restarts`` consecutive times.

    A weight sync resets the count. The function returns when no server is left.
    """
    health = [_Health(time.monotonic()) for _ in servers.servers]
    while any(each.losses <= cfg.sglang.max_restarts for each in health):
        time.sleep(cfg.sglang.health_interval_s)
        for index, each in enumerate(health):
            if each.losses > cfg.sglang.max_restarts or not (why := _loss(cfg, servers, index, each)):
                continue
            url = servers.servers[index].url
            each.losses += 1
            log.warning("SGLang server %s %s: lost %d times in a row", url, why, each.losses)
            if each.losses > cfg.sglang.max_restarts:
                continue
            try:
                servers.restart(index)
            except (ServerError, OSError) as error:
                log.warning("SGLang server %s did not restart: %s", url, error)
            each.last_answer = time.monotonic() + cfg.sglang.start_timeout_s
            each.first_version = None


def _loss(cfg: Config, servers: LocalServers, index: int, health: _Health) -> str:
    """Probe a server. Return the reason to restart it, or an empty string."""
    if not servers.is_alive(index):
        return servers.end_of(index)
    # The probe does not generate a token, because a sync may have paused the server, or it sleeps during
    # training. SGLang ends a server whose scheduler hangs.
    if version := servers.servers[index].weight_version(PROBE_TIMEOUT_S):
        health.last_answer = time.monotonic()
        health.first_version = health.first_version or version
        if version != health.first_version:
            health.losses = 0
    limit = cfg.sglang.hang_timeout_s
    return f"has not answered for {limit:g} s" if time.monotonic() - health.last_answer > limit else ""


def _publish(cfg: Config, servers: LocalServers, task: int, tasks: int) -> None:
    """Write this node's addresses. Task 0 joins the addresses of all nodes in ``servers.json``."""
    run_dir = Path(cfg.run_dir)
    attempt = f"{os.environ['SLURM_JOB_ID']}-{os.environ.get('SLURM_RESTART_COUNT', '0')}"
    parts = [run_dir / "servers" / f"{attempt}-{i}.json" for i in range(tasks)]
    ours = [{"url": server.url, "node": server.node} for server in servers.servers]
    files.write(parts[task], json.dumps(ours))
    if task:
        return
    deadline = time.monotonic() + cfg.sglang.start_timeout_s
    while missing := [i for i, part in enumerate(parts) if not part.exists()]:
        if time.monotonic() > deadline:
            limit = f"sglang.start_timeout_s = {cfg.sglang.start_timeout_s:g}"
            raise ServerError(
                f"the servers of rollout node {missing[0]} were not ready within {limit} "
                "after those of node 0"
            )
        time.sleep(_POLL_S)
    addresses: list[dict[str, Any]] = [address for part in parts for address in json.loads(part.read_text())]
    files.write(run_dir / "servers.json", json.dumps(addresses))
    for part in parts:
        part.unlink()


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    # SIGUSR1 asks the trainers to save and stop; they need the servers until then
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    cfg = None
    try:
        cfg = load_config(sys.argv[1:])
        serve(cfg)
    except RunError as error:
        if cfg:
            about = {"error": str(error), "code": error.exit}
            files.write(Path(cfg.run_dir) / "servers.json", json.dumps(about))
        exit_with_one_line(error, error.exit)


if __name__ == "__main__":
    main()
