"""Images in what an environment says: from content parts to files of the run."""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import Sequence
from typing import Any

from ..errors import InputError, one_line
from .environments import EnvironmentFault
from .images import RunImages, StoredImage

Messages = Sequence[dict[str, Any]]


async def with_names(
    messages: Messages, images: RunImages | None
) -> tuple[list[dict[str, Any]], list[StoredImage]]:
    """Write the images of an observation into the run's folder.

    Args:
        messages: the observation's messages; an image part has the encoded file as base64.
        images: the images of the run; None for a model without vision.

    Returns:
        The messages, in which an image part has the name of its file, and the images in order.

    Raises:
        EnvironmentFault: an image cannot be used, or the model has no vision.
    """
    named: list[dict[str, Any]] = []
    taken: list[StoredImage] = []
    for message in messages:
        content = message["content"]
        if not isinstance(content, str):
            parts = []
            for part in content:
                if part["type"] == "image":
                    taken.append(await _taken(part["image"], images))
                    part = {"type": "image", "image": taken[-1].ref.name}
                parts.append(part)
            content = parts
        named.append(message | {"content": content})
    return named, taken


async def _taken(encoded: str, images: RunImages | None) -> StoredImage:
    if not images:
        raise EnvironmentFault("an observation has an image, and the model of model.path has no vision")
    try:
        return await asyncio.to_thread(images.take, base64.b64decode(encoded, validate=True))
    except (InputError, binascii.Error) as error:
        raise EnvironmentFault(
            f"an observation has an image that cannot be used: {one_line(error)}"
        ) from None
