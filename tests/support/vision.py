"""Prompts with images for tiny vision-language models, and what transformers says of samples with images."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

from megatron_gmpo.batch.images import ImageFolder, ImageRef, digest_of
from megatron_gmpo.batch.samples import Prompt, Sample
from megatron_gmpo.rollout.images import StoredImage

SIZES = ((56, 84), (200, 61), (1000, 333), (30, 30))
"""Width and height of images: near multiples of a patch, shrunk to the processor's maximum, and enlarged."""


def picture(width: int, height: int, seed: int = 0) -> bytes:
    """Return smooth random colours, so that another filter of resizing gives other pixel values.

    The file is a JPEG, a PNG or a partly transparent PNG if ``seed % 3`` is 0, 1 or 2.
    """
    bands = 4 if seed % 3 == 2 else 3
    noise = np.random.default_rng(seed).integers(0, 256, (height // 9 + 2, width // 9 + 2, bands), np.uint8)
    encoded = io.BytesIO()
    image = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
    image.save(encoded, "PNG" if seed % 3 else "JPEG")
    return encoded.getvalue()


@dataclass
class VisionReference:
    """A vision-language model folder as transformers reads it, in fp32.

    Attributes:
        experts: (T, topk) experts of each MoE layer in the last ``logprobs``.
    """

    folder: Path

    def __post_init__(self) -> None:
        self.model: Any = AutoModelForImageTextToText.from_pretrained(self.folder, dtype=torch.float32).eval()
        self.processor: Any = AutoImageProcessor.from_pretrained(self.folder)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(self.folder)
        self.image_token: int = self.model.config.image_token_id
        self.merge_size: int = self.processor.merge_size
        self.experts: list[Tensor] = []
        for layer in self.model.get_decoder().layers:
            if hasattr(layer.mlp, "experts"):
                layer.mlp.experts.register_forward_pre_hook(lambda _, inputs: self.experts.append(inputs[1]))

    def hub_tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the folder."""
        return load_file(self.folder / "model.safetensors")

    def stored(self, data: bytes, folder: Path) -> StoredImage:
        """Write an image into ``folder`` and return it as an image of a prompt."""
        grid = self.processor(Image.open(io.BytesIO(data)), return_tensors="pt")["image_grid_thw"][0].tolist()
        suffix = ".jpg" if data.startswith(b"\xff\xd8") else ".png"
        image = StoredImage(ImageRef(digest_of(data), tuple(grid), suffix), ImageFolder(folder))
        image.folder.write(image.ref, data)
        return image

    def prompt(self, name: str, folder: Path, parts: list[str | bytes]) -> Prompt:
        """Return a prompt of texts and images; the files of the images go into ``folder``."""
        images = [self.stored(part, folder) for part in parts if isinstance(part, bytes)]
        content = [{"type": "image"} if isinstance(p, bytes) else {"type": "text", "text": p} for p in parts]
        messages = [{"role": "user", "content": content}]
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids: list[int] = []
        tokens = iter(image.ref.patches // self.merge_size**2 for image in images)
        for token in self.tokenizer(text)["input_ids"]:
            ids += [token] * (next(tokens) if token == self.image_token else 1)
        return Prompt(name, "", messages=messages, input_ids=ids, images=images)

    def assert_experts(self, sample: Sample) -> None:
        """Check a sample's record of experts, after ``logprobs`` of it."""
        assert sample.routed_experts is not None
        recorded = np.sort(sample.routed_experts)
        chosen = torch.stack([layer.sort().values for layer in self.experts], 1)
        assert np.array_equal(recorded, chosen[:-1].numpy())

    @torch.no_grad()
    def logprobs(self, sample: Sample, folder: Path, temperature: float = 1.0) -> Tensor:
        """Return the log probability of each sampled token after the others, by transformers alone."""
        ids = torch.from_numpy(sample.tokens).long()[None]
        of_image = (ids == self.image_token) & ~torch.from_numpy(sample.response_mask)
        # a sampled token is text, also if it is the image token
        self.model.model.get_placeholder_mask = lambda _, inputs_embeds, **__: (
            of_image[..., None].expand_as(inputs_embeds),
            None,
        )
        given: dict[str, Tensor] = {}
        if sample.images:
            files = [Image.open(ImageFolder(folder).path(image)) for image in sample.images]
            given = dict(self.processor(files, return_tensors="pt"), mm_token_type_ids=of_image.int())
        self.experts.clear()
        logits = self.model(ids, **given).logits[0] / temperature
        logprobs = logits.log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[:, 0]
        return logprobs[torch.from_numpy(sample.response_mask[1:])]
