"""The vision part of a vision-language model: transformers' own tower, its shapes, and where its output goes.

Only runs with such a model import this module.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .family import HFConfig, refuse
from .qwen_vl import mrope_section

_ATTENTION = "flash_by_length"
"""Name of ``_attention``. transformers passes boundaries to a function with "flash" in its name only."""


@dataclass(frozen=True)
class VisionDescription:
    """A vision tower and its place in the language model, without tensors.

    Attributes:
        config: transformers' config of the tower.
        whole: transformers' config of the whole model.
        merge_size: side of the square of patches that forms one image token.
        image_token: id of the token at whose places the tower's features enter the language model.
        feature_size: size of a feature, H of the language model.
        deepstack: numbers of the language layers after whose output further features are added, in the order
            of the tower's ``deepstack_features``; () for Qwen2.5-VL.
        mrope_section: number of rotary channel pairs for the positions in time, height and width.
        mrope_interleaved: whether pair 3 i + 1 belongs to the height and pair 3 i + 2 to the width, the rest
            to time (Qwen3-VL), or each section is contiguous (Qwen2.5-VL).
    """

    config: HFConfig
    whole: HFConfig
    merge_size: int
    image_token: int
    feature_size: int
    deepstack: tuple[int, ...]
    mrope_section: tuple[int, ...]
    mrope_interleaved: bool

    def build(self) -> torch.nn.Module:
        """Return transformers' tower with random weights, on torch's default device in its default dtype."""
        config = copy.deepcopy(self.config)  # transformers and the next line change it
        tower = AutoModel.from_config(config, attn_implementation="sdpa", trust_remote_code=False)
        tower.config._attn_implementation = _ATTENTION
        return tower

    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Return the tower's parameters, name -> shape."""
        with torch.device("meta"):
            return {name: tuple(tensor.shape) for name, tensor in self.build().named_parameters()}

    @cached_property
    def numel(self) -> int:
        """Return the number of elements of the tower's parameters."""
        return sum(map(math.prod, self.parameters().values()))


def describe_vision(whole: HFConfig) -> VisionDescription:
    """Return the description of the vision part of a model.

    Raises:
        InputError: config.json requires a computation that this code does not implement.
    """
    config, text = whole.vision_config, whole.get_text_config()
    width, features = config.out_hidden_size, text.hidden_size
    refuse(config, "out_hidden_size", width != features, f"the language model's hidden_size is {features}")
    heads, side = config.num_heads, config.patch_size * config.spatial_merge_size
    refuse(config, "num_heads", config.hidden_size % (4 * heads), "a head needs a multiple of 4 channels")
    is_qwen3 = whole.model_type != "qwen2_5_vl"
    indexes = tuple(config.deepstack_visual_indexes) if is_qwen3 else ()
    least = min(text.num_hidden_layers, config.depth)
    wrong = len({*indexes} & {*range(config.depth)}) < len(indexes) or len(indexes) > least
    refuse(
        config, "deepstack_visual_indexes", wrong, f"there may be {least} different ones below {config.depth}"
    )
    small = not is_qwen3 and config.window_size < side
    refuse(config, "window_size", small, f"an image token has {side} pixels on a side")
    return VisionDescription(
        config=config,
        whole=whole,
        merge_size=config.spatial_merge_size,
        image_token=whole.image_token_id,
        feature_size=features,
        deepstack=tuple(range(len(indexes))),
        mrope_section=tuple(mrope_section(text)),
        mrope_interleaved=is_qwen3,
    )


def _attention(
    _: Any, query: Tensor, key: Tensor, value: Tensor, *, scaling: float, cu_seq_lens_q: Tensor, **__: Any
) -> tuple[Tensor, None]:
    """Return the attention within images or windows, with one kernel for all that have the same length.

    transformers' "sdpa" starts a kernel for each of them. Qwen2.5-VL has a window for every 64 patches.

    Args:
        query, key, value: (1, heads, P, d).
        cu_seq_lens_q: boundaries of the images or windows in the P patches.

    Returns:
        (1, P, heads, d), and no weights.
    """
    lengths = cu_seq_lens_q.diff()
    order = lengths.repeat_interleave(lengths, output_size=query.shape[2]).argsort(stable=True)
    sizes, counts = (values.tolist() for values in lengths.unique(return_counts=True))
    taken = [size * count for size, count in zip(sizes, counts, strict=True)]
    parts = [x[0].index_select(1, order).split(taken, 1) for x in (query, key, value)]
    found: list[Tensor] = []
    for count, *inputs in zip(counts, *parts, strict=True):
        batch = [x.unflatten(1, (count, -1)).transpose(0, 1) for x in inputs]
        out = torch.nn.functional.scaled_dot_product_attention(*batch, scale=scaling)
        found.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(found).index_select(0, order.argsort())[None], None


ALL_ATTENTION_FUNCTIONS.register(_ATTENTION, _attention)
