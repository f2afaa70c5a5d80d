"""Run a vision tower on images of tensors without memory, like ``dry_run`` runs the language model."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.vision_utils import (
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
)

from .fused import fused_attention
from .observer import Observer

_ATTENTION = "dry_run"


def encode(tower: Any, images: int, image_tokens: int, observer: Observer) -> Tensor:
    """Encode images and return their features, (tokens, H), with those of deepstack layers behind each other.

    Args:
        tower: transformers' vision tower on the meta device.
        images: number of images.
        image_tokens: least number of image tokens of each; the image is about as high as wide.
        observer: counts the FLOPs of the attention, which is fused as on a GPU.
    """
    ALL_ATTENTION_FUNCTIONS.register(_ATTENTION, partial(_attention, observer))
    tower.config._attn_implementation = _ATTENTION
    merge, weight = tower.spatial_merge_size, tower.patch_embed.proj.weight
    height = math.isqrt(image_tokens) or 1
    width = -(-image_tokens // height)
    # a tower computes with the values of the grids, which are on the host therefore
    grids = torch.tensor([[1, merge * height, merge * width]] * images)
    inputs = {"position_ids": get_vision_position_ids(grids, merge)}
    if hasattr(tower, "pos_embed"):
        inputs["interp_indices"], inputs["interp_weights"] = get_vision_interpolation_indices_and_weights(
            grids,
            num_grid_per_side=tower.num_grid_per_side,
            mode=tower.interpolation_mode,
            align_corners=tower.interpolation_align_corners,
            spatial_merge_size=merge,
        )
    patches = torch.empty(int(grids.prod(1).sum()), weight[0].numel(), device=weight.device)
    found = tower(patches, grid_thw=grids, **{name: x.to(weight.device) for name, x in inputs.items()})
    return torch.cat([found.pooler_output, *(getattr(found, "deepstack_features", None) or ())])


def _attention(
    observer: Observer, _: Any, query: Tensor, key: Tensor, value: Tensor, **__: Any
) -> tuple[Tensor, None]:
    """Return the output (1, L, heads, d) of bidirectional attention over (1, heads, L, d), and no weights."""
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    length, heads, dim = query.shape
    out = fused_attention(query, key, value, observer, flops=4 * length**2 * heads * dim)
    return out.view(1, length, heads, dim), None
