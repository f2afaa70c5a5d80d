"""GPTModel with transformers' vision tower: features of images, deepstack, and multimodal rotary positions.

The tower is on the first pipeline stage, equal on all tensor-parallel ranks. The features of deepstack layers
on later stages travel there behind the hidden states. A layer gets what it needs of a microbatch through its
arguments, ``MultimodalPacking`` and ``context``, because several microbatches are in flight in a pipeline,
and recomputation runs a layer again later.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from ..batch.images import MicrobatchImages
from .attention import Packing
from .vision import VisionDescription


@dataclass
class MultimodalPacking(Packing):
    """Packed sequences, the rotation of their slots and their slots of images.

    Attributes:
        rotation: cosines and sines of the rotary angles of this rank's slots, each (T, 1, head_dim).
        slots: (F,) int64 rows of the hidden states on this rank that belong to images.
    """

    rotation: tuple[Tensor, Tensor] | None = None
    slots: Tensor | None = None


class VisionLanguageModel(GPTModel):
    """A chunk of a vision-language model.

    Args:
        config: the config of the language model.
        layers: its layer spec.
        vision: the tower, and how the language model uses it.
        options: those of ``GPTModel``.

    Attributes:
        visual: the tower, on the first stage only. ``requires_grad_`` trains it.
    """

    visual: Any
    rotary_axes: Tensor
    rotary_frequencies: Tensor

    def __init__(self, config: Any, layers: Any, vision: VisionDescription, **options: Any) -> None:
        super().__init__(config, layers, position_embedding_type="none", **options)
        decoder: Any = self.decoder
        numbers: list[int] = [layer.layer_number - 1 for layer in decoder.layers]
        self._num_features = 1 + len(vision.deepstack)
        # features of deepstack layers that enter this chunk, and that leave it
        waiting = [layer for layer in vision.deepstack if layer >= numbers[0]]
        self._leaving = sum(layer > numbers[-1] for layer in waiting)
        self._entering = len(waiting)
        for number, layer in zip(numbers, decoder.layers, strict=True):
            layer.self_attention.core_attention.register_forward_pre_hook(_rotate, with_kwargs=True)
            if number in waiting:
                add = partial(_add_features, waiting.index(number))
                layer.register_forward_hook(add, with_kwargs=True)
        axes = rotary_axes(vision.mrope_section, interleaved=vision.mrope_interleaved)
        pairs = torch.arange(0, config.kv_channels, 2, dtype=torch.float32) / config.kv_channels
        self.register_buffer("rotary_axes", torch.tensor(axes), persistent=False)
        self.register_buffer("rotary_frequencies", 1 / self.rotary_base**pairs, persistent=False)
        if self.pre_process:
            self.visual = vision.build().requires_grad_(False)
            for parameter in self.visual.parameters():
                parameter.data = parameter.data.to(config.params_dtype)  # buffers stay in fp32
                # each rank has the gradients of the features in its part of the slots; Megatron adds them
                parameter.sequence_parallel = config.sequence_parallel

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None,
        *,
        packed_seq_params: Packing,
        images: MicrobatchImages | None = None,
    ) -> Tensor:
        """Return the chunk's output for the T slots of this context-parallel rank, see ``GPTModel``.

        Args:
            input_ids: (1, T).
            position_ids: (3, 1, T) positions in time, height and width, or (1, T) positions of text.
            attention_mask: None, because ``packed_seq_params`` delimits the sequences.
            packed_seq_params: the sequences.
            images: the images of the microbatch; None if no rank has one.
        """
        slots, rows = self._places(images, input_ids.device)
        embedded = features = None
        decoder: Any = self.decoder
        language: Any = super().forward
        if self.pre_process:
            embedded = self.embedding(input_ids=input_ids, position_ids=None)
            if images is not None or self._trains_tower:
                features = self._encoded(images)[rows].to(
                    embedded.dtype
                )  # fp32 with fp32_residual_connection
                embedded = embedded.index_copy(0, slots, features[:, :1])
                features = features[:, 1:]
        elif self._entering:
            hidden, features = _unstacked(decoder.input_tensor, len(slots), self._entering)
            decoder.set_input_tensor(hidden)
        output = language(
            input_ids,
            position_ids,
            attention_mask,
            decoder_input=embedded,
            packed_seq_params=MultimodalPacking(
                **vars(packed_seq_params), rotation=self._rotation(position_ids), slots=slots
            ),
            extra_block_kwargs={"context": features if self._entering else None},
        )
        if features is not None and self._leaving:
            return torch.cat([output, features[:, -self._leaving :].flatten(0, 1)[:, None]])
        return output

    @property
    def _trains_tower(self) -> bool:
        return any(parameter.requires_grad for parameter in self.visual.parameters())

    def _places(self, images: MicrobatchImages | None, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the rows of this rank's hidden states that belong to images, and those of the features."""
        if images is None:
            none = torch.zeros(0, dtype=torch.int64, device=device)
            return none, none
        assert images.slots is not None
        assert images.rows is not None
        return images.slots, images.rows

    def _rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        positions = positions.expand(3, 1, -1)[:, 0].T
        angles = positions[:, self.rotary_axes].float() * self.rotary_frequencies
        angles = angles.repeat(1, 2)[:, None]
        return angles.cos().to(self.config.params_dtype), angles.sin().to(self.config.params_dtype)

    def _encoded(self, images: MicrobatchImages | None) -> Tensor:
        """Return the features of the images of all context-parallel ranks, (F, 1 + deepstack layers, H).

        A trained tower also runs on a rank without images, on one image that is then left out. So every rank
        computes the gradients of all parameters in the same order. In this order the ranks reduce gradients
        (overlap_grad_reduce) and gather weights (overlap_param_gather); in different orders they would hang.
        """
        if images is not None and len(images.grids):
            features = self._features(images.pixels, images.grids)
        elif self._trains_tower:
            features = self._features(*self._blank())[:0]
        else:
            hidden, dtype = self.config.hidden_size, self.config.params_dtype
            features = self.rotary_frequencies.new_zeros(0, self._num_features, hidden, dtype=dtype)
        cp = self.pg_collection.cp
        if images is None or cp.size() == 1:
            return features
        # the backward pass adds the gradients of all ranks
        sizes = list(images.features)
        return gather_from_sequence_parallel_region(features, group=cp, output_split_sizes=sizes)

    def _features(self, pixels: Tensor, grids: Tensor) -> Tensor:
        found = self.visual(pixels, grid_thw=grids)
        return torch.stack([found.pooler_output, *(getattr(found, "deepstack_features", None) or ())], 1)

    def _blank(self) -> tuple[Tensor, Tensor]:
        """Return pixels and grid of the smallest image, of one feature."""
        side, weight = self.visual.spatial_merge_size, self.visual.patch_embed.proj.weight
        grid = torch.tensor([[1, side, side]], device=weight.device)
        return weight.new_zeros(side**2, weight[0].numel()), grid


def rotary_axes(sections: tuple[int, ...], *, interleaved: bool) -> list[int]:
    """Return the axis of the positions (0 time, 1 height, 2 width) that rotates each pair of channels.

    Source: ``recomposition_frequencies`` in modeling_qwen2_5_vl.py and modeling_qwen3_vl.py of transformers.

    Args:
        sections: number of pairs of each axis.
        interleaved: the axes alternate while they last, and time has the rest. Otherwise each axis has
            consecutive pairs.
    """
    if not interleaved:
        return [axis for axis, pairs in enumerate(sections) for _ in range(pairs)]
    axes = [0] * sum(sections)
    for axis in (1, 2):
        axes[axis : 3 * sections[axis] : 3] = [axis] * sections[axis]
    return axes


def _rotate(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Rotate the queries and keys that enter a core attention, each (T, heads, head_dim).

    Megatron's own rotation of packed sequences waits for the device for every sequence
    (rope_utils.py:_apply_rotary_pos_emb_thd), and its fused kernel has one position per slot only.
    """
    query, key, *others = args
    cos, sin = kwargs["packed_seq_params"].rotation

    def rotated(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin

    return (rotated(query), rotated(key), *others), kwargs


def _add_features(
    place: int, _: Any, __: tuple[Any, ...], kwargs: dict[str, Any], output: tuple[Tensor, Tensor | None]
) -> tuple[Tensor, Tensor | None]:
    """Add the deepstack features to a layer's output: column ``place`` of its ``context``, (F, layers, H)."""
    hidden, features = output
    if features is None:
        return output
    return hidden.index_add(0, kwargs["packed_seq_params"].slots, features[:, place, None]), features


def _unstacked(received: Tensor, slots: int, layers: int) -> tuple[Tensor, Tensor]:
    """Split the rows that a stage received into hidden states (T, 1, H) and features (slots, layers, H)."""
    rows = slots * layers
    hidden, features = received.split([len(received) - rows, rows])
    return hidden, features.view(slots, layers, received.shape[-1])
