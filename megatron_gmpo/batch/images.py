"""Images of prompts and samples: names, files, positions of their tokens, and their part of a microbatch.

An image is an encoded file (PNG, JPEG and so on), named by a digest of its content. Only digests and grids
travel between ranks. The pixels of the images that a rank encodes come from the files in the run's folder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from .. import files
from .schema import ranges

DIGEST_BYTES = 16
ROW = np.dtype([("digest", "u1", DIGEST_BYTES), ("grid", "i4", 3)])
"""An image while it travels between ranks: 28 bytes."""
SUFFIXES = (".png", ".jpg", ".webp", ".gif", ".bmp", ".tiff")
"""Suffixes of image files, one for each format that is accepted."""


@dataclass(frozen=True, slots=True)
class ImageRef:
    """The name of an image.

    Attributes:
        digest: blake2b of the encoded file, 16 bytes.
        grid: patches in time, height and width that the model's processor makes of the image. Time is 1.
        suffix: suffix of the file's name, one of ``SUFFIXES``.
    """

    digest: bytes
    grid: tuple[int, int, int]
    suffix: str

    @property
    def name(self) -> str:
        """Return the name of its file."""
        return f"{self.digest.hex()}{self.suffix}"

    @property
    def patches(self) -> int:
        """Return the number of patches; the language model sees one token for merge_size^2 of them."""
        time, height, width = self.grid
        return time * height * width


class ImageTokens(Protocol):
    """The tokens of an image in a vision-language model (``models.vision.VisionDescription``)."""

    @property
    def image_token(self) -> int:
        """Return the id of the tokens of an image."""
        ...

    @property
    def merge_size(self) -> int:
        """Return m: the model has one token for m x m patches."""
        ...


class PromptImage(Protocol):
    """An image of a prompt, which stays in the data set."""

    @property
    def ref(self) -> ImageRef: ...

    def read(self) -> bytes:
        """Return the encoded file."""
        ...


def digest_of(data: bytes) -> bytes:
    """Return the digest that names an encoded file."""
    return blake2b(data, digest_size=DIGEST_BYTES).digest()


@dataclass(frozen=True)
class ImageFolder:
    """A folder that holds every image of a run once, as ``DIGEST.SUFFIX`` with the digest in hexadecimal."""

    folder: Path

    def path(self, ref: ImageRef) -> Path:
        """Return the path of an image."""
        return self.folder / ref.name

    def write(self, ref: ImageRef, data: bytes) -> None:
        """Write an image unless the folder has it. Several processes may write the same one."""
        if not self.path(ref).exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            files.write_new(self.path(ref), data)

    def read(self, digest: bytes) -> bytes:
        """Return the encoded file of an image.

        Raises:
            FileNotFoundError: the folder does not have it.
        """
        for suffix in SUFFIXES:  # digests travel without the suffix
            try:
                return (self.folder / f"{digest.hex()}{suffix}").read_bytes()
            except FileNotFoundError:
                continue
        raise FileNotFoundError(f"{self.folder} has no image {digest.hex()}")


@dataclass
class MicrobatchImages:
    """The images of a microbatch on one context-parallel rank.

    Each distinct image of the microbatch is encoded by one context-parallel rank of a stage. The features are
    concatenated over these ranks, in the order of the ranks.

    Attributes:
        pixels: (P, D) fp32 values of the patches of the J images that this rank encodes; (0, D) without one.
        grids: (J, 3) int64 patches in time, height and width of these images.
        features: number of features of each context-parallel rank, F in all.
        feature_index: (T,) int64 row in the F features of each slot's input token, -1 for tokens of text.
        slots, rows: slots of images and their rows in the F features, each int64, see ``cut``.
    """

    pixels: Tensor
    grids: Tensor
    features: tuple[int, ...]
    feature_index: Tensor
    slots: Tensor | None = None
    rows: Tensor | None = None

    def cut(self, part: int, parts: int) -> MicrobatchImages:
        """Add ``slots`` and ``rows`` of one of several equal parts of the slots; slots count from its start.

        Call it on the host, where a size needs no wait for the device.
        """
        index = self.feature_index.chunk(parts)[part]
        slots = (index >= 0).nonzero()[:, 0]
        return replace(self, slots=slots, rows=index[slots])


def image_rows(images: Sequence[ImageRef]) -> np.ndarray:
    """Return the (I,) ``ROW`` of images."""
    rows = np.zeros(len(images), ROW)
    for row, image in zip(rows, images, strict=True):
        row["digest"], row["grid"] = np.frombuffer(image.digest, np.uint8), image.grid
    return rows


def image_columns(
    tokens: Tensor, response_mask: Tensor, lengths: Tensor, images: Tensor, rows: np.ndarray, of: ImageTokens
) -> dict[str, Tensor]:
    """Return the columns of a ``TrainBatch`` about images, by name.

    A sampled token is text, also if it has the id of an image's tokens.

    Args:
        tokens: (L,) token ids.
        response_mask: (L,) bool, the sampled tokens.
        lengths: (S,) tokens of each sequence.
        images: (S,) number of images of each sequence.
        rows: (I,) ``ROW`` of these images.

    Raises:
        ValueError: see ``rope_positions``.
    """
    grids = torch.from_numpy(rows["grid"].astype(np.int64))
    image_tokens = (tokens == of.image_token) & ~response_mask
    positions, _ = rope_positions(image_tokens, lengths, images, grids, of.merge_size)
    sizes = grids.prod(1) // of.merge_size**2
    starts = image_tokens.nonzero()[:, 0][sizes.cumsum(0) - sizes]
    return {
        "rope_positions": positions,
        "image_counts": images,
        "image_starts": starts - (lengths.cumsum(0) - lengths).repeat_interleave(images),
        "image_grids": grids,
        "image_digests": torch.from_numpy(np.ascontiguousarray(rows["digest"])),
    }


def rope_positions(
    image_tokens: Tensor, lengths: Tensor, images: Tensor, grids: Tensor, merge_size: int
) -> tuple[Tensor, Tensor]:
    """Return the multimodal rotary positions of sequences, equal to ``get_rope_index`` of transformers.

    A token of text has one position, the next free one, in time, height and width. An image takes as many
    positions as its longer side has tokens; its tokens add their row to the first one in height, and their
    column in width.

    Args:
        image_tokens: (L,) bool, the tokens of the sequences that belong to images.
        lengths: (S,) tokens of each sequence.
        images: (S,) number of images of each sequence.
        grids: (I, 3) patches in time, height and width of the images, in the order of their tokens.
        merge_size: an image has one token for ``merge_size`` x ``merge_size`` patches.

    Returns:
        (L, 3) int32 positions, and (S,) int64 deltas: after a sequence, the position of text is its index in
        the sequence plus the delta.

    Raises:
        ValueError: the images of a sequence have another number of tokens than it has ``image_tokens``.
    """
    sides = grids.long() // torch.tensor([1, merge_size, merge_size])
    sizes, places = sides.prod(1), image_tokens.nonzero()[:, 0]
    found, expected = _sums(image_tokens.long(), lengths), _sums(sizes, images)
    if len(wrong := (found != expected).nonzero()):
        at = int(wrong[0])
        raise ValueError(
            f"sequence {at} has {found[at]} image tokens, and its images have {expected[at]} tokens"
        )
    taken = (~image_tokens).long()  # positions that a token takes; of an image, its last token takes all
    taken[places[sizes.cumsum(0) - 1]] = sides[:, 1:].amax(1)
    free = taken.cumsum(0) - taken
    total = _sums(taken, lengths)
    free -= (total.cumsum(0) - total).repeat_interleave(lengths)
    positions = free[:, None].repeat(1, 3)
    at = ranges(torch.zeros_like(sizes), sizes)
    _, height, width = sides.repeat_interleave(sizes, 0).unbind(1)
    positions[places] += torch.stack([at // (height * width), at // width % height, at % width], 1)
    return positions.int(), total - lengths


def _sums(values: Tensor, sizes: Tensor) -> Tensor:
    """Return the sums of consecutive parts of ``values``, of ``sizes`` values each."""
    before = torch.nn.functional.pad(values.cumsum(0), (1, 0))
    ends = sizes.cumsum(0)
    return before[ends] - before[ends - sizes]


def distinct_rows(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the first place of each distinct image in (I,) ``ROW``, and (I,) the number of each row's image.

    A file that is resized to two grids is two images.
    """
    content = np.ascontiguousarray(rows).view(np.uint8).reshape(len(rows), ROW.itemsize)
    _, first, number = np.unique(content, axis=0, return_index=True, return_inverse=True)
    return first, number.reshape(-1)


def patches_of(counts: np.ndarray, rows: np.ndarray) -> Callable[[Sequence[int]], int]:
    """Return a function that returns the patches of the distinct images of some sequences.

    Args:
        counts: (S,) number of images of each sequence.
        rows: (I,) ``ROW`` of these images.
    """
    _, number = distinct_rows(rows)
    patches = rows["grid"].prod(1)
    ends = counts.cumsum()

    def patches_of_distinct(sequences: Sequence[int]) -> int:
        own = [np.arange(ends[i] - counts[i], ends[i]) for i in sequences if counts[i]]
        if not own:
            return 0
        images = np.concatenate(own)
        _, first = np.unique(number[images], return_index=True)
        return int(patches[images[first]].sum())

    return patches_of_distinct
