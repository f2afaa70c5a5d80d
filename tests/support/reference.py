"""Independent reference: transformers in float64, the papers' formulas, torch's AdamW.

This module shares no code with the project.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

ImagesBySequence = dict[tuple[int, ...], dict[str, Tensor]]
"""Tokens of a sequence -> ``pixel_values`` and ``image_grid_thw`` from transformers' image processor."""


def load_float64(path: Path, images: ImagesBySequence | None = None) -> Any:
    """Return the model of a folder; ``images`` are those of a vision-language model's sequences."""
    vision = hasattr(AutoConfig.from_pretrained(path), "vision_config")
    model = (AutoModelForImageTextToText if vision else AutoModelForCausalLM).from_pretrained(
        path, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
    )
    if images:

        def with_images(
            _: Any, args: tuple[Tensor], kwargs: dict[str, Any]
        ) -> tuple[tuple[Tensor], dict[str, Any]]:
            kinds = (args[0] == model.config.image_token_id).int()
            inputs = images.get(tuple(args[0][0].tolist()), {})
            return args, kwargs | inputs | {"mm_token_type_ids": kinds}

        model.register_forward_pre_hook(with_images, with_kwargs=True)
    return model.train()


def layers_of(model: Any) -> Any:
    """Return the decoder layers, also of a vision-language model."""
    return getattr(model.model, "language_model", model.model).layers


def saved_tensors(folder: Path) -> dict[str, Tensor]:
    """Return every tensor of a Hugging Face folder by its name in the folder.

    The experts that Qwen3-VL-MoE has in one tensor get a name each, like those of other families.
    """
    found = {
        name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()
    }
    for name in [name for name in found if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        stacked, prefix = found.pop(name), name.rpartition(".")[0]
        kinds = ("gate_proj", "up_proj") if "gate_up" in name else ("down_proj",)
        for expert, tensor in enumerate(stacked):
            for kind, part in zip(kinds, tensor.chunk(len(kinds)), strict=True):
                found[f"{prefix}.{expert}.{kind}.weight"] = part.contiguous()
    return found


def sequence_logprobs(model: Any, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return (L,) log probabilities of the tokens and entropies of their distributions; the first are 0."""
    logps = torch.log_softmax(model(tokens[None]).logits[0] / temperature, -1)[:-1]
    zero = logps.new_zeros(1)
    return torch.cat([zero, logps.gather(1, tokens[1:, None])[:, 0]]), torch.cat(
        [zero, -(logps.exp() * logps).sum(-1)]
    )


def spans(batch: Any) -> list[slice]:
    ends = batch.lengths.cumsum(0).tolist()
    return [slice(end - length, end) for end, length in zip(ends, batch.lengths.tolist(), strict=True)]


def loss_places(mask: Tensor, unit: str) -> list[Tensor]:
    """Return the places of the response tokens of each sequence of the loss: of all, or of a run of them."""
    places = mask.nonzero()[:, 0]
    if unit == "turn":
        return list(places.tensor_split((places.diff() > 1).nonzero()[:, 0] + 1))
    return [places]


def force_routing(model: Any, batch: Any, experts: Tensor) -> None:
    """Route each token of a batch to its row of ``experts`` (L, layers, topk).

    The weights are the softmax over these experts. The sequences must differ. ``layers`` counts all layers of
    the model; layers without experts do not change.
    """
    places = {tuple(batch.tokens[span].tolist()): span for span in spans(batch)}
    running: list[slice] = []
    model.register_forward_pre_hook(lambda _, args: running.append(places[tuple(args[0][0].tolist())]))
    force_experts(model, lambda layer: experts[running[-1], layer].long())


def force_experts(model: Any, experts_of: Callable[[int], Tensor]) -> None:
    """Route the (T,) tokens of each forward pass to ``experts_of(layer)``, (T, topk) int64.

    The weights are the softmax over the chosen experts.
    """

    def replace(layer: int, output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        chosen = experts_of(layer)
        return output[0], output[0].gather(1, chosen).softmax(-1), chosen

    for layer, module in enumerate(layers_of(model)):
        if hasattr(module.mlp, "gate"):
            module.mlp.gate.register_forward_hook(lambda _, __, output, layer=layer: replace(layer, output))


@torch.no_grad()
def own_routing(path: Path, batch: Any, images: ImagesBySequence | None = None) -> Tensor:
    """Return the (L, layers, topk) experts of every token."""
    model = load_float64(path, images)
    routed: list[list[Tensor]] = [[] for _ in layers_of(model)]
    for layer, module in enumerate(layers_of(model)):
        module.mlp.gate.register_forward_hook(
            lambda _, __, output, layer=layer: routed[layer].append(output[2])
        )
    for span in spans(batch):
        model(batch.tokens[span][None])
    return torch.stack([torch.cat(of_layer) for of_layer in routed], 1)


@torch.no_grad()
def router_log_probs(model: Any, batch: Any) -> Tensor:
    """Return (L, MoE layers, experts): the log of each router's distribution for every input token.

    For routers of DeepSeek's kind, the distribution is the sigmoids divided by their sum.
    """
    gates = [module.mlp.gate for module in layers_of(model) if hasattr(module.mlp, "gate")]
    found: list[list[Tensor]] = [[] for _ in gates]

    def note(gate: Any, args: tuple[Tensor], _: Any) -> None:
        logits = args[0].flatten(0, -2) @ gate.weight.T
        weights = logits.sigmoid() if hasattr(gate, "e_score_correction_bias") else logits.exp()
        found[gates.index(gate)].append((weights / weights.sum(-1, keepdim=True)).log())

    hooks = [gate.register_forward_hook(note) for gate in gates]
    for span in spans(batch):
        model(batch.tokens[span][None])
    for hook in hooks:
        hook.remove()
    return torch.stack([torch.cat(of_layer) for of_layer in found], 1)


def router_shift(model: Any, batch: Any, old: Tensor, experts: Tensor) -> Tensor:
    """Return RSPO's gamma of every input token, (L,).

    Args:
        old: ``router_log_probs`` under the old policy.
        experts: (L, layers, topk) experts that the old policy chose.
    """
    return torch.exp(-(router_log_probs(model, batch) - old).gather(2, experts).abs().mean((1, 2)))


@torch.no_grad()
def batch_logprobs(
    path: Path,
    batch: Any,
    temperature: float = 1.0,
    experts: Tensor | None = None,
    images: ImagesBySequence | None = None,
) -> Tensor:
    """Return (L,) float64 log probabilities, which are 0 outside the response mask."""
    model = load_float64(path, images)
    if experts is not None:
        force_routing(model, batch, experts)
    logprobs = torch.cat(
        [sequence_logprobs(model, batch.tokens[span], temperature)[0] for span in spans(batch)]
    )
    return logprobs * batch.response_mask


def batch_loss(
    model: Any,
    batch: Any,
    ref_logprobs: Tensor,
    *,
    loss: str | Callable[[Tensor, Tensor], Tensor],
    clip_low: float,
    clip_high: float,
    kl_coef: float,
    entropy_coef: float,
    temperature: float,
    shift: Tensor | None = None,
    per_token: bool = False,
    unit: str = "episode",
) -> Tensor:
    """Return the loss, computed one sequence after another as the papers define it.

    Args:
        loss: ``gmpo``: -1/N sum_i A_i exp(1/n_i sum_t clip(log pi/pi_old)), with penalties averaged over
            each sequence's tokens, then over sequences.
            ``rspo``: like ``gmpo``, but each ratio is first multiplied by ``shift`` (L,) of the previous
                token.
            ``dapo``: -1/sum_i n_i sum_i sum_t min(r A, clip(r, 1 - low, 1 + high) A), with penalties
                averaged over all tokens.
            A function: (log ratios of the n response tokens, advantage) -> the sequence's term.
        per_token: divide the terms of a function by the number of tokens instead of the number of
            sequences.
        unit: ``turn`` takes each run of response tokens as a sequence i, with the advantage of its episode.
    """
    totals: list[Tensor] = []
    tokens = 0
    for i, span in enumerate(spans(batch)):
        mask = batch.response_mask[span]
        if not mask.any():
            continue
        tokens += int(mask.sum())
        advantage = batch.advantages[i].double()
        logprobs, entropy = sequence_logprobs(model, batch.tokens[span], temperature)
        deltas = logprobs - batch.old_logprobs[span].double()
        off = ref_logprobs[span].double() - logprobs
        penalties = kl_coef * (off.exp() - off - 1) - entropy_coef * entropy
        if shift is not None:
            deltas = deltas + shift[span].log().roll(1)
        for places in loss_places(mask, unit):
            delta, penalty = deltas[places], penalties[places]
            if callable(loss):
                totals.append(loss(delta, advantage) + penalty.mean())
            elif loss in ("gmpo", "rspo"):
                clipped = delta.clamp(max=clip_high) if advantage > 0 else delta.clamp(min=-clip_low)
                totals.append(-advantage * clipped.mean().exp() + penalty.mean())
            else:
                ratio = delta.exp()
                gain = torch.minimum(ratio * advantage, ratio.clamp(1 - clip_low, 1 + clip_high) * advantage)
                totals.append((penalty - gain).sum())
    return torch.stack(totals).sum() / (tokens if per_token or loss == "dapo" else len(totals))


def train(
    path: Path,
    batch: Any,
    steps: int,
    folder: Path,
    *,
    lr: float,
    eps: float,
    clip_grad: float,
    ref_path: Path | None = None,
    temperature: float = 1.0,
    experts: Tensor | None = None,
    min_router_shift: float = 0.0,
    auxiliary: Callable[[list[list[Tensor]]], Tensor] | None = None,
    freeze_router: bool = False,
    images: ImagesBySequence | None = None,
    freeze_vision: bool = False,
    **loss: Any,
) -> dict[str, Any]:
    """Run ``steps`` AdamW steps; return losses, unclipped gradient norms and the weights.

    The weights are saved in ``folder`` and read back. For rspo, the results also contain the routers' shift
    before each step and after the last, relative to the routers before the first step.

    Args:
        auxiliary: makes a term that is added to the loss from the routers' logits, a (tokens, experts)
            tensor for each sequence in a list for each MoE layer. ``losses`` do not contain this term.
    """
    ref_logprobs = batch_logprobs(ref_path or path, batch, temperature, images=images)
    model = load_float64(path, images)
    if freeze_vision:
        model.model.visual.requires_grad_(False)
    if experts is not None:
        force_routing(model, batch, experts)
    gates = [module.mlp.gate for module in layers_of(model) if hasattr(module.mlp, "gate")]
    logits: list[list[Tensor]] = [[] for _ in gates]
    for of_layer, gate in zip(logits, gates, strict=True):
        gate.weight.requires_grad_(not freeze_router)
        gate.register_forward_hook(
            lambda gate, args, _, of=of_layer: of.append(args[0].flatten(0, -2) @ gate.weight.T)
        )
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.999), eps=eps, weight_decay=0.0)
    losses, norms, shifts = [], [], []
    old_routers = None
    if loss["loss"] == "rspo":
        old_routers = router_log_probs(model, batch)
        active = old_routers.topk(model.config.num_experts_per_tok).indices if experts is None else experts
    for _ in range(steps):
        optimizer.zero_grad()
        if old_routers is not None:
            shifts.append(router_shift(model, batch, old_routers, active))
        shift = shifts[-1].clamp(min=min_router_shift) if shifts else None
        for of_layer in logits:
            of_layer.clear()
        value = batch_loss(model, batch, ref_logprobs, temperature=temperature, shift=shift, **loss)
        (value + auxiliary(logits) if auxiliary else value).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), clip_grad)))
        optimizer.step()
        losses.append(value.item())
    if old_routers is not None:
        shifts.append(router_shift(model, batch, old_routers, active))
    model.save_pretrained(folder)
    return {"losses": losses, "norms": norms, "shifts": shifts, "weights": saved_tensors(folder)}
