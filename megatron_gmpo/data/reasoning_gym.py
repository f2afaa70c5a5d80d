"""Problems of the reasoning-gym package: ``data.path = "reasoning_gym:chain_sum?min_terms=2&seed=1"``.

Some generators iterate over sets, whose order depends on the process's hash seed. Rows are therefore made in
a process with a fixed hash seed, so that all ranks and a resumed run have the same problems.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any, get_type_hints
from urllib.parse import parse_qsl

from pydantic import TypeAdapter

from ..config.values import parse_value, parse_words
from ..errors import InputError, one_line
from ..plugins import check_installed, nearest

PREFIX = "reasoning_gym:"
INSTALL = "run pip install -e '.[reasoning]'"
_GENERATION_S = 3600.0
"""Seconds within which the rows of a data set must be made."""


def open_data_set(source: str, field: str) -> Any:
    """Return the data set that ``source`` names, such as ``"chain_sum?min_terms=2&size=500&seed=1"``.

    The arguments are the fields of the data set's config in reasoning-gym. Unlike there, ``seed`` is 0 if it
    is not given.

    Returns:
        A ``reasoning_gym.dataset.ProceduralDataset``: entries by index, and ``score_answer(answer, entry)``.

    Raises:
        InputError: the package is not installed; a data set or an argument is unknown (the line names the
            nearest), or a value is not accepted. ``field`` starts the line.
    """
    check_installed(field, "reasoning_gym", INSTALL)
    from reasoning_gym.factory import DATASETS, create_dataset

    name, _, query = source.partition("?")
    # a composite data set is made from others; data.files names several
    known = sorted(set(DATASETS) - {"composite"})
    if name not in known:
        raise InputError(f"{field}: {name!r} is no data set: did you mean {nearest(name, known)!r}?")
    kinds = get_type_hints(DATASETS[name][1])
    values: dict[str, Any] = {"seed": 0}
    for key, text in parse_qsl(query, keep_blank_values=True):
        if key not in kinds:
            raise InputError(
                f"{field}: {name} has no argument {key!r}: did you mean {nearest(key, kinds)!r}?"
            )
        values[key] = _value(f"{field}: {key}", kinds[key], text)
    try:
        return create_dataset(name, **values)
    except Exception as error:  # configs assert, and constructors raise errors of many types
        raise InputError(f"{field}: {name} refuses its arguments ({one_line(error)}): correct them") from None


def _value(field: str, kind: Any, text: str) -> Any:
    """Return the value of an argument: text and numbers as they are, lists as ``["a","b"]``."""
    if isinstance(kind, type) and issubclass(kind, Enum):
        return parse_value(field, TypeAdapter(kind), text)
    return parse_value(field, TypeAdapter(kind), parse_words(Any, text) if text[:1] in "[{" else text)


def records(source: str, field: str) -> Iterator[dict[str, str]]:
    """Yield the problems of a data set; ``source`` starts with ``PREFIX``.

    Yields:
        ``problem``: the question. ``answer``: JSON with ``answer`` (text, or null if the scorer needs none),
        ``data_set`` (the source without the prefix) and ``index``, from which the reward ``reasoning_gym``
        makes the entry again.

    Raises:
        InputError: see ``open_data_set``; the generator fails.
    """
    name = source.removeprefix(PREFIX)
    open_data_set(name, field)
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", __name__, name],
            env=os.environ | {"PYTHONPATH": path, "PYTHONHASHSEED": "0"},
            capture_output=True,
            text=True,
            timeout=_GENERATION_S,
        )
    except subprocess.TimeoutExpired:
        raise InputError(
            f"{field} was not generated within {_GENERATION_S:.0f} s: give a smaller size"
        ) from None
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise InputError(f"{field} cannot be generated ({reason}): change its arguments")
    for line in done.stdout.splitlines():
        yield json.loads(line)


def main() -> None:
    """Print the records of the data set ``sys.argv[1]``, a line of JSON each."""
    (source,) = sys.argv[1:]
    out = sys.stdout
    sys.stdout = sys.stderr  # what generators print is no record
    data_set = open_data_set(source, source)
    for index in range(len(data_set)):
        entry = data_set[index]
        answer = {"answer": entry["answer"], "data_set": source, "index": index}
        print(json.dumps({"problem": entry["question"], "answer": json.dumps(answer)}), file=out)


if __name__ == "__main__":
    main()
