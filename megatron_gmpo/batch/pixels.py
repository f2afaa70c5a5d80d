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


_Key = tuple[bytes, tuple[int, ...]]
"""The digest and the grid of an image."""


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
        self._cache: OrderedDict[_Key, Tensor] = OrderedDict()  # the last used ones at the end
        self._bytes = 0  # of the cache
        self._lock = threading.Lock()  # each chunk of a model prefetches in a thread of its own

    @property
    def merge_size(self) -> int:
        """Return m: the model has one token for m x m patches."""
        return self._processor.merge_size

    def read(self, digests: Tensor, grids: Tensor) -> Tensor:
        """Return (P, D) fp32: the pixel values of the patches of these images, one after another.

        Args:
            digests: (J, 16) uint8.
            grids: (J, 3) patches in time, height and width.

        Raises:
            FileNotFoundError: the folder does not have an image.
        """
        images = [
            (row.numpy().tobytes(), tuple(grid.tolist())) for row, grid in zip(digests, grids, strict=True)
        ]
        with self._lock:
            missing = [image for image in dict.fromkeys(images) if image not in self._cache]
            if missing:
                with ThreadPoolExecutor(_THREADS, "pixels") as threads:
                    for image, pixels in zip(missing, threads.map(self._pixels, missing), strict=True):
                        self._cache[image] = pixels
                        self._bytes += pixels.nbytes
            for image in images:
                self._cache.move_to_end(image)
            found = [self._cache[image] for image in images]
            while self._bytes > self._cached_bytes:
                self._bytes -= self._cache.popitem(last=False)[1].nbytes
        return torch.cat([torch.empty(0, self._processor.patch_values), *found])

    def _pixels(self, image: _Key) -> Tensor:
        digest, grid = image
        return self._processor.pixels(self._folder.read(digest), grid)
