"""Check and start the SGLang servers of a config, and make their engine."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import torch
import torch.cuda.nccl as nccl

from ...config import Config, SGLangConfig
from ...distributed import Nodes, agreed, world_size
from ...errors import InputError, RunError
from ...models import fp8_blocks
from ...supervision.records import node_name
from ...weights.companions import copy_companions
from ..images import RunImages
from ..player import Player
from .engine import SGLangEngine
from .image_requests import TOWER, check_image_limits, check_serves_images, image_options
from .processes import LocalServers
from .servers import (
    Server,
    address_towards,
    external_servers,
    node_of,
    published_addresses,
    published_servers,
)
from .sync import make_weight_sync

_IMPORT_TIMEOUT_S = 300.0


def check_servers(cfg: Config, hf: Any, device: torch.device) -> None:
    """Check that servers can be started or reached, and that they can serve the model.

    Args:
        hf: the model's Hugging Face config.
        device: device of the policy.

    Raises:
        InputError: ``sglang.python`` does not exist; a server of ``rollout.server_urls`` cannot be used; the
            model is in FP8, which servers load but the weight sync does not send; running servers would read
            images in another way; the sync uses NCCL and the NCCL versions of trainer and servers differ; or
            see ``check_image_limits``.
    """
    if getattr(hf, "quantization_config", None) and cfg.rollout.quantization == "none":
        raise InputError(
            f"model.path = {cfg.model.path!r} is in FP8: set rollout.quantization = 'fp8', "
            "or give the model in bf16"
        )
    check_image_limits(cfg)
    if cfg.rollout.server_urls:
        check_serves_images(cfg, external_servers(cfg.rollout.server_urls), device)
    elif not cfg.rollout.servers_file and not Path(cfg.sglang.python).is_file():
        raise InputError(
            f"sglang.python = {cfg.sglang.python!r} does not exist: run make sglang, "
            "or set rollout.server_urls or rollout.servers_file"
        )
    route = cfg.weight_sync.route_to(cfg.rollout.placement)
    if route == "distributed" and device.type == "cuda" and not cfg.rollout.server_urls:
        _check_nccl(cfg.sglang.python, cfg.weight_sync.route)


def _check_nccl(python: str, route: str) -> None:
    """Check that the NCCL versions are equal. NCCL connects only processes of one version (its init.cc)."""
    question = "import torch.cuda.nccl as nccl; print(*nccl.version(), sep='.')"
    try:
        theirs = subprocess.run(
            [python, "-I", "-c", question], capture_output=True, text=True, timeout=_IMPORT_TIMEOUT_S
        ).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        theirs = ""  # the interpreter is on other nodes, or broken; then the start of the servers fails
    ours = ".".join(map(str, nccl.version()))
    if theirs and theirs != ours:
        raise InputError(
            f"weight_sync.route = {route!r} broadcasts to these servers, which needs the same NCCL on both "
            f"sides, but the trainer's torch has {ours} and that of sglang.python has {theirs}: "
            "set it to 'disk', or install a torch with the same NCCL"
        )


def check_colocated_gpus(num_servers: int, gpus: int, trainer_gpus: int) -> None:
    """Check that colocated servers need no more GPUs than the trainer has.

    Raises:
        InputError: the servers need more GPUs.
    """
    if gpus > trainer_gpus:
        raise InputError(
            f"rollout.num_servers = {num_servers} needs {gpus} GPUs, and the trainer has {trainer_gpus}: "
            "start fewer servers"
        )


def start_sglang(
    cfg: Config,
    hf: Any,
    tokenizer: Any,
    device: torch.device,
    player: Player | None = None,
    images: RunImages | None = None,
) -> SGLangEngine:
    """Start or reach the servers of ``cfg``, and return their engine. Collective.

    The first rank of each node starts the node's servers, or reaches its share of running servers. Started
    servers may not be ready when this returns, except colocated servers on GPUs.

    Args:
        hf: the model's Hugging Face config.
        tokenizer: the model's tokenizer.
        device: device of the policy.
        player: plays episodes; None samples single responses.
        images: the images of the run; None for a model without vision.

    Raises:
        InputError: see ``LocalServers``, ``make_weight_sync`` and ``WeightSync.check``; or colocated servers
            need more GPUs than the trainer has, or cannot be divided among its nodes.
        ServerError: see ``published_addresses``; or colocated servers do not start.
    """
    rollout, run_dir = cfg.rollout, Path(cfg.run_dir)
    colocated_on_gpus = device.type == "cuda" and rollout.placement == "colocated"
    gpus = rollout.num_servers * cfg.sglang.tensor_parallel_size
    if colocated_on_gpus:
        check_colocated_gpus(rollout.num_servers, gpus, world_size())
    nodes = Nodes(node_name(), cfg.distributed_timeout_s)
    local: LocalServers | None = None
    if rollout.server_urls or rollout.servers_file:
        servers = _share_of_running_servers(cfg, nodes)
    else:
        # ranks of other nodes send weights to disaggregated servers
        shared = len(nodes) > 1 and rollout.placement != "colocated"
        address = _address_of_node(nodes) if shared else None
        with agreed():
            if nodes.is_leader:
                local = _servers_of_node(cfg, device, nodes, address)
        servers = local.servers if local else []
    weight_sync = cfg.weight_sync
    # no request is in flight at a sync, and a server paused to retract uses a full CPU core
    if not rollout.max_staleness:
        weight_sync = weight_sync.model_copy(update={"in_flight": "abort"})
    sync = make_weight_sync(
        weight_sync,
        rollout.placement,
        device,
        run_dir,
        nodes=nodes,
        quantized=rollout.quantization == "fp8",
    )
    if images and cfg.model.freeze_vision and sync.verification:
        sync.verification.left_out.append(TOWER)
    everywhere = nodes.from_leaders(servers)
    with agreed():
        sync.check([server for of_node in everywhere for server in of_node])
    routed_experts = (hf.num_hidden_layers, hf.num_experts_per_tok) if rollout.routed_experts else None
    engine = SGLangEngine(cfg, servers, local, sync, tokenizer, nodes, routed_experts, player, images)
    if colocated_on_gpus:
        _wait_ready(engine, local)
    return engine


def _share_of_running_servers(cfg: Config, nodes: Nodes) -> list[Server]:
    """Check this node's share of the running servers and return it, on its leader. Collective.

    Colocated servers belong to their own node. The others are dealt out to the nodes one by one.
    """
    rollout, file = cfg.rollout, Path(cfg.rollout.servers_file)
    addresses: list[tuple[str, str]] = []
    with agreed():
        if nodes.is_leader and rollout.servers_file:
            addresses = published_addresses(file, cfg.sglang.start_timeout_s)
        elif nodes.is_leader:
            addresses = [(url, node_of(url)) for url in rollout.server_urls]
    # only a server's own node knows from the URL that the server is there
    found = zip(nodes.ranks, nodes.from_leaders(addresses), strict=True)
    places = {url: name for name, of_node in found for url, node in of_node if node == name}
    names = list(nodes.ranks)
    servers: list[Server] = []
    with agreed():
        for number, (url, node) in enumerate(addresses):
            node = places.get(url, node)
            owner = number % len(nodes)
            if rollout.placement == "colocated" and node in names:
                owner = names.index(node)
            if owner != nodes.here:
                continue
            if rollout.servers_file:
                servers += published_servers(file, [(url, node)])
            else:
                servers += [replace(server, node=node) for server in external_servers([url])]
    return servers


def _address_of_node(nodes: Nodes) -> str:
    """Return the address at which the other nodes reach this node. Collective."""
    way = ("", "")
    with agreed():
        if nodes.is_leader:
            master = os.environ["MASTER_ADDR"]
            way = (address_towards(master), socket.gethostbyname(master))
    return reachable_address(nodes.from_leaders(way), nodes.here)


def reachable_address(ways: list[tuple[str, str]], here: int) -> str:
    """Return the address at which the other nodes reach the node ``here``.

    It is the node's own address on the way to rank 0's node. On that node itself this may be a loopback
    address, because /etc/hosts of Debian gives a machine's own name the address 127.0.1.1. Then it is the
    address that another node finds for the name.

    Args:
        ways: for each node, its own address on the way to MASTER_ADDR, and what it finds for MASTER_ADDR.
    """
    own, _ = ways[here]
    found = (master for _, master in ways if not ip_address(master).is_loopback)
    return next(found, own) if ip_address(own).is_loopback else own


def _servers_of_node(cfg: Config, device: torch.device, nodes: Nodes, address: str | None) -> LocalServers:
    """Return this node's share of the servers that the run starts. They are not started yet.

    Args:
        address: see ``local_servers``.
    """
    count, colocated = cfg.rollout.num_servers, cfg.rollout.placement == "colocated"
    share, rest = divmod(count, len(nodes))
    if rest and colocated:
        raise InputError(
            f"rollout.num_servers = {count} cannot be divided among {len(nodes)} nodes: "
            f"choose a multiple of {len(nodes)}"
        )
    log_dir, here = Path(cfg.run_dir) / "servers", nodes.here
    if len(nodes) > 1:
        log_dir /= nodes.name
    mine = cfg.model_copy(
        update={
            "rollout": cfg.rollout.model_copy(update={"num_servers": share + (here < rest)}),
            "seed": cfg.seed + share * here + min(here, rest),
        }
    )
    first_gpu = 0 if colocated else len(nodes.local_ranks)
    return local_servers(mine, device, log_dir, first_gpu=first_gpu, address=address)


def _wait_ready(engine: SGLangEngine, local: LocalServers | None) -> None:
    """Wait on every rank until the servers are ready.

    SGLang sizes its cache by the free memory, so the trainer must allocate memory after that.
    """
    try:
        with agreed():
            if local:
                local.wait_ready()
    except RunError:
        engine.close()
        raise


def local_servers(
    cfg: Config,
    device: torch.device,
    log_dir: Path,
    *,
    first_gpu: int = 0,
    keys: tuple[str, str] | None = None,
    address: str | None = None,
) -> LocalServers:
    """Return ``LocalServers`` for the model and the settings of ``cfg``. They are not started yet.

    Args:
        address: this node's address if other nodes must reach the servers. They bind it if ``sglang.host``
            has its default.
    """
    sglang = cfg.sglang
    if address and sglang.host == SGLangConfig().host:
        sglang = sglang.model_copy(update={"host": address})
    model_path, dtype = cfg.model.path, cfg.model.dtype
    options = image_options(cfg, device)
    if cfg.rollout.quantization == "fp8":
        if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (10, 0):
            # deep_gemm_wrapper/configurer.py, fp8_utils.py:requant_weight_ue8m0_inplace
            raise InputError(
                "rollout.quantization = 'fp8' needs Hopper GPUs: on newer GPUs SGLang packs the scales as it "
                "loads them, and accepts no others later; set it to 'none'"
            )
        model_path = str(fp8_start_folder(Path(model_path), log_dir / "fp8_model"))
        dtype = "bf16"  # the output of the FP8 kernels
        options["load_format"] = "dummy"
    if cfg.uses_fp32_head and dtype == "bf16":
        if device.type == "cpu" and torch.cpu._is_amx_tile_supported():
            # vocab_parallel_embedding.py:PackWeightMethod, logits_processor.py:_compute_lm_head
            raise InputError(
                "model.fp32_head needs servers on GPUs or on a CPU without AMX, for which SGLang reorders "
                "the output matrix: set it to false"
            )
        options["enable_fp32_lm_head"] = True
    if cfg.rollout.routed_experts:
        options["enable_return_routed_experts"] = True
    if cfg.rollout.placement == "colocated" and device.type == "cuda":
        options["enable_memory_saver"] = True  # preloads a library that needs libcuda
    return LocalServers(
        model_path,
        cfg.rollout.num_servers,
        sglang,
        log_dir,
        dtype=dtype,
        seed=cfg.seed,
        device=device,
        options=options,
        # SGLang never empties its cache of features, which a trained tower changes
        environment={} if cfg.model.freeze_vision else {"SGLANG_VLM_CACHE_SIZE_MB": "0"},
        first_gpu=first_gpu,
        keys=keys,
        address=address,
    )


def fp8_start_folder(model: Path, folder: Path) -> Path:
    """Write the model's folder without weights. Servers receive FP8 weights with the first sync."""
    folder.mkdir(parents=True, exist_ok=True)
    copy_companions(model, folder)
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"quantization_config": fp8_blocks.QUANTIZATION_CONFIG}, indent=2)
    )
    return folder
