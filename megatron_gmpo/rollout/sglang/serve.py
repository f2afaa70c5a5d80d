"""SGLang servers for trainers on other nodes: ``python -m megatron_gmpo.rollout.sglang.serve CONFIG.toml --section.key value ...``

One task of a job step on each rollout node (examples/moe/launch.sh). It starts its share of ``rollout.num_servers``, with the keys in
``server_keys.json`` of the run folder, and starts again what dies or hangs. Once all are healthy the first task publishes their addresses
in ``servers.json``, which trainers wait for (``rollout.servers_file``); or what went wrong, as ``{"error": "...", "code": 1}``.

From the environment come MASTER_ADDR, the first trainer's address, and Slurm's number of this task and of all.
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

from ...config import Config, exit_with_one_line, load_config
from ...errors import InputError, RunError, ServerError
from ...platform import choose_device
from ...supervision.records import node_name, write_json
from .processes import LocalServers
from .servers import address_towards
from .start import local_servers

log = logging.getLogger(__name__)

_POLL_S = 0.5
_PROBE_TIMEOUT_S = 5.0


def serve(cfg: Config) -> None:
    """Runs the servers of this node until SIGTERM.

    Raises:
        ServerError: one cannot be started, those of another node are not there in time, or none is left on this node, the only one.
        InputError: ``rollout.num_servers`` cannot be shared out evenly; or as ``LocalServers``.
    """
    run_dir, task, tasks = Path(cfg.run_dir), int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"])
    share, rest = divmod(cfg.rollout.num_servers, tasks)
    if rest:
        raise InputError(
            f"rollout.num_servers = {cfg.rollout.num_servers} cannot be shared by {tasks} nodes: choose a multiple"
        )
    cfg = cfg.model_copy(
        update={
            "rollout": cfg.rollout.model_copy(update={"num_servers": share}),
            "seed": cfg.seed + task * share,
            "sglang": cfg.sglang.model_copy(update={"host": address_towards(os.environ["MASTER_ADDR"])}),
        }
    )
    keys = json.loads((run_dir / "server_keys.json").read_text())
    servers = local_servers(
        cfg,
        choose_device(cfg.device),
        run_dir / "servers" / node_name(),
        keys=(keys["api_key"], keys["admin_key"]),
    )
    try:
        servers.start()
        servers.wait_ready()
        _publish(cfg, servers, task, tasks)
        _watch(cfg, servers)
        lost = f"every SGLang server of {node_name()} was lost {cfg.sglang.max_restarts + 1} times in a row: see its log"
        if tasks == 1:
            raise ServerError(lost)
        log.error(lost)
        signal.pause()  # the end of this task would be that of the others
    finally:
        servers.stop()


@dataclass
class _State:
    """What is known of a server.

    Attributes:
        silent_since: time of its last answer, on the monotonic clock; while it starts, the end of the time it has for that.
        first_version: the label of the weights it came with.
        losses: in a row, without a weight sync between.
    """

    silent_since: float
    first_version: str | None = None
    losses: int = 0


def _watch(cfg: Config, servers: LocalServers) -> None:
    """Starts servers again, each ``sglang.max_restarts`` times in a row, a weight sync between two losses making the count start anew.
    Returns when none is left."""
    states = [_State(time.monotonic()) for _ in servers.servers]
    while any(state.losses <= cfg.sglang.max_restarts for state in states):
        time.sleep(cfg.sglang.health_interval_s)
        for index, state in enumerate(states):
            if state.losses <= cfg.sglang.max_restarts and (why := _loss(cfg, servers, index, state)):
                state.losses += 1
                log.warning(
                    "SGLang server %s %s: lost %d times in a row",
                    servers.servers[index].url,
                    why,
                    state.losses,
                )
                if state.losses <= cfg.sglang.max_restarts:
                    try:
                        servers.restart(index)
                    except (ServerError, OSError) as error:
                        log.warning(
                            "SGLang server %s was not started again: %s", servers.servers[index].url, error
                        )
                    state.silent_since = time.monotonic() + cfg.sglang.start_timeout_s
                    state.first_version = None


def _loss(cfg: Config, servers: LocalServers, index: int, state: _State) -> str:
    """Why the server must be started again, or nothing."""
    if not servers.is_alive(index):
        return "died"
    server = servers.servers[index]
    # it need not generate: a sync may have paused it, or it sleeps while the policy trains. SGLang itself ends one whose scheduler hangs
    if version := server.weight_version(_PROBE_TIMEOUT_S):
        state.silent_since = time.monotonic()
        state.first_version = state.first_version or version
        state.losses = state.losses if version == state.first_version else 0
    limit = cfg.sglang.hang_timeout_s
    return f"has answered nothing for {limit:g} s" if time.monotonic() - state.silent_since > limit else ""


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
            raise ServerError(
                f"the servers of rollout node {missing[0]} were not ready within {limit} after those of node 0"
            )
        time.sleep(_POLL_S)
    addresses: list[dict[str, Any]] = [address for part in parts for address in json.loads(part.read_text())]
    write_json(run_dir / "servers.json", addresses)
    for part in parts:
        part.unlink()


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    signal.signal(
        signal.SIGUSR1, signal.SIG_IGN
    )  # a request to the trainers, which still want responses before they stop
    cfg = None
    try:
        cfg = load_config(sys.argv[1:])
        serve(cfg)
    except RunError as error:
        if cfg:
            write_json(Path(cfg.run_dir) / "servers.json", {"error": str(error), "code": error.exit})
        exit_with_one_line(error, error.exit)


if __name__ == "__main__":
    main()
