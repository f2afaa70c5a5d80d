"""Read the pixel values of images from their files."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import torch
from torch import Tensor

from .images import ImageFolder

_CACHED_BYTES = 1 << 30
"""Bytes of pixel values that stay in memory.

The samples of a group share an image, and the passes for old log probabilities and for training read it."""
_THREADS = 4


class ImageProcessor(Protocol):
    """Makes pixel values of encoded files (``data.images.ModelImages``)."""

    @property
    def merge_size(self) -> int:
        """Return m: the model has one token for m x m patches."""
        ...

    @property
    def patch_values(self) -> int:
        """Return D: the number of values of a patch."""
        ...

    def pixels(self, data: bytes, grid: Sequence[int]) -> Tensor:
        """Return (P, D) fp32: the pixel values of an image with these patches in time, height and width."""
        ...


class PixelReader:
    """Reads the pixel values of images, and keeps the last ones in memory.

    Args:
        folder: holds the files of the images.
        processor: the image processor of the model.
        cached_bytes: bytes of pixel values to keep.
    """

    def __init__(
        self, folder: ImageFolder, processor: ImageProcessor, cached_bytes: int = _CACHED_BYTES
    ) -> None:
        self._folder, self._processor, self._cached_bytes = folder, processor, cached_bytes
        self._cache: OrderedDict[bytes, Tensor] = OrderedDict()  # the last used ones at the end
        self._lock = threading.Lock()  # each chunk of a model prefetches in a thread of its own

    @property
    def merge_size(self) -> int:
        """Return m: the model has one token for m x m patches."""
        return self._processor.merge_size

    def read(self, digests: Tensor, grids: Tensor) -> Tensor:
        """Return (P, D) fp32: the pixel values of the patches of these images, one after another.

        Args:
            digests: (J, 16) uint8, without duplicates.
            grids: (J, 3) patches in time, height and width.

        Raises:
            FileNotFoundError: the folder does not have an image.
        """
        names = [row.numpy().tobytes() for row in digests]
        with self._lock:
            missing = {n: g for n, g in zip(names, grids.tolist(), strict=True) if n not in self._cache}
            if missing:
                with ThreadPoolExecutor(_THREADS, "pixels") as threads:
                    pixels = threads.map(self._pixels, missing, missing.values())
                    self._cache.update(zip(missing, pixels, strict=True))
            for name in names:
                self._cache.move_to_end(name)
            found = [self._cache[name] for name in names]
            while self._cache and sum(pixels.nbytes for pixels in self._cache.values()) > self._cached_bytes:
                self._cache.popitem(last=False)
        return torch.cat([torch.empty(0, self._processor.patch_values), *found])

    def _pixels(self, digest: bytes, grid: list[int]) -> Tensor:
        return self._processor.pixels(self._folder.read(digest), grid)
