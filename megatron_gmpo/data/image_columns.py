"""Where the images of a data set's rows are. An image is read when it is needed, and not kept."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import datasets
import pyarrow as pa
from pyarrow.compute import list_value_length  # pyright: ignore[reportAttributeAccessIssue]

from ..errors import InputError

_BATCH = 1000
_IMAGES = "bytes or paths of image files, images of the datasets library, or lists of these"


class ImageSource(Protocol):
    """A place of an encoded file."""

    def read(self) -> bytes:
        """Return the encoded file; raise OSError if it cannot be read, ValueError if there is none."""
        ...


@dataclass(frozen=True, slots=True)
class ImageFile:
    """An image in a file of its own."""

    path: Path

    def read(self) -> bytes:
        return _content(self.path)


@dataclass(frozen=True, slots=True)
class ArrowImage:
    """An image in a row of a memory-mapped table.

    Attributes:
        column: the column of images, in Arrow format.
        row: number of the row.
        place: place of the image in the row's list; None if the row has no list.
        folder: folder of relative paths.
    """

    column: datasets.Dataset
    row: int
    place: int | None
    folder: Path

    def read(self) -> bytes:
        row: Any = self.column[self.row]
        cell = row.column(0)[0]
        value = (cell if self.place is None else cell[self.place]).as_py()
        if isinstance(value, dict):
            value = value["bytes"] or value["path"]
        if not value:
            raise ValueError("it is empty")
        return value if isinstance(value, bytes) else _content(self.folder / value)


def sources_of(value: Any, folder: Path, where: str, column: str) -> tuple[ImageSource, ...]:
    """Return the images of a row that a text file holds: a path, a list of paths, or nothing.

    Args:
        where: start of an error line about the row.

    Raises:
        InputError: the value is something else.
    """
    if isinstance(value, tuple):  # of ``arrow_images``
        return value
    paths = value if isinstance(value, list) else [] if value in (None, "") else [value]  # "" in CSV
    for path in paths:
        if not isinstance(path, str) or not path:
            raise InputError(
                f"{where}: column {column!r} holds {str(path)[:80]!r}, not the path of an image file"
            )
    return tuple(ImageFile(folder / path) for path in paths)


def arrow_images(rows: datasets.Dataset, column: str, folder: Path) -> Iterator[tuple[ImageSource, ...]]:
    """Yield the images of each row, without reading them.

    Raises:
        ValueError: the column has a type that holds no images.
    """
    images = rows.select_columns([column]).with_format("arrow")
    kind = images.data.schema.field(column).type
    several = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    item = kind.value_type if several else kind
    if not (_is_file(item) or (pa.types.is_struct(item) and {"bytes", "path"} == {f.name for f in item})):
        raise ValueError(f"column {column!r} has the type {kind}, not {_IMAGES}")
    row = 0
    tables: Any = images.iter(_BATCH)
    for table in tables:
        cells = table.column(0)
        counts = list_value_length(cells) if several else cells.is_valid()
        for count in counts.to_pylist():
            places = range(count or 0) if several else [None] * count
            yield tuple(ArrowImage(images, row, place, folder) for place in places)
            row += 1


def _content(path: Path) -> bytes:
    """Return the content of a regular file; a data set may name a pipe or a device, which has no end."""
    with open(path, "rb", opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError(f"{str(path)!r} is no regular file")
        return file.read()


def _is_file(kind: pa.DataType) -> bool:
    return any(
        of_kind(kind)
        for of_kind in (
            pa.types.is_binary,
            pa.types.is_large_binary,
            pa.types.is_string,
            pa.types.is_large_string,
        )
    )
