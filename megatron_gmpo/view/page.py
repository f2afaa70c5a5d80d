"""The page as one file: markup, styles, scripts and, in an exported page, the data.

The page's policy allows only its own scripts and styles, by their hashes, and no requests to other sites. The
scripts write text with ``textContent``, so text of a prompt or a response is never markup.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from contextlib import suppress
from importlib.resources import files
from typing import Any

from .answers import answer, to_json
from .folder import RunFolder
from .samples import image_names

SCRIPTS = ("uPlot.iife.min.js", "page.js", "curves.js", "samples.js", "tokens.js", "machine.js", "start.js")
STYLES = ("uPlot.min.css", "page.css")
EXPORT_BYTES = 30 * 2**20
"""Number of bytes of samples and tokens in an exported page; the newest steps come first."""


def render(data: dict[str, Any] | None = None) -> str:
    """Return the HTML of the page.

    Args:
        data: path -> answer, for a page that asks no server.
    """
    style = "\n".join(_part(name) for name in STYLES)
    script = "\n".join(_part(name) for name in SCRIPTS)
    # "</script>" and "<!--" in the data would end or change the element
    embedded = to_json(data).decode().replace("<", "\\u003c")
    policy = (
        f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; img-src data:; "
        f"connect-src {'none' if data else 'self'!r}; base-uri 'none'; form-action 'none'"
    )
    return (
        _part("page.html")
        .replace("{{policy}}", policy)
        .replace("{{style}}", style)
        .replace("{{script}}", script)
        .replace("{{data}}", embedded)
    )


def export(runs: Sequence[RunFolder]) -> str:
    """Return the page with the data of the runs, up to ``EXPORT_BYTES`` of samples and tokens."""
    states = answer(runs, "state")
    data: dict[str, Any] = {"curves": answer(runs, "curves")}
    left = EXPORT_BYTES
    steps = [
        (step, kind, run)
        for run, state in enumerate(states)
        for kind in ("tokens", "samples")
        for step in state.get(kind, ())
    ]
    kept: set[tuple[int, str, int]] = set()
    for step, kind, run in sorted(steps, reverse=True):
        found: dict[str, Any] = {}
        for path in _paths(runs, run, kind, step):
            if left >= 0 and path not in data:
                with suppress(LookupError):  # an image that is missing or cannot be shown
                    found[path] = answer(runs, path)
                    left -= len(to_json(found[path]))
        if left < 0:
            break
        data |= found
        kept.add((step, kind, run))
    for run, state in enumerate(states):
        for kind in ("tokens", "samples"):
            there = state.get(kind, [])
            state[kind] = [step for step in there if (step, kind, run) in kept]
            if len(state[kind]) < len(there):
                state["problems"].append(
                    f"This exported page has {len(state[kind])} of {len(there)} steps of {kind}."
                )
    return render(data | {"state": states})


def _paths(runs: Sequence[RunFolder], run: int, kind: str, step: int) -> list[str]:
    path = f"{kind}/{run}/{step}"
    if kind == "samples":
        groups = answer(runs, path)
        names = {name for group in groups for name in image_names(group)}
        return [path, *(f"images/{run}/{name}" for name in sorted(names))]
    return [path, *(f"{path}/{sample['sample']}" for sample in answer(runs, path)["samples"])]


def _part(name: str) -> str:
    return (files(__package__ or "") / "page" / name).read_text(encoding="utf-8")


def _hash(content: str) -> str:
    digest = hashlib.sha256(content.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
