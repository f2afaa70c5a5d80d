"""The images of a run: their files, their pixel values, and the tokens that the model sees of one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..batch.images import ImageFolder, ImageRef, ImageTokens, PromptImage, digest_of
from ..batch.pixels import PixelReader
from ..config import Config
from ..errors import InputError

if TYPE_CHECKING:
    from ..data.images import ModelImages


@dataclass(frozen=True)
class RunImages:
    """The images of a run.

    Attributes:
        folder: receives every image before a response to it is sampled.
        image_token: id of the tokens of an image.
        merge_size: an image has one token for ``merge_size`` x ``merge_size`` patches.
        processor: the image processor of the model.
        pixels: reads the pixel values of the folder's images.
    """

    folder: ImageFolder
    image_token: int
    merge_size: int
    processor: ModelImages
    pixels: PixelReader

    def keep(self, images: Iterable[PromptImage]) -> None:
        """Write images into the folder unless it has them."""
        for image in images:
            if not self.folder.path(image.ref).exists():
                self.folder.write(image.ref, image.read())

    def take(self, data: bytes) -> StoredImage:
        """Write an image that an environment shows into the folder, and return it.

        Raises:
            InputError: it cannot be decoded, or the processor refuses its size.
        """
        (image,) = self.processor.load([("it", _Held(data))], share=False)
        self.folder.write(image.ref, data)
        return StoredImage(image.ref, self.folder)

    def tokens_of(self, images: Iterable[ImageRef]) -> np.ndarray:
        """Return (I,) int64: the number of tokens of each image."""
        return np.array([image.patches for image in images], np.int64) // self.merge_size**2

    def without_repeats(self, tokens: Sequence[int] | np.ndarray, images: Iterable[ImageRef]) -> np.ndarray:
        """Return the int32 ``tokens`` of a context with one token in the place of each image.

        Raises:
            ValueError: the tokens have more or fewer image tokens than the images.
        """
        ids, sizes = np.asarray(tokens, np.int32), self.tokens_of(images)
        places = np.flatnonzero(ids == self.image_token)
        if len(places) != sizes.sum():
            raise ValueError(f"{len(places)} image tokens for images of {sizes.sum()} tokens")
        kept = ids != self.image_token
        kept[places[sizes.cumsum() - sizes]] = True
        return ids[kept]

    def with_repeats(self, tokens: np.ndarray, images: Iterable[ImageRef], after: int = 0) -> np.ndarray:
        """Return the int32 ``tokens`` with all tokens of each image in the place of its one token.

        Args:
            after: number of image tokens at the start that have been repeated already.

        Raises:
            ValueError: there are more or fewer image tokens than images.
        """
        sizes, places = self.tokens_of(images), np.flatnonzero(tokens == self.image_token)[after:]
        if len(places) != len(sizes):
            raise ValueError(f"{len(places)} image tokens for {len(sizes)} images")
        counts = np.ones(len(tokens), np.int64)
        counts[places] = sizes
        return np.repeat(tokens, counts)


def run_images(cfg: Config, vision: ImageTokens | None) -> RunImages | None:
    """Return the images of a run; None for a model without vision.

    Raises:
        InputError: rollouts are in FP8, which no tower has; or see ``ModelImages``.
    """
    if not vision:
        return None
    if cfg.rollout.quantization != "none":
        raise InputError(
            f"rollout.quantization = {cfg.rollout.quantization!r}: the model has a vision tower, "
            "which is not synced in FP8: set it to 'none'"
        )
    from ..data.images import ModelImages  # with Pillow, which text models do not need

    processor = ModelImages(cfg.model.path, vision, cfg.data.min_pixels, cfg.data.max_pixels)
    folder = ImageFolder(Path(cfg.run_dir) / "images")
    pixels = PixelReader(folder, processor)
    return RunImages(folder, vision.image_token, vision.merge_size, processor, pixels)


@dataclass(frozen=True)
class _Held:
    data: bytes

    def read(self) -> bytes:
        return self.data


@dataclass(frozen=True)
class StoredImage:
    """An image of a prompt, in the folder of another run or of saved rollouts."""

    ref: ImageRef
    folder: ImageFolder

    def read(self) -> bytes:
        """Return the encoded file."""
        return self.folder.path(self.ref).read_bytes()


def copy_images(images: Iterable[ImageRef], source: ImageFolder, target: ImageFolder) -> None:
    """Copy images from one folder to another unless it has them.

    Raises:
        InputError: a file is not the image that its name says.
    """
    for ref in set(images):
        if not target.path(ref).exists():
            data = source.path(ref).read_bytes()
            if digest_of(data) != ref.digest:
                raise InputError(
                    f"{source.path(ref)} is damaged: its content is not that of the image with this name. "
                    "Copy it again"
                )
            target.write(ref, data)
