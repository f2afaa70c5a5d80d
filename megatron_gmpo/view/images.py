"""The images of a run, from the folder ``images`` of its run folder alone."""

from __future__ import annotations

import base64
import os
import re
from pathlib import Path

MAX_BYTES = 8 * 2**20
"""Number of bytes above which an image is not shown."""

_NAME = re.compile(r"[0-9a-f]{32}\.[a-z0-9]{1,5}")
_FORMATS = {
    "png": re.compile(rb"\x89PNG\r\n\x1a\n"),
    "jpeg": re.compile(rb"\xff\xd8\xff"),
    "gif": re.compile(rb"GIF8[79]a"),
    "webp": re.compile(rb"RIFF....WEBP", re.DOTALL),
}


def data_url(folder: Path, name: str) -> str:
    """Return the image ``name`` of a run's folder as a ``data:`` URL.

    Its type is what its first bytes say, whatever its name says.

    Raises:
        LookupError: ``name`` is no name of an image, the file is missing, a link or larger than
            ``MAX_BYTES``, or it is not one of the formats that every browser shows.
    """
    if not _NAME.fullmatch(name):
        raise LookupError(f"image {name!r}")
    try:
        with open(folder / name, "rb", opener=_no_link) as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise LookupError(f"image {name} ({error.strerror})") from None
    kind = next((kind for kind, start in _FORMATS.items() if start.match(content)), None)
    if kind is None or len(content) > MAX_BYTES:
        raise LookupError(f"image {name} of a kind and a size that the page shows")
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _no_link(path: str, flags: int) -> int:
    # a pipe would wait for a writer
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)
