"""Limits of a fuzzed input, and hypothesis strategies that change valid files a little.

A small change lets the input get deep into its reader. ``changed_trees`` changes values, keys and nesting of
a tree that JSON or TOML can describe. ``damaged`` cuts the written file and changes its bytes.
"""

from __future__ import annotations

import copy
import functools
import json
import logging
import resource
import signal
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import psutil
import tomli_w
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from megatron_gmpo.errors import InputError
from megatron_gmpo.testing import AnyFamily
from megatron_gmpo.testing.tiny_models import make_tiny_model

CPU_S, MEMORY_BYTES = 10.0, 10**9
Tree = dict[str, Any]
Draw = Callable[[st.SearchStrategy[Any]], Any]


def inputs(count: int) -> settings:
    """Return the settings of a test with ``count`` inputs, the same in every run.

    With the profile of ``make fuzz``, which asks for more examples than hypothesis' 100, there are
    proportionally more inputs, and they are new in every run.
    """
    usual: Any = settings.default
    times = max(1, usual.max_examples // 100)
    return settings(
        max_examples=count * times,
        derandomize=times == 1,
        database=None if times == 1 else usual.database,
        deadline=None,  # it would measure wall time
        suppress_health_check=list(HealthCheck),
    )


SCRATCH = tempfile.TemporaryDirectory()
FOLDER = Path(SCRATCH.name)
SINGLE = "model.safetensors"


@functools.cache
def model(family: AnyFamily) -> Path:
    """Return the folder of a tiny model with two layers. That of Qwen3 is tied and stores its head too."""
    folder = FOLDER / family
    tied = family == "qwen3"
    make_tiny_model(folder, family=family, num_layers=2, num_experts=4, tie_word_embeddings=tied)
    if tied:
        tensors = load_file(folder / SINGLE)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, folder / SINGLE, {"format": "pt"})
    return folder


class TooSlow(BaseException):
    """An input took more than ``CPU_S`` seconds of CPU time. No handler of the code under test catches it."""


@contextmanager
def read_or_refused() -> Iterator[None]:
    """Limit the time and memory of the block, which may raise an InputError of one line.

    Logs and warnings of the block are dropped: pytest's processes cannot exchange halves of characters.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    used = psutil.Process().memory_info().data
    before = signal.signal(signal.SIGVTALRM, _too_slow)
    resource.setrlimit(resource.RLIMIT_DATA, (used + MEMORY_BYTES, hard))
    signal.setitimer(signal.ITIMER_VIRTUAL, CPU_S)
    message = "read"
    logging.disable()
    try:
        with (
            warnings.catch_warnings(action="ignore"),
            redirect_stdout(StringIO()),
            redirect_stderr(StringIO()),
        ):
            yield
    except InputError as error:
        message = str(error)
    finally:
        logging.disable(logging.NOTSET)
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
    assert len(message.splitlines()) == 1, message


def _too_slow(*_: object) -> None:
    raise TooSlow


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


_NUMBERS: list[Any] = [-1, 0, 1, 2, 3, 7, 1000, 2**31, 2**32, 2**63, 2**64, -(2**63), 10**15, 10**400]
_NUMBERS += [0.5, -0.0, 1e-320, 1e308, -1e308, float("nan"), float("inf"), -float("inf")]
_TEXTS = [
    "",
    " ",
    "0",
    "-1",
    "1e999",
    "true",
    "None",
    "x" * 5000,
    "a\nb",
    "\0",
    "\x1b[31m",
    "\u202e",
    "\ud800",
    "é",
]
_TEXTS += ["../x", "/dev/zero", "/", ".", "{e:>9999999999}", "{0.__class__}", "%s", "$HOME", "a" * 300 + "/b"]
_OTHERS: list[Any] = [True, False, [], {}, [[]], [{}], {"": None}, [None], nested(300), [0] * 2000]
ODD_TEXTS = st.sampled_from(_TEXTS) | st.text(max_size=8)
_SCALARS = (
    st.sampled_from(_NUMBERS) | st.integers(-3, 9) | st.integers() | st.floats() | ODD_TEXTS | st.booleans()
)


def odd_values(words: list[Any]) -> st.SearchStrategy[Any]:
    """Return odd values of every type. ``words`` are values that the reader of the file knows."""
    known = st.sampled_from(words) if words else st.nothing()
    keys = st.sampled_from([word for word in words if isinstance(word, str)] or ["x"]) | ODD_TEXTS
    small = st.lists(_SCALARS | known, max_size=4) | st.dictionaries(keys, _SCALARS | known, max_size=3)
    return st.none() | _SCALARS | known | known | st.sampled_from(_OTHERS).map(copy.deepcopy) | small


@st.composite
def changed_trees(draw: Draw, valid: Callable[[], Tree], words: list[Any]) -> Tree:
    """Return ``valid()`` after one to four changes."""
    root = {"": copy.deepcopy(valid())}
    odd = odd_values(words)
    for _ in range(draw(st.integers(1, 4))):
        places = list(_places(root[""]))
        if not places:
            break
        parent, key = places[draw(st.integers(0, len(places) - 1))]
        _change(draw, parent, key, places, odd, words)
    return root[""]


def _change(
    draw: Draw,
    parent: Any,
    key: Any,
    places: list[tuple[Any, Any]],
    odd: st.SearchStrategy[Any],
    words: list[Any],
) -> None:
    value = parent[key]
    how = draw(st.sampled_from(["odd", "odd", "near", "copy", "remove", "rename", "wrap", "add"]))
    if how == "near" and isinstance(value, int | float) and not isinstance(value, bool):
        factor, added = draw(
            st.sampled_from([(1, 1), (1, -1), (-1, 0), (2, 0), (2**31, 0), (0, 0), (1.0, 0)])
        )
        parent[key] = value * factor + added
    elif how == "near" and isinstance(value, str):
        at = draw(st.integers(0, len(value)))
        parent[key] = value[:at] + draw(ODD_TEXTS) + value[at + draw(st.integers(0, 2)) :]
    elif how == "near" and isinstance(value, list):
        parent[key] = value[:-1] if draw(st.booleans()) else value + value[:1]
    elif how == "copy":
        other, name = places[draw(st.integers(0, len(places) - 1))]
        parent[key] = copy.deepcopy(other.get(name) if isinstance(other, dict) else (other or [None])[0])
    elif how == "remove":
        del parent[key]
    elif how == "rename" and isinstance(parent, dict):
        parent[draw(st.sampled_from([str(word) for word in words] or ["x"]) | ODD_TEXTS)] = parent.pop(key)
    elif how == "wrap":
        parent[key] = draw(st.sampled_from([[value], {"x": value}, [value, value]]))
    elif how == "add" and isinstance(parent, dict):
        parent[draw(st.sampled_from([str(word) for word in words] or ["x"]) | ODD_TEXTS)] = draw(odd)
    else:
        parent[key] = draw(odd)


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Yield container and key of every value in the tree."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield tree, key
        if not (isinstance(value, list) and len(value) > 100):
            yield from _places(value)


@st.composite
def damaged(draw: Draw, content: st.SearchStrategy[bytes]) -> bytes:
    """Return ``content``, in one of four cases cut, or with other, more or repeated bytes."""
    data = draw(content)
    how = draw(st.sampled_from([""] * 9 + ["cut", "flip", "insert"]))
    at = draw(st.integers(0, max(len(data) - 1, 0))) if how else 0
    if how == "cut":
        return data[:at]
    if how == "flip":
        return (
            data[:at]
            + bytes(byte ^ 1 << draw(st.integers(0, 7)) for byte in data[at : at + 1])
            + data[at + 1 :]
        )
    if how == "insert":
        pieces = [
            b"\0",
            b"\xff",
            b"\xed\xa0\x80",
            b'"',
            b"[" * 100_000,
            b"{",
            b"9" * 5000,
            b"NaN",
            b"\n",
            b",",
        ]
        return data[:at] + draw(st.sampled_from(pieces)) + data[at:]
    return data


def json_files(
    valid: Callable[[], Tree], words: str, values: list[Any] | None = None
) -> st.SearchStrategy[bytes]:
    """Return the bytes of JSON files. Their reader knows the ``words`` and ``values``."""
    known = [*words.split(), *(values or [])]
    return damaged(changed_trees(valid, known).map(lambda tree: json.dumps(tree).encode()))


def toml_files(valid: Callable[[], Tree], words: str) -> st.SearchStrategy[bytes]:
    """Return the bytes of TOML files. Their reader knows the ``words``."""
    return damaged(changed_trees(valid, words.split()).map(_toml))


def _toml(tree: Tree) -> bytes:
    return tomli_w.dumps(_without_none(tree)).encode("utf-8", "surrogatepass")


def _without_none(tree: Any) -> Any:
    """Return the tree with "None" for None, which TOML lacks."""
    if isinstance(tree, dict):
        return {key: _without_none(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_without_none(value) for value in tree]
    return "None" if tree is None else tree
