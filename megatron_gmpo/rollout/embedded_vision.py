"""Images in the embedded engine: pixel values, positions, and the places of image tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..batch.images import ImageRef, rope_positions
from .images import RunImages


class EmbeddedVision:
    """Give a transformers vision-language model the images of prompts.

    The first tokens of a prompt that are image tokens belong to its images. A later one was sampled by the
    policy and is text, for transformers too.

    Args:
        model: the model.
        images: the images of the run.
    """

    def __init__(self, model: Any, images: RunImages) -> None:
        self.images = images
        self._places = torch.empty(0, dtype=torch.bool)
        model.model.get_placeholder_mask = self._mask

    def inputs(
        self, ids: Tensor, pad: Tensor, images: Sequence[Sequence[ImageRef]]
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Return what the prefill of D prompts needs.

        Args:
            ids: (D, T) token ids, padded on the left.
            pad: (D, 1) number of empty slots.
            images: the images of each prompt, in the order of their tokens.

        Returns:
            The images' arguments of the model; (3, D, T) positions in time, height and width; (D, 1): the
            position of the token after a prompt is its number of tokens plus this.
        """
        refs = [ref for row in images for ref in row]
        grids = torch.tensor([ref.grid for ref in refs]).view(-1, 3)
        counts = [[int(self.images.tokens_of(row).sum())] for row in images]
        filled = torch.arange(ids.shape[1], device=ids.device) >= pad
        is_image = (ids == self.images.image_token) & filled
        self._places = is_image & (is_image.cumsum(1) <= torch.tensor(counts, device=ids.device))
        flat, deltas = rope_positions(
            self._places[filled].cpu(),
            filled.sum(1).cpu(),
            torch.tensor([len(row) for row in images]),
            grids,
            self.images.merge_size,
        )
        positions = ids.new_zeros(3, *ids.shape)
        positions[:, filled] = flat.T.to(ids)
        arguments = {"pixel_values": self._read(refs), "image_grid_thw": grids} if refs else {}
        arguments = {name: values.to(ids.device) for name, values in arguments.items()}
        return arguments, positions, deltas[:, None].to(ids.device)

    def _read(self, refs: Sequence[ImageRef]) -> Tensor:
        """Return (P, D) pixel values of the images, of which some may be equal."""
        distinct = {ref.digest: ref for ref in refs}
        digests = torch.tensor([list(digest) for digest in distinct], dtype=torch.uint8)
        grids = torch.tensor([ref.grid for ref in distinct.values()])
        pixels = self.images.pixels.read(digests, grids).split(grids.prod(1).tolist())
        of_image = dict(zip(distinct, pixels, strict=True))
        return torch.cat([of_image[ref.digest] for ref in refs])

    def _mask(self, input_ids: Tensor, inputs_embeds: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        """Return the places of images and of videos, as transformers' ``get_placeholder_mask``."""
        images = self._places[..., None].expand_as(inputs_embeds)
        return images, torch.zeros_like(images)
