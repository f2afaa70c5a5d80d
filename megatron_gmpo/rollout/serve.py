"""SGLang servers for trainers on other nodes: ``python -m megatron_gmpo.rollout.serve CONFIG.toml --section.key value ...``

One task of a job step on each rollout node (examples/moe/launch.sh). It starts its share of ``rollout.num_servers``, with the keys in
``server_keys.json`` of the run folder, and starts again what dies. Once all are healthy the first task publishes their addresses in
``servers.json``, which trainers wait for (``rollout.servers_file``); or what went wrong, as ``{"error": "..."}``.

From the environment come MASTER_ADDR, the first trainer's address, and Slurm's number of this task and of all.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

from ..config import Config, exit_with_one_line, load_config
from ..platform import choose_device
from ..supervision.records import node_name, write_json
from ..types import InputError, RunError, ServerError
from .servers import LocalServers
from .sglang import local_servers

_POLL_S = 0.5


def serve(cfg: Config) -> None:
    """Runs the servers of this node until SIGTERM.

    Raises:
        ServerError: one cannot be started, or those of another node are not there in time.
        InputError: ``rollout.num_servers`` cannot be shared out evenly; or as ``LocalServers``.
    """
    run_dir, task, tasks = Path(cfg.run_dir), int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"])
    share, rest = divmod(cfg.rollout.num_servers, tasks)
    if rest:
        raise InputError(f"rollout.num_servers = {cfg.rollout.num_servers} cannot be shared by {tasks} nodes: choose a multiple")
    cfg = cfg.model_copy(
        update={
            "rollout": cfg.rollout.model_copy(update={"num_servers": share}),
            "seed": cfg.seed + task * share,
            "sglang": cfg.sglang.model_copy(update={"host": _address_towards(os.environ["MASTER_ADDR"])}),
        }
    )
    keys = json.loads((run_dir / "server_keys.json").read_text())
    servers = local_servers(cfg, choose_device(cfg.device), run_dir / "servers" / node_name(), keys=(keys["api_key"], keys["admin_key"]))
    try:
        servers.start()
        servers.wait_ready()
        _publish(cfg, servers, task, tasks)
        while True:
            time.sleep(cfg.sglang.health_interval_s)
            for index in range(len(servers.servers)):
                if not servers.is_alive(index):
                    servers.restart(index)
                    servers.wait_ready(index)
    finally:
        servers.stop()


def _publish(cfg: Config, servers: LocalServers, task: int, tasks: int) -> None:
    """Each task writes its part, and the first one puts them together."""
    run_dir = Path(cfg.run_dir)
    attempt = f"{os.environ['SLURM_JOB_ID']}-{os.environ.get('SLURM_RESTART_COUNT', '0')}"
    parts = [run_dir / "servers" / f"{attempt}-{i}.json" for i in range(tasks)]
    write_json(parts[task], [{"url": server.url, "node": node_name()} for server in servers.servers])
    if task:
        return
    deadline = time.monotonic() + cfg.sglang.start_timeout_s
    while missing := [i for i, part in enumerate(parts) if not part.exists()]:
        if time.monotonic() > deadline:
            limit = f"sglang.start_timeout_s = {cfg.sglang.start_timeout_s:g}"
            raise ServerError(f"the servers of rollout node {missing[0]} were not ready within {limit} after those of node 0")
        time.sleep(_POLL_S)
    addresses: list[dict[str, Any]] = [address for part in parts for address in json.loads(part.read_text())]
    write_json(run_dir / "servers.json", addresses)
    for part in parts:
        part.unlink()


def _address_towards(host: str) -> str:
    """This node's address on the way to ``host``."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))  # finds the way, sends nothing
        return probe.getsockname()[0]


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # a request to the trainers, which still want responses before they stop
    cfg = None
    try:
        cfg = load_config(sys.argv[1:])
        serve(cfg)
    except RunError as error:
        if cfg:
            write_json(Path(cfg.run_dir) / "servers.json", {"error": str(error)})
        exit_with_one_line(error, error.exit)


if __name__ == "__main__":
    main()
