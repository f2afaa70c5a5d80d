"""A model's image processor, and the images of a data set's rows. Text models do not import this module."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from typing import cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor
from transformers.image_processing_backends import PilBackend
from transformers.image_transforms import convert_to_rgb
from transformers.image_utils import SizeDict
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from ..batch.images import ImageRef, ImageTokens, digest_of
from ..errors import InputError, one_line
from .image_columns import ImageSource

_SUFFIXES = {
    "PNG": ".png",
    "JPEG": ".jpg",
    "WEBP": ".webp",
    "GIF": ".gif",
    "BMP": ".bmp",
    "TIFF": ".tiff",
}
_MOST_PIXELS = Image.MAX_IMAGE_PIXELS or 0
"""Pixels above which Pillow warns of a file that exhausts the memory when it is decoded: 89 million."""
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # such a file is refused here


@dataclass(frozen=True, slots=True)
class DataImage:
    """An image of a prompt; ``read`` reads it from the data set again."""

    ref: ImageRef
    source: ImageSource

    def read(self) -> bytes:
        """Return the encoded file.

        Raises:
            InputError: it is not the file that the run has loaded.
        """
        try:
            data = self.source.read()
        except (OSError, ValueError) as error:
            raise InputError(f"an image of the data cannot be read any more ({one_line(error)})") from None
        if digest_of(data) != self.ref.digest:
            raise InputError(f"an image of the data has changed during the run: {self.source}")
        return data


class ModelImages:
    """The image processor of a model folder, with Pillow's arithmetic on every machine.

    Args:
        path: the model folder.
        tokens: the image tokens of the model.
        min_pixels, max_pixels: limits of an image's pixels; None means the limits of the folder.
        section: section of these limits in the config, for error lines.

    Attributes:
        image_token, merge_size: see ``ImageTokens``.
        patch_values: number of values of a patch.

    Raises:
        InputError: the folder has no processor that can be loaded, or one that does not belong to the model;
            the limits contradict each other.
    """

    def __init__(
        self,
        path: str,
        tokens: ImageTokens,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        section: str = "data",
    ) -> None:
        self._processor = processor = _load(path)
        self.image_token, self.merge_size = tokens.image_token, tokens.merge_size
        if processor.merge_size != tokens.merge_size:
            raise InputError(
                f"model.path = {path!r}: merge_size is {processor.merge_size} in preprocessor_config.json, "
                f"and {tokens.merge_size} in config.json: copy the files of one model"
            )
        self.patch_values = 3 * processor.temporal_patch_size * processor.patch_size**2
        self._limits = (
            min_pixels or processor.size["shortest_edge"],
            max_pixels or processor.size["longest_edge"],
        )
        if self._limits[0] > self._limits[1]:
            raise InputError(
                f"{section}: images have at least {self._limits[0]} pixels and at most {self._limits[1]}: "
                "set min_pixels below max_pixels"
            )

    def grid(self, width: int, height: int) -> tuple[int, int, int]:
        """Return the patches in time, height and width of an image of this size.

        Raises:
            ValueError: the processor refuses the size.
        """
        side = self._processor.patch_size
        low, high = self._limits
        sizes = smart_resize(height, width, side * self.merge_size, min_pixels=low, max_pixels=high)
        return 1, sizes[0] // side, sizes[1] // side

    def pixels(self, data: bytes, grid: Sequence[int]) -> Tensor:
        """Return (P, D) fp32: the pixel values of an encoded image with these patches."""
        processor, side = self._processor, self._processor.patch_size
        image = processor.process_image(_opened(data), do_convert_rgb=True)
        size = SizeDict(height=grid[1] * side, width=grid[2] * side)
        # the processor's own resize() would choose the grid again, with its own limits
        image = PilBackend.resize(processor, image, size, processor.resample)
        found = processor(image, do_resize=False, input_data_format="channels_first", return_tensors="np")
        return torch.from_numpy(found["pixel_values"])

    def tokens(self, ref: ImageRef) -> int:
        """Return the number of tokens of an image."""
        return ref.patches // self.merge_size**2

    def load(self, sources: Iterable[tuple[str, ImageSource]], *, share: bool = True) -> list[DataImage]:
        """Read and check images, in threads.

        Args:
            sources: start of an error line, and place, of each image.
            share: every rank loads these images. Each reads all of them, for digest and size, and decodes its
                share. Without it, this rank decodes all.

        Raises:
            InputError: an image cannot be read or decoded, is too large, or has a size that the processor
                refuses. It names the first such image.
        """
        with ThreadPoolExecutor() as threads:
            return list(threads.map(lambda item: self._loaded(item[0], item[1], share), sources))

    def _loaded(self, where: str, source: ImageSource, share: bool) -> DataImage:
        try:
            data = source.read()
        except FileNotFoundError as error:
            raise InputError(
                f"{where}: the image file {error.filename!r} does not exist: correct the path"
            ) from None
        except (OSError, ValueError) as error:
            raise InputError(f"{where}: an image cannot be read ({one_line(error)}): correct it") from None
        try:
            image = _opened(data)
            if image.width * image.height > _MOST_PIXELS:
                raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
            grid = self.grid(image.width, image.height)
            digest = digest_of(data)
            if not share or digest[0] % _ranks() == _rank():
                image.load()
        except Image.DecompressionBombError as error:
            raise InputError(
                f"{where}: an image is too large ({one_line(error)}): "
                f"shrink it to at most {_MOST_PIXELS} pixels"
            ) from None
        except Exception as error:  # the readers of damaged files raise errors of many kinds
            raise InputError(
                f"{where}: an image cannot be used ({one_line(error)}): give a sound file of one of the "
                f"formats {', '.join(_SUFFIXES)}, whose longer side is at most 200 times the other"
            ) from None
        # Pillow calls a JPEG file with a second picture MPO
        return DataImage(ImageRef(digest, grid, _SUFFIXES.get(image.format or "", ".jpg")), source)


def on_white(data: bytes) -> bytes:
    """Return an encoded image as it is, or as a PNG file on white if it has a transparent colour or alpha.

    Transformers' processors put white behind such an image (image_transforms.py:convert_to_rgb).
    """
    image = _opened(data)
    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return data
    file, colours = BytesIO(), cast(np.ndarray, convert_to_rgb(image, return_numpy=True))
    Image.fromarray(colours).save(file, "PNG", compress_level=1)
    return file.getvalue()


def _opened(data: bytes) -> Image.Image:
    """Return an image whose pixels are not decoded yet."""
    return Image.open(BytesIO(data), formats=tuple(_SUFFIXES))


def _ranks() -> int:
    # of the environment, because data is loaded before the process group starts
    return int(os.environ.get("WORLD_SIZE", "1"))


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _load(path: str) -> Qwen2VLImageProcessorPil:
    try:
        processor = AutoImageProcessor.from_pretrained(path, backend="pil", trust_remote_code=False)
        if not isinstance(processor, Qwen2VLImageProcessorPil):
            raise ValueError(f"{type(processor).__name__} is not the processor of a supported model")
    except Exception as error:  # the readers of processor files raise errors of many kinds
        raise InputError(
            f"model.path = {path!r} has no image processor that can be loaded ({one_line(error)[:200]}): "
            "copy preprocessor_config.json of the model into the folder"
        ) from None
    return processor
