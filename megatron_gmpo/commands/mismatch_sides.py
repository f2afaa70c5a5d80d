"""The sides of a comparison of log probabilities: transformers, policy, SGLang servers, recorded values."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..batch.assembly import whole_batch
from ..batch.samples import SampleGroup
from ..config import Config
from ..data.prompts import load_tokenizer
from ..distributed import rank
from ..errors import InputError, ServerError
from ..models.decoder import prediction_layers
from ..models.description import describe_model, read_hf_config, vision_of
from ..models.family import language_config
from ..models.snapshot import with_local_models
from ..platform import choose_device, prepare_megatron, start_process_group
from ..policy.parallel import start_model_parallel
from ..policy.policy import Policy
from ..rollout.embedded import EmbeddedEngine
from ..rollout.replay import load_groups
from ..rollout.sglang.scoring import sequence_logprobs
from ..rollout.sglang.servers import Server, external_servers
from ..rollout.sglang.start import check_servers, local_servers
from ..rollout.sglang.sync import make_weight_sync
from ..weights.parameters import unwrapped
from ..weights.safetensors_folder import SafetensorsFolder

TRANSFORMERS = {"fp32": (torch.float32, False), "bf16": (torch.bfloat16, False), "fp8": (torch.float32, True)}
"""Side -> dtype of the model, and whether its weights are rounded to FP8."""
SERVERS = {"sglang": "none", "sglang_fp8": "fp8"}
"""Side -> ``rollout.quantization`` of the server that is started."""


@dataclass
class Side:
    """The result of one side.

    Attributes:
        logprobs: (N,) fp32 log probabilities of the N response tokens of all sequences.
        hidden: for each layer, its output on the first sequences, (tokens, hidden size) fp32; empty unless
            requested.
    """

    logprobs: Tensor
    hidden: list[Tensor] = field(default_factory=list)


def measure(
    cfg: Config,
    folder: Path,
    sides: Sequence[str],
    *,
    step: int = 0,
    num_groups: int | None = None,
    layers: int = 0,
) -> dict[str, Side]:
    """Return the result of each side; on ranks other than 0, only the policy's result.

    Args:
        folder: saved rollouts, ``rollout.save_path`` of a run.
        step: step whose rollouts are used.
        num_groups: number of prompt groups to use; None means all.
        layers: number of sequences whose hidden states are kept.

    Raises:
        InputError: a side is unknown, or not supported with these arguments; the rollouts do not exist.
    """
    _check(cfg, sides, layers)
    device = choose_device(cfg.device)
    cfg = with_local_models(cfg, device)
    whole = read_hf_config(cfg.model.path)
    if vision_of(whole):
        raise InputError(f"model.path = {cfg.model.path!r} has vision: only models of text can be compared")
    vocab_size = language_config(whole).vocab_size
    groups = load_groups(folder, step, vocab_size, slice(num_groups))
    cfg = cfg.model_copy(update={"rollout": cfg.rollout.model_copy(update={"temperature": 1.0})})
    found: dict[str, Side] = {}
    if "policy" in sides:  # first, because every rank takes part
        found["policy"] = policy_side(cfg, groups, device, layers)
    for side in sides if rank() == 0 else ():
        if side in TRANSFORMERS:
            found[side] = transformers_side(cfg, groups, device, side, layers)
        elif side in SERVERS:
            found[side] = own_server_side(cfg, groups, device, SERVERS[side])
        elif side == "recorded":
            batch = whole_batch(groups)
            found[side] = Side(batch.rollout_logprobs[batch.response_mask])
        elif side != "policy":
            found[side] = server_side(external_servers((side,))[0], groups, cfg.sglang.request_timeout_s)
    return {side: found[side] for side in sides if side in found}


def _check(cfg: Config, sides: Sequence[str], layers: int) -> None:
    known = ["policy", "recorded", *TRANSFORMERS, *SERVERS]
    for side in sides:
        if side not in known and not side.startswith("http"):
            raise InputError(f"--sides {side}: choose from {', '.join(known)}, or give a server's URL")
    if len(set(sides)) < max(2, len(sides)):
        raise InputError(f"--sides {' '.join(sides)}: name two or more, each once")
    if "recorded" in sides and cfg.rollout.temperature != 1:
        raise InputError(
            f"--sides recorded: they were sampled at rollout.temperature = {cfg.rollout.temperature:g}, and "
            f"the other sides "
            "compute at 1; leave it out"
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and (layers or SERVERS.keys() & set(sides)):
        raise InputError(
            "--layers and the sides sglang and sglang_fp8 need a single process: leave them out, or torchrun"
        )


@torch.no_grad()
def transformers_side(
    cfg: Config, groups: list[SampleGroup], device: torch.device, side: str, layers: int
) -> Side:
    """Return the result of the embedded engine's model after a weight sync."""
    dtype, quantized = TRANSFORMERS[side]
    tokenizer = load_tokenizer(cfg.model.path)
    engine = EmbeddedEngine(
        cfg.model.path,
        tokenizer,
        device=device,
        dtype=dtype,
        batch_size=1,
        seed=cfg.seed,
        quantized=quantized,
        fp32_head=cfg.uses_fp32_head,
    )
    engine.update_weights(_weights_of(cfg), version=0)
    samples = [sample for group in groups for sample in group.samples]
    logprobs: list[Tensor] = []
    kept: list[list[Tensor]] = []
    for number, sample in enumerate(samples):
        ids = torch.from_numpy(sample.tokens).long()[None].to(device)
        with _kept_states(engine.model.model.layers if number < layers else []) as states:
            logits = engine.model(ids).logits[0, :-1].float()
        kept += [states] * bool(states)
        found = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0].cpu()
        logprobs.append(found[torch.from_numpy(sample.response_mask[1:])])
    lengths = [len(sample.tokens) for sample in samples[:layers]]
    return Side(torch.cat(logprobs), _by_layer(kept, lengths))


def policy_side(cfg: Config, groups: list[SampleGroup], device: torch.device, layers: int) -> Side:
    """Return the result of Megatron. Collective."""
    prepare_megatron(device)
    description = describe_model(cfg, int(os.environ.get("WORLD_SIZE", "1")), device)
    if not dist.is_initialized():
        start_process_group(device, cfg.distributed_timeout_s)
    parallel = start_model_parallel(cfg.parallel, cfg.seed, cfg.distributed_timeout_s)
    policy = Policy(cfg, description, parallel, device, trainable=False)
    batch = whole_batch(groups)
    logprobs = policy.logprobs(batch)[batch.response_mask]
    one_each = [SampleGroup(group.prompt, [sample]) for group in groups for sample in group.samples][:layers]
    kept: list[list[Tensor]] = []
    for group in one_each:
        decoder_layers = (layer for chunk in policy.chunks for layer in unwrapped(chunk).decoder.layers)
        with _kept_states(decoder_layers) as states:
            policy.logprobs(whole_batch([group]))
        kept.append(states)
    return Side(logprobs, _by_layer(kept, [len(group.samples[0].tokens) for group in one_each]))


def server_side(server: Server, groups: list[SampleGroup], timeout_s: float) -> Side:
    """Return the result of a running server.

    Raises:
        ServerError: see ``sequence_logprobs``.
    """
    logprobs: list[float] = []
    for sample in (sample for group in groups for sample in group.samples):
        found = sequence_logprobs(server, sample.tokens.tolist(), timeout_s)
        logprobs += [
            logprob
            for logprob, response in zip(found, sample.response_mask, strict=True)
            if response and logprob is not None
        ]
    return Side(torch.tensor(logprobs))


def own_server_side(cfg: Config, groups: list[SampleGroup], device: torch.device, quantization: str) -> Side:
    """Start a server, send it the weights by a weight sync, and return its result."""
    rollout = {
        "engine": "sglang",
        "quantization": quantization,
        "num_servers": 1,
        "placement": "disaggregated",
        "server_urls": (),
        "servers_file": "",
    }
    # The server shares this process's GPU. NCCL supports no group of two processes on one GPU, so the weights
    # are sent over the disk route. The server cannot use memory that torch caches until it is released.
    update = {
        "model": cfg.model.model_copy(update={"fp32_head": cfg.uses_fp32_head}),  # as in the other sides
        "rollout": cfg.rollout.model_copy(update=rollout),
        "weight_sync": cfg.weight_sync.model_copy(update={"route": "disk", "folder": ""}),
    }
    cfg = cfg.model_copy(update=update)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    check_servers(cfg, read_hf_config(cfg.model.path), device)
    with TemporaryDirectory() as folder:
        servers = local_servers(cfg, device, Path(folder))
        sync = make_weight_sync(
            cfg.weight_sync, "disaggregated", device, Path(folder), quantized=quantization == "fp8"
        )
        try:
            servers.start()
            servers.wait_ready()
            report = sync.update(servers.servers, _weights_of(cfg), "mismatch")
            if report.failed:
                raise ServerError("the server refused the weights; its reason is above")
            return server_side(servers.servers[0], groups, cfg.sglang.request_timeout_s)
        finally:
            sync.close()
            servers.stop()


@contextmanager
def _kept_states(layers: Iterable[torch.nn.Module]) -> Iterator[list[Tensor]]:
    """Yield a list that receives each layer's next output, (tokens, hidden size) fp32 on the CPU."""
    states: list[Tensor] = []

    def keep(_: Any, __: Any, output: Any) -> None:
        states.append((output[0] if isinstance(output, tuple) else output).flatten(0, 1).float().cpu())

    handles = [layer.register_forward_hook(keep) for layer in layers]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


def _by_layer(sequences: list[list[Tensor]], lengths: Iterable[int]) -> list[Tensor]:
    """Concatenate each layer's states over all sequences, without the padding at the end of a sequence."""
    real = [[states[:length] for states in layers] for layers, length in zip(sequences, lengths, strict=True)]
    return [torch.cat(states) for states in zip(*real, strict=True)]


def _weights_of(cfg: Config) -> Iterator[tuple[str, Tensor]]:
    hf = language_config(read_hf_config(cfg.model.path))
    folder = SafetensorsFolder(cfg.model.path, left_out=prediction_layers(hf))
    tied = {"lm_head.weight"} if hf.tie_word_embeddings else set()
    return ((name, folder.get(name)) for name in folder.names if name not in tied)
