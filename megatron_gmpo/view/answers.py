"""The data of the page by path, for the server and for an exported page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from .curves import curves
from .folder import RunFolder

FOREVER = 2**62


def answer(runs: Sequence[RunFolder], path: str, query: Mapping[str, str] | None = None) -> Any:
    """Return the data at a path.

    The paths are ``state`` (all runs), ``curves`` (all runs; ``?first=..&last=..`` limits the steps),
    ``samples/RUN/STEP``, ``images/RUN/NAME``, ``tokens/RUN/STEP`` and ``tokens/RUN/STEP/SAMPLE``, where RUN
    is the run's position.

    Raises:
        LookupError: there is no such path, run, step, image or sample.
    """
    kind, *parts = path.split("/")
    if kind == "images" and len(parts) == 2:
        return runs[_number(parts[0])].image(parts[1])
    numbers = [_number(text) for text in parts]
    query = query or {}
    match kind, *numbers:
        case ("state",):
            return [run.state() for run in runs]
        case ("curves",):
            first, last = (
                _number(query.get(name, str(end))) for name, end in (("first", 0), ("last", FOREVER))
            )
            for run in runs:
                run.metrics.refresh()
            return curves([run.metrics for run in runs], first, last)
        case ("samples", int(run), int(step)):
            return runs[run].groups(step)
        case ("tokens", int(run), int(step)):
            return runs[run].tokens(step)
        case ("tokens", int(run), int(step), int(number)):
            if (found := runs[run].sample_tokens(step, number)) is not None:
                return found
    raise LookupError(path)


def to_json(found: Any) -> bytes:
    """Return JSON in which figures that are not finite are null."""
    return orjson.dumps(found, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS)


def _number(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise LookupError(text)
    return int(text)
