"""Sample responses over HTTP, retry failed requests, and continue aborted responses."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import aiohttp
import numpy as np
import orjson
import pybase64

from ...batch.samples import narrow_experts
from ...config import SGLangConfig
from ...errors import InputError, ServerError
from ..engine import SamplingParams
from .server_state import ServerEvent
from .servers import Server
from .watcher import PROBE_TIMEOUT_S, Member, Watcher

ATTEMPTS = 5
"""Maximum consecutive failed requests of one sample; answers HTTP 429 and 5xx do not count."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 5.0


@dataclass
class Response:
    """One sampled response, joined from all its requests.

    Attributes:
        tokens: R response token ids, including the end token.
        logprobs: R log probabilities, after temperature and before top-p and top-k.
        versions: R training steps, one per token: the step whose weights sampled the token.
        finish_reason: ``stop`` or ``length``.
        routed_experts: (prompt + R - 1, layers * topk) uint8 or int16 expert ids, if requested.
    """

    tokens: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    logprobs: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))
    versions: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    finish_reason: str = ""
    routed_experts: np.ndarray | None = None


class _Reply(NamedTuple):
    status: int
    content: bytes

    @property
    def message(self) -> str:
        """Return the body as one line of at most 300 characters."""
        return " ".join(self.content.decode(errors="replace").split())[:300] or f"HTTP {self.status}"


class _RetryError(Exception):
    """The request got no usable answer, and the request itself is not the cause."""


class Sampler:
    """Send ``/generate`` requests to the servers that a ``Watcher`` finds ready.

    Args:
        watcher: chooses the server of each request.
        http: session for all requests.
        cfg: timeouts and limits.
        nonce: prefix of this run's weight versions.
        return_routed_experts: request the experts of every token.

    Attributes:
        retries: number of requests that were sent again, since the start.
    """

    def __init__(
        self,
        watcher: Watcher,
        http: aiohttp.ClientSession,
        cfg: SGLangConfig,
        nonce: str,
        return_routed_experts: bool,
    ) -> None:
        self.retries = 0
        self._watcher, self._http, self._cfg, self._nonce = watcher, http, cfg, nonce
        self._return_routed_experts = return_routed_experts

    async def sample_all(
        self, prompts: Sequence[list[int]], sampling: SamplingParams, end_ids: Sequence[int]
    ) -> list[list[Response]]:
        """Return ``sampling.n`` responses for each prompt, in order. Tokens in ``end_ids`` end a response.

        Every sample has its own seed, drawn from ``sampling.seed``. SGLang reads it if
        ``enable_deterministic_inference`` or ``rl_on_policy_target`` is set, and uses 42 where it is missing
        (sampling_batch_info.py). It adds noise to each token that depends on seed and position only, so a
        continued response keeps its seed.

        Raises:
            InputError: a server refuses a request or the API key.
            ServerError: a sample failed ``ATTEMPTS`` times, or a server refused requests for
                ``request_timeout_s``.
        """
        parameters = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,
            "stop": list(sampling.stop),
            "stop_token_ids": list(end_ids),
            "ignore_eos": not end_ids,
            "no_stop_trim": True,
            "skip_special_tokens": False,
        }
        self._watcher.expect_answers()
        n, limit = sampling.n, sampling.max_new_tokens
        bits = np.random.SeedSequence(sampling.seed).generate_state(len(prompts) * n, np.uint64)
        responses = await asyncio.gather(
            *(
                self._sample(prompts[i // n], limit, parameters | {"sampling_seed": seed})
                for i, seed in enumerate((bits >> np.uint64(1)).tolist())  # SGLang takes int64
            )
        )
        return [responses[at : at + n] for at in range(0, len(responses), n)]

    async def abort(self, server: Server, rid: str) -> None:
        """Ask the server to abort a request; ignore a server that does not answer."""
        with suppress(aiohttp.ClientError, TimeoutError):
            async with self._http.post(
                f"{server.url}/abort_request",
                json={"rid": rid},
                headers=server.admin_headers,
                timeout=aiohttp.ClientTimeout(PROBE_TIMEOUT_S),
            ):
                pass

    async def _sample(self, prompt: list[int], limit: int, parameters: dict[str, Any]) -> Response:
        """Return one response.

        The next request after an abort sends the sampled tokens as the end of a longer prompt. Discarding
        them would favor short responses, which are rarely unfinished at a sync.
        """
        response = Response()
        failures = 0
        while response.finish_reason in ("", "abort") and len(response.tokens) < limit:
            body = {
                "rid": f"{self._nonce}-{uuid.uuid4().hex}",
                "input_ids": prompt + response.tokens.tolist(),
                "sampling_params": parameters | {"max_new_tokens": limit - len(response.tokens)},
                "return_logprob": True,
                "return_routed_experts": self._return_routed_experts,
            }
            version = self._watcher.version
            try:
                self._append(response, await self._ask(body))
                if response.finish_reason == "abort" and version == self._watcher.version:
                    raise _RetryError("the server aborted the request outside a weight sync")
            except _RetryError as error:
                self.retries += 1
                failures += 1
                if failures == ATTEMPTS:
                    raise ServerError(f"a sample failed {ATTEMPTS} times, the last time: {error}") from None
        return response

    async def _ask(self, body: dict[str, Any]) -> dict[str, Any]:
        """Return the answer of a server with the current weights.

        The request is sent again while servers reply HTTP 429 or 5xx.
        """
        pause, refused_since = _FIRST_PAUSE_S, None
        while True:
            member = await self._watcher.acquire()
            version = self._watcher.version
            try:
                reply = await self._request(member, body)
            finally:
                await self._watcher.release()
            if reply.status == 200:
                answer = orjson.loads(reply.content)  # routed experts make the answer several megabytes
                if min(versions_of(answer, self._nonce)) >= version:
                    return answer
                self._watcher.report(member, ServerEvent.REQUEST_FAILED)
                raise _RetryError(f"{member.server.url} answered from old weights")
            if reply.status in (401, 403):
                raise InputError(
                    f"{member.server.url} refuses the API key (HTTP {reply.status}): "
                    "set SGLANG_API_KEY to the server's key"
                )
            if reply.status != 429 and reply.status < 500:
                raise InputError(f"{member.server.url} refuses a request: {reply.message}")
            refused_since = refused_since or time.monotonic()
            if time.monotonic() > refused_since + self._cfg.request_timeout_s:
                limit = f"sglang.request_timeout_s = {self._cfg.request_timeout_s:g}"
                raise ServerError(
                    f"{member.server.url} accepted no request within {limit}, the last reply: {reply.message}"
                )
            self.retries += 1
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)

    async def _request(self, member: Member, body: dict[str, Any]) -> _Reply:
        """Return the server's reply to ``/generate``.

        After ``request_timeout_s`` the server is asked to abort and replies with the tokens sampled so far.
        """
        server, timeout_s = member.server, self._cfg.request_timeout_s
        request = asyncio.create_task(self._post(server, body))
        member.requests[request] = body["rid"]
        try:
            await asyncio.wait({request}, timeout=timeout_s)
            if not request.done():
                await self.abort(server, body["rid"])
                await asyncio.wait({request}, timeout=PROBE_TIMEOUT_S)
            if not request.done():
                self._watcher.report(member, ServerEvent.REQUEST_TIMED_OUT)
                raise _RetryError(f"{server.url} did not answer within {timeout_s:g} s")
            if request.cancelled():  # the watcher cancels it
                raise _RetryError(f"{server.url} was lost")
            return request.result()
        except aiohttp.ClientError as error:
            self._watcher.report(member, ServerEvent.REQUEST_FAILED)
            raise _RetryError(f"{server.url}: {error or type(error).__name__}") from error
        finally:
            request.cancel()
            del member.requests[request]

    async def _post(self, server: Server, body: dict[str, Any]) -> _Reply:
        async with self._http.post(
            f"{server.url}/generate",
            data=orjson.dumps(body),
            headers={"Content-Type": "application/json"} | server.headers,
        ) as reply:
            return _Reply(reply.status, await reply.read())

    def _append(self, response: Response, answer: dict[str, Any]) -> None:
        """Add the tokens of ``answer`` to ``response``."""
        about, finish_reason = answer["meta_info"], answer["meta_info"]["finish_reason"]["type"]
        # after an abort the longer prompt is routed again, under the newer weights
        if self._return_routed_experts and finish_reason != "abort":
            flat = narrow_experts(np.frombuffer(pybase64.b64decode(about["routed_experts"]), "<i4"))
            routed = about["prompt_tokens"] + len(answer["output_ids"]) - 1
            if not routed or len(flat) % routed:
                raise _RetryError(f"the record has {len(flat)} routed experts for {routed} tokens")
            response.routed_experts = flat.reshape(routed, -1)
        logprobs = [logprob for logprob, *_ in about["output_token_logprobs"]]
        versions = versions_of(answer, self._nonce)[: len(answer["output_ids"])]
        response.tokens = np.append(response.tokens, np.array(answer["output_ids"], np.int32))
        response.logprobs = np.append(response.logprobs, np.array(logprobs, np.float32))
        response.versions = np.append(response.versions, np.array(versions, np.int32))
        response.finish_reason = finish_reason


def versions_of(answer: dict[str, Any], nonce: str) -> list[int]:
    """Return the training step of the weights behind each output token: -1 for weights of another run.

    An answer without tokens gives one entry, the server's current weights.
    """
    about, count = answer["meta_info"], len(answer["output_ids"])
    spans = about.get("weight_versions") or [
        {"version": about["weight_version"], "start": 0, "end": max(1, count)}
    ]
    steps: list[int] = []
    for span in spans:
        steps += [_step(span["version"], nonce)] * (span["end"] - span["start"])
    return steps or [_step(about["weight_version"], nonce)]


def _step(version: str, nonce: str) -> int:
    run, _, step = version.rpartition("-")
    return int(step) if run == nonce and step.isdigit() else -1
