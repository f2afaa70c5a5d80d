"""The transformers model of the embedded engine, and its tensors by their names on the hub."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from ..config import Config
from ..errors import InputError
from ..models.description import DTYPES
from ..models.fp32_head import fp32_product
from ..models.hub import hub_names


def check_embedded_fits(cfg: Config, parameters: int, world_size: int, memory: int, *, train: bool) -> None:
    """Check that the embedded engine's whole model has room beside this rank's share of the policy.

    The share is the smallest one possible: an equal part of the weights and, for training, of fp32 gradients,
    main weights and moments. ``megatron-gmpo plan`` counts what the layout really needs.

    Args:
        parameters: elements of the model.
        memory: bytes of a GPU.
    """
    engine = parameters * DTYPES[cfg.rollout.dtype or cfg.model.dtype].itemsize
    per_parameter = DTYPES[cfg.model.dtype].itemsize + (4 + 12 if train else 0)
    share = parameters * per_parameter // world_size
    if engine + share > memory:
        raise InputError(
            f"rollout.engine = 'embedded' holds the whole model on each GPU: {engine / 2**30:.1f} GiB and at "
            f"least {share / 2**30:.1f} GiB of the policy, do not fit into {memory / 2**30:.1f}: use 'sglang'"
        )


def load_model(
    path: str, dtype: torch.dtype, device: torch.device | str, *, fp32_head: bool, vision: bool
) -> Any:
    """Return the frozen model of a folder.

    Args:
        fp32_head: compute the logits of a bf16 model in fp32, see ``fp32_product``.
        vision: load a vision-language model with its tower.
    """
    auto_class: Any = AutoModelForCausalLM
    if vision:
        from transformers import AutoModelForImageTextToText  # not for text models

        auto_class = AutoModelForImageTextToText
    model = auto_class.from_pretrained(path, dtype=dtype, trust_remote_code=False, attn_implementation="sdpa")
    model = model.to(device).eval().requires_grad_(False)
    if fp32_head and dtype == torch.bfloat16:
        head = model.get_output_embeddings()
        head.forward = partial(_fp32_logits, head)
    return model


def weight_slots(model: Any) -> dict[str, Tensor]:
    """Return the model's tensors by their names in the Hugging Face checkpoint.

    Transformers stacks routed experts; their entries are views of the stack. Tied weights have one entry,
    under their first name, like in checkpoints.
    """
    slots: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in model.state_dict(keep_vars=True).items():
        if id(value) in seen:
            continue
        seen.add(id(value))
        names = hub_names(name, model.config.model_type)
        if "{e}" not in names[0]:
            slots[names[0]] = value
            continue
        for e, expert in enumerate(value):
            slots |= {
                part.format(e=e): slot for part, slot in zip(names, expert.chunk(len(names)), strict=True)
            }
    return slots


def tower_names(names: Iterable[str]) -> list[str]:
    """Return the names of the vision tower's tensors."""
    return [name for name in names if name.removeprefix("model.").startswith("visual.")]


def _fp32_logits(head: torch.nn.Linear, hidden: Tensor) -> Tensor:
    """Return (B, T, V) fp32 logits of (B, T, H) bf16 hidden states."""
    return fp32_product(hidden.flatten(0, 1), head.weight.T).view(*hidden.shape[:2], -1)
