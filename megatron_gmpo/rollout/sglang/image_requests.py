"""Prompts with images: the options of the servers, and what a request carries.

SGLang 0.5.23 takes token ids with images. It puts the tokens of an image in the place of each image token of
``input_ids`` and leaves the other ids as they are, if its cache of preprocessed images is on
(multimodal/processors/qwen_vl.py:process_mm_data_async). Without it, it decodes Qwen2.5-VL's prompt and
encodes the text again.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ...batch.images import PromptImage
from ...config import Config
from ...errors import InputError
from ..images import RunImages
from ..response import Context
from .servers import Server

TOWER = "visual."
"""Beginning of SGLang's names of the vision tower's weights."""
PREPROCESSED_MB = 256
"""Size of a server's cache of preprocessed images: the samples of a group send the same ones."""
_READING = ("image_processor_backend", "mm_process_config", "enable_precise_embedding_interpolation")
"""Options that change the values of an image."""
KEPT_BYTES = 256 << 20
"""Largest total size of the ``data:`` URLs that a client keeps ready to send."""


def image_options(cfg: Config, device: torch.device) -> dict[str, Any]:
    """Return the options of servers of a vision-language model; none for a model without vision.

    The servers' images then have the pixel values of the trainer's: transformers' processor with Pillow, for
    images of the same size. Qwen3-VL's positions of patches are interpolated as transformers does.
    """
    config = Path(cfg.model.path) / "config.json"
    if not config.is_file() or "vision_config" not in json.loads(config.read_text()):
        return {}
    options: dict[str, Any] = {
        "enable_multimodal": True,
        "image_processor_backend": "pil",
        "mm_process_config": {"image": {"size": image_size(cfg)}},
        "mm_preprocess_cache_size_mb": PREPROCESSED_MB,
        "enable_precise_embedding_interpolation": True,
    }
    return options if device.type == "cuda" else options | {"mm_attention_backend": "sdpa"}


def image_size(cfg: Config) -> dict[str, int]:
    """Return the limits of an image's pixels, as the processor takes them."""
    from transformers import AutoImageProcessor  # imports Pillow

    processor: Any = AutoImageProcessor.from_pretrained(
        cfg.model.path, backend="pil", trust_remote_code=False
    )
    size = {"shortest_edge": processor.size["shortest_edge"], "longest_edge": processor.size["longest_edge"]}
    if cfg.data.min_pixels:
        size["shortest_edge"] = cfg.data.min_pixels
    if cfg.data.max_pixels:
        size["longest_edge"] = cfg.data.max_pixels
    return size


def check_image_limits(cfg: Config) -> None:
    """Check that all data sets have the same limits of images, because a server has one.

    Raises:
        InputError: a benchmark has other limits than the training data.
    """
    for name, benchmark in cfg.eval.sets.items():
        for field in ("min_pixels", "max_pixels") if benchmark.image_column else ():
            value, expected = getattr(benchmark, field), getattr(cfg.data, field)
            if value != expected:
                raise InputError(
                    f"eval.sets.{name}.{field} = {value!r}: SGLang's servers resize all images alike, so it "
                    f"must be data.{field} = {expected!r}"
                )


def check_serves_images(cfg: Config, servers: Sequence[Server], device: torch.device) -> None:
    """Check that running servers were started with ``image_options``.

    Raises:
        InputError: an option of a server differs.
    """
    wanted = image_options(cfg, device)
    for server in servers if wanted else ():
        found = server.info()
        for name in _READING:
            if found.get(name) != wanted[name]:
                raise InputError(
                    f"{server.url} has {name} = {found.get(name)!r}, and images would differ from the "
                    f"trainer's: start it with {wanted[name]!r}"
                )
        if not found.get("mm_preprocess_cache_size_mb"):
            raise InputError(
                f"{server.url} would preprocess an image for each sample: start it with "
                f"--mm-preprocess-cache-size-mb {PREPROCESSED_MB}"
            )


class ImageRequests:
    """Make the parts of requests that carry prompts with images."""

    def __init__(self, images: RunImages) -> None:
        self.images = images
        self._ready: dict[bytes, asyncio.Task[str]] = {}  # in the order of their last use
        self._bytes = 0  # of the URLs in it

    async def of(self, context: Context) -> dict[str, Any]:
        """Keep the images of a context in the run's folder, and return ``input_ids`` and ``image_data``."""
        data = [await asyncio.shield(self._encoded(image)) for image in context.images]
        ids = self.images.without_repeats(context.tokens, [image.ref for image in context.images])
        return {"input_ids": ids, "image_data": data}

    def _encoded(self, image: PromptImage) -> asyncio.Task[str]:
        """Return the task that keeps an image and gives its ``data:`` URL; one for all samples of a group."""
        digest = image.ref.digest
        self._ready[digest] = task = self._ready.pop(digest, None) or asyncio.create_task(self._keep(image))
        return task

    async def _keep(self, image: PromptImage) -> str:
        """Return the ``data:`` URL, and drop the URLs that were used least recently beyond ``KEPT_BYTES``."""
        try:
            url = await asyncio.to_thread(self._load, image)
        except BaseException:
            del self._ready[image.ref.digest]  # the next request tries again
            raise
        self._bytes += len(url)
        for digest, task in list(self._ready.items()):
            if self._bytes <= KEPT_BYTES:
                break
            if task.done():
                self._bytes -= len(task.result())
                del self._ready[digest]
        return url

    def _load(self, image: PromptImage) -> str:
        from ...data.images import on_white  # with Pillow, which text models do not need

        self.images.keep([image])
        # SGLang would drop the alpha channel (multimodal/processors/base_processor.py:_load_single_item)
        content = on_white(self.images.folder.path(image.ref).read_bytes())
        if image.ref.suffix == ".jpg":
            # a byte after the end of a JPEG: with a GPU, SGLang decodes it in another way unless it ends with
            # its own last bytes (utils/common.py:is_jpeg_with_cuda)
            content += b"\0"
        kind = image.ref.suffix[1:].replace("jpg", "jpeg")
        return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
