"""The vision part of a vision-language model: transformers' own tower, its shapes, and where its output goes.

Only runs with such a model import this module.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from transformers import AutoModel

from .family import HFConfig, refuse
from .qwen_vl import mrope_section


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
        return AutoModel.from_config(self.config, attn_implementation="sdpa", trust_remote_code=False)

    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Return the tower's parameters, name -> shape."""
        with torch.device("meta"):
            return {name: tuple(tensor.shape) for name, tensor in self.build().named_parameters()}

    @property
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
