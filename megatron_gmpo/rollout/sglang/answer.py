"""Read an answer of SGLang's ``/generate`` into numpy columns. No Python object is made for a token.

The numbers and the base64 text of an answer are cut out of its bytes; only the rest is parsed as JSON. A
quote inside a JSON string is escaped, so a name in quotes is always a key.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
import pybase64

from ...batch.samples import narrow_experts

_TOKENS = re.compile(rb'"output_ids":\s*\[([^"]*)\]')
_LOGPROBS = re.compile(rb'"output_token_logprobs":\s*\[([^"]*)\]')
_EXPERTS = re.compile(rb'"routed_experts":\s*"')


@dataclass(frozen=True)
class Answer:
    """One answer of a server.

    Attributes:
        tokens: (T,) int32 sampled token ids.
        logprobs: (T,) float32; their number differs from T if the server is at fault.
        versions: (T,) int32, the training step of the weights behind each token, -1 for weights of another
            run. An answer without tokens has one entry, the server's current weights.
        finish_reason: ``stop``, ``length`` or ``abort``.
        prompt_tokens: number of tokens of the request, with those of its images.
        prompt_ids: these tokens, if the request asked for them.
        routed_experts: flat uint8 or int16 expert ids of the requested tokens; empty if not recorded.
    """

    tokens: np.ndarray
    logprobs: np.ndarray
    versions: np.ndarray
    finish_reason: str
    prompt_tokens: int
    prompt_ids: list[int] | None
    routed_experts: np.ndarray


def parse_answer(content: bytes, nonce: str) -> Answer:
    """Parse the body of a reply. ``nonce`` is the prefix of this run's weight versions."""
    content, experts = _cut_experts(content)
    content, tokens = _cut(_TOKENS, content)
    content, logprobs = _cut(_LOGPROBS, content)
    reply: dict[str, Any] = orjson.loads(content)
    about: dict[str, Any] = reply["meta_info"]
    ids = np.fromstring(tokens, np.int32, sep=",")
    # one [log probability, token, text or null] a token
    rows = logprobs.translate(None, b"[] ").replace(b"null", b"nan")
    return Answer(
        tokens=ids,
        logprobs=np.fromstring(rows, np.float32, sep=",")[::3],
        versions=_versions(about, len(ids), nonce),
        finish_reason=about["finish_reason"]["type"],
        prompt_tokens=about.get("prompt_tokens", 0),
        prompt_ids=reply.get("prompt_token_ids"),
        routed_experts=experts,
    )


def _cut(array: re.Pattern[bytes], content: bytes) -> tuple[bytes, bytes]:
    """Return ``content`` with an empty array, and what was in the array."""
    found = array.search(content)
    if not found:
        return content, b""
    return content[: found.start(1)] + content[found.end(1) :], found[1]


def _cut_experts(content: bytes) -> tuple[bytes, np.ndarray]:
    """Return ``content`` with an empty ``routed_experts``, and the array that its base64 text holds."""
    found = _EXPERTS.search(content)
    if not found:
        return content, np.empty(0, np.uint8)
    start = found.end()
    end = content.index(b'"', start)
    ids = np.frombuffer(pybase64.b64decode(memoryview(content)[start:end]), "<i4")
    return content[:start] + content[end:], narrow_experts(ids)


def _versions(about: dict[str, Any], count: int, nonce: str) -> np.ndarray:
    spans = about.get("weight_versions") or [
        {"version": about["weight_version"], "start": 0, "end": max(1, count)}
    ]
    steps = [_step(span["version"], nonce) for span in spans]
    versions = np.repeat(np.array(steps, np.int32), [span["end"] - span["start"] for span in spans])
    return versions if len(versions) else np.array([_step(about["weight_version"], nonce)], np.int32)


def _step(version: str, nonce: str) -> int:
    run, _, step = version.rpartition("-")
    return int(step) if run == nonce and step.isdigit() else -1
