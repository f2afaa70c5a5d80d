"""What a precision costs: log probabilities of the same tokens in several, next to each other, and where the layers part.

    python -m tools.mismatch CONFIG.toml --groups DIR --sides fp32 bf16 fp8 policy recorded [--section.key value ...]

``DIR`` is a run's ``rollout.save_path``; the weights are those of ``model.path``. A side is one of

- ``policy``: Megatron, as CONFIG says; under torchrun in its layout
- ``fp32``, ``bf16``: transformers, weights and activations in that precision
- ``fp8``: transformers in fp32 with weights rounded to block-wise FP8: what rounding the weights costs, and nothing else
- ``sglang``, ``sglang_fp8``: a server started for this, which gets the weights by a sync, as in training; in FP8 it needs a GPU
- a URL: a running SGLang server with these weights; its keys come from SGLANG_API_KEY and SGLANG_ADMIN_API_KEY
- ``recorded``: what the rollout engine reported when it sampled

All but ``recorded`` compute at temperature 1, so that comparing it needs rollout.temperature = 1.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import torch
import torch.distributed as dist
import tyro
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor

from megatron_gmpo.batch.assembly import make_train_batch
from megatron_gmpo.batch.samples import SampleGroup
from megatron_gmpo.config import Config, exit_with_one_line, load_config
from megatron_gmpo.data.prompts import load_tokenizer
from megatron_gmpo.distributed import rank
from megatron_gmpo.errors import InputError, RunError, ServerError
from megatron_gmpo.losses.tokens import k3
from megatron_gmpo.metrics.plots import COLORS, set_up_axes
from megatron_gmpo.models.decoder import prediction_layers
from megatron_gmpo.models.description import describe_model, read_hf_config
from megatron_gmpo.platform import choose_device, prepare_megatron, start_process_group
from megatron_gmpo.policy.parallel import start_model_parallel
from megatron_gmpo.policy.policy import Policy
from megatron_gmpo.rollout.embedded import EmbeddedEngine
from megatron_gmpo.rollout.replay import load_groups
from megatron_gmpo.rollout.sglang.servers import Server, external_servers
from megatron_gmpo.rollout.sglang.start import check_servers, local_servers
from megatron_gmpo.rollout.sglang.sync import make_weight_sync
from megatron_gmpo.weights.parameters import unwrapped
from megatron_gmpo.weights.safetensors_folder import SafetensorsFolder

TRANSFORMERS = {"fp32": (torch.float32, False), "bf16": (torch.bfloat16, False), "fp8": (torch.float32, True)}
"""Side -> precision of the model, and whether its weights are rounded to FP8."""
SERVERS = {"sglang": "none", "sglang_fp8": "fp8"}


@dataclass(frozen=True)
class Options:
    """Compares log probabilities of the same tokens in several precisions. Everything else is a config file and its overrides."""

    groups: Path
    """Folder with saved rollouts, rollout.save_path of a run."""
    sides: tuple[str, ...] = ("fp32", "bf16", "fp8", "policy")
    """What to compare, the first with each of the others: policy, fp32, bf16, fp8, sglang, sglang_fp8, recorded, or a server's URL."""
    step: int = 0
    """Step whose rollouts are taken."""
    num_groups: int | None = None
    """So many groups of them; all by default."""
    layers: int = 0
    """Compare the hidden states after every layer too, on so many sequences; of policy, fp32, bf16 and fp8, in one process."""
    out: Path = Path("mismatch.png")
    """The picture."""


@dataclass
class Side:
    """What one precision computes.

    Attributes:
        logprobs: (N,) fp32, of the N response tokens of all sequences.
        hidden: for each layer, its output on the first sequences, (tokens, hidden size) fp32; empty where it was not asked for.
    """

    logprobs: Tensor
    hidden: list[Tensor] = field(default_factory=list)


@contextmanager
def kept_states(layers: Iterable[torch.nn.Module]) -> Iterator[list[Tensor]]:
    """What each layer puts out at its next call, (tokens, hidden size) fp32 on the CPU."""
    states: list[Tensor] = []

    def keep(_: Any, __: Any, output: Any) -> None:
        states.append((output[0] if isinstance(output, tuple) else output).flatten(0, 1).float().cpu())

    handles = [layer.register_forward_hook(keep) for layer in layers]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


def layer_by_layer(sequences: list[list[Tensor]], lengths: Iterable[int]) -> list[Tensor]:
    """The layers' states over all sequences, without the padding at a sequence's end."""
    real = [[states[:length] for states in layers] for layers, length in zip(sequences, lengths, strict=True)]
    return [torch.cat(states) for states in zip(*real, strict=True)]


@torch.no_grad()
def transformers_side(
    cfg: Config, groups: list[SampleGroup], device: torch.device, side: str, layers: int
) -> Side:
    """The embedded engine's model, with weights of a sync."""
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
    )
    engine.update_weights(weights_of(cfg), version=0)
    samples = [sample for group in groups for sample in group.samples]
    logprobs: list[Tensor] = []
    kept: list[list[Tensor]] = []
    for number, sample in enumerate(samples):
        ids = torch.from_numpy(sample.tokens).long()[None].to(device)
        with kept_states(engine.model.model.layers if number < layers else []) as states:
            logits = engine.model(ids).logits[0, :-1].float()
        kept += [states] * bool(states)
        found = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0].cpu()
        logprobs.append(found[torch.from_numpy(sample.response_mask[1:])])
    return Side(
        torch.cat(logprobs), layer_by_layer(kept, [len(sample.tokens) for sample in samples[:layers]])
    )


def policy_side(cfg: Config, groups: list[SampleGroup], device: torch.device, layers: int) -> Side:
    """Megatron's; collective."""
    prepare_megatron(device)
    description = describe_model(cfg, int(os.environ.get("WORLD_SIZE", "1")), device)
    start_process_group(device, cfg.distributed_timeout_s)
    parallel = start_model_parallel(cfg.parallel, cfg.seed, cfg.distributed_timeout_s)
    policy = Policy(cfg, description, parallel, device, trainable=False)
    batch = make_train_batch(groups, torch.zeros(sum(len(group.samples) for group in groups)))
    logprobs = policy.logprobs(batch)[batch.response_mask]
    one_each = [SampleGroup(group.prompt, [sample]) for group in groups for sample in group.samples][:layers]
    kept: list[list[Tensor]] = []
    for group in one_each:
        with kept_states(
            layer for chunk in policy.chunks for layer in unwrapped(chunk).decoder.layers
        ) as states:
            policy.logprobs(make_train_batch([group], torch.zeros(1)))
        kept.append(states)
    return Side(logprobs, layer_by_layer(kept, [len(group.samples[0].tokens) for group in one_each]))


def server_side(server: Server, groups: list[SampleGroup], timeout_s: float) -> Side:
    """A running server's; it reads whole sequences and generates one token more.

    Raises:
        ServerError: it does not answer, or not as it should.
    """
    logprobs: list[float] = []
    for sample in (sample for group in groups for sample in group.samples):
        body = {
            "input_ids": sample.tokens.tolist(),
            "sampling_params": {"max_new_tokens": 1, "temperature": 1.0},
            "return_logprob": True,
            "logprob_start_len": 0,
        }
        try:
            reply = httpx.post(
                f"{server.url}/generate",
                json=body,
                headers=server.headers,
                timeout=timeout_s,
                trust_env=False,
            )
            reply.raise_for_status()
        except httpx.HTTPError as error:
            raise ServerError(f"SGLang server {server.url} gave no log probabilities ({error})") from None
        found = [logprob for logprob, *_ in reply.json()["meta_info"]["input_token_logprobs"]]
        logprobs += [
            logprob for logprob, response in zip(found, sample.response_mask, strict=True) if response
        ]
    return Side(torch.tensor(logprobs))


def own_server_side(cfg: Config, groups: list[SampleGroup], device: torch.device, quantization: str) -> Side:
    """A server that is started for this and gets the weights by a sync."""
    rollout = {
        "engine": "sglang",
        "quantization": quantization,
        "num_servers": 1,
        "placement": "disaggregated",
    }
    ours = {"rollout": cfg.rollout.model_copy(update={**rollout, "server_urls": (), "servers_file": ""})}
    # the server is on this process's GPU, where no group of both can be, nor memory that this process has only put by
    ours["weight_sync"] = cfg.weight_sync.model_copy(update={"route": "disk", "folder": ""})
    cfg = cfg.model_copy(update=ours)
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
            report = sync.update(servers.servers, weights_of(cfg), "mismatch")
            if report.failed:
                raise ServerError("the server refused the weights; its reason stands above")
            return server_side(servers.servers[0], groups, cfg.sglang.request_timeout_s)
        finally:
            sync.close()
            servers.stop()


def weights_of(cfg: Config) -> Iterator[tuple[str, Tensor]]:
    hf = read_hf_config(cfg.model.path)
    folder = SafetensorsFolder(cfg.model.path, left_out=prediction_layers(hf))
    tied = {"lm_head.weight"} if hf.tie_word_embeddings else set()
    return ((name, folder.get(name)) for name in folder.names if name not in tied)


def measure(cfg: Config, options: Options) -> dict[str, Side]:
    """Each side's figures; on ranks other than the first only the policy's.

    Raises:
        InputError: an unknown side, or one that these options do not allow; rollouts that are not there.
    """
    known = ["policy", "recorded", *TRANSFORMERS, *SERVERS]
    for side in options.sides:
        if side not in known and not side.startswith("http"):
            raise InputError(f"--sides {side}: choose from {', '.join(known)}, or give a server's URL")
    if len(set(options.sides)) < max(2, len(options.sides)):
        raise InputError(f"--sides {' '.join(options.sides)}: name two or more, each once")
    if "recorded" in options.sides and cfg.rollout.temperature != 1:
        raise InputError(
            f"--sides recorded: these are of rollout.temperature = {cfg.rollout.temperature:g}, the others of 1; leave it out"
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and (options.layers or SERVERS.keys() & set(options.sides)):
        raise InputError(
            "--layers and the sides sglang and sglang_fp8 need a single process: leave them out, or torchrun"
        )
    if options.num_groups is not None and options.num_groups < 1:
        raise InputError(f"--num_groups {options.num_groups}: give 1 or more")
    if not options.out.parent.is_dir() or options.out.suffix not in (".png", ".pdf", ".svg"):
        raise InputError(f"--out {options.out}: give a .png, .pdf or .svg file in a folder that exists")
    groups = load_groups(options.groups, options.step)[: options.num_groups]
    device = choose_device(cfg.device)
    cfg = cfg.model_copy(update={"rollout": cfg.rollout.model_copy(update={"temperature": 1.0})})
    sides: dict[str, Side] = {}
    if "policy" in options.sides:  # first of all: every rank takes part
        sides["policy"] = policy_side(cfg, groups, device, options.layers)
    for side in options.sides if rank() == 0 else ():
        if side in TRANSFORMERS:
            sides[side] = transformers_side(cfg, groups, device, side, options.layers)
        elif side in SERVERS:
            sides[side] = own_server_side(cfg, groups, device, SERVERS[side])
        elif side == "recorded":
            batch = make_train_batch(groups, torch.zeros(sum(len(group.samples) for group in groups)))
            sides[side] = Side(batch.rollout_logprobs[batch.response_mask])
        elif side != "policy":
            sides[side] = server_side(external_servers((side,))[0], groups, cfg.sglang.request_timeout_s)
    return {side: sides[side] for side in options.sides if side in sides}


def table(sides: dict[str, Side]) -> Table:
    """Differences to the first side, in nats: absolute ones, and the k3 estimate of the KL divergence."""
    (name, first), *others = sides.items()
    shown = Table(title=f"log probabilities of {len(first.logprobs):,} tokens, against {name}")
    for column in ("side", "mean", "median", "99 %", "largest", "k3 KL"):
        shown.add_column(column, justify="left" if column == "side" else "right")
    for other, side in others:
        ratio = side.logprobs - first.logprobs
        size = ratio.abs()
        figures = (
            size.mean(),
            size.median(),
            size.kthvalue(math.ceil(0.99 * len(size))).values,
            size.max(),
            k3(ratio).mean(),
        )
        shown.add_row(other, *(f"{figure:.2e}" for figure in figures))
    return shown


def layer_errors(sides: dict[str, Side]) -> dict[str, list[float]]:
    """Side -> for each layer the root mean square of the difference to the first side's output, over that of the output."""
    (_, first), *others = sides.items()
    return {
        name: [
            ((b - a).square().mean() / a.square().mean()).sqrt().item()
            for a, b in zip(first.hidden, side.hidden, strict=True)
        ]
        for name, side in others
        if first.hidden and side.hidden
    }


def draw(sides: dict[str, Side], out: Path) -> None:
    (name, first), *others = sides.items()
    errors = layer_errors(sides)
    figure = Figure(figsize=(11 if errors else 5.5, 3.6), layout="constrained")
    left, *right = figure.subplots(1, 2 if errors else 1, squeeze=False)[0]
    set_up_axes(left, f"Share of tokens whose log probability differs from {name} by more", log=True)
    left.set_xscale("log")
    for (other, side), color in zip(others, COLORS, strict=False):
        size = (side.logprobs - first.logprobs).abs().sort().values
        left.step(size.clamp_min(1e-9), 1 - torch.arange(len(size)) / len(size), color=color, label=other)
    left.set_xlabel("nats")
    left.legend(frameon=False, fontsize=8)
    for axes in right:
        set_up_axes(axes, f"Relative difference of the hidden states to {name}, by layer", log=True)
        for (other, _), color in zip(others, COLORS, strict=False):
            if other in errors:
                axes.plot(range(1, len(errors[other]) + 1), errors[other], color=color, label=other)
        axes.legend(frameon=False, fontsize=8)
    FigureCanvasAgg(figure).print_figure(out, dpi=150)


def main(options: Options, argv: list[str]) -> None:
    sides = measure(load_config(argv), options)
    if rank() == 0:
        console = Console()
        console.print(table(sides))
        for side, errors in layer_errors(sides).items():
            print(
                f"{side}: hidden states after each layer differ by {', '.join(f'{error:.1e}' for error in errors)}"
            )
        draw(sides, options.out)
        print(options.out)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        options, rest = tyro.cli(Options, return_unknown_args=True, use_underscores=True)
        main(options, rest)
    except RunError as error:
        exit_with_one_line(error, error.exit)
