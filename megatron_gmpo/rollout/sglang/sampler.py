"""Sample responses over HTTP, retry failed requests, and continue aborted responses."""

from __future__ import annotations

import asyncio
import time
import uuid
from contextlib import suppress
from typing import Any, NamedTuple

import aiohttp
import numpy as np
import orjson

from ...config import SGLangConfig
from ...errors import InputError, ServerError
from ..ending import Ending
from ..engine import SamplingParams
from ..images import RunImages
from ..response import Context, Response
from .answer import Answer, parse_answer
from .image_requests import ImageRequests
from .server_state import ServerEvent
from .servers import PROBE_TIMEOUT_S, Server
from .watcher import Home, Member, Watcher

ATTEMPTS = 5
"""Maximum consecutive requests of one sample that bring no token; answers HTTP 429 and 5xx do not count."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 5.0


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
        routed_experts: (layers, topk) to record every token's experts, or None.
        images: the images of the run; None for a model without vision.

    Attributes:
        retries: number of requests that were sent again, since the start.
        old_cache_tokens: number of sampled tokens that are newer than their request, since the start. With
            ``in_flight = "in_place"`` they attend to cache of the old weights.
    """

    def __init__(
        self,
        watcher: Watcher,
        http: aiohttp.ClientSession,
        cfg: SGLangConfig,
        nonce: str,
        routed_experts: tuple[int, int] | None = None,
        images: RunImages | None = None,
    ) -> None:
        self.retries = self.old_cache_tokens = 0
        self._watcher, self._http, self._cfg, self._nonce = watcher, http, cfg, nonce
        self._routed_experts = routed_experts
        self._images = ImageRequests(images) if images else None
        self._ids_compared = False
        self._timeout = f"sglang.request_timeout_s = {cfg.request_timeout_s:g}"

    async def sample(
        self,
        context: Context,
        sampling: SamplingParams,
        seed: int,
        ending: Ending,
        home: Home | None = None,
    ) -> Response:
        """Return one response to the tokens of ``context``, which ends where ``ending`` says.

        A server ends most of them there, but misses an end token in an aborted answer, and a stop string that
        spans two requests or has more tokens than its encoding.

        The next request after an abort sends the sampled tokens as the end of a longer prompt. Discarding
        them would favor short responses, which are rarely unfinished at a sync.

        SGLang reads ``seed`` if ``enable_deterministic_inference`` or ``rl_on_policy_target`` is set, and
        uses 42 where it is missing (sampling_batch_info.py). It adds noise to each token that depends on seed
        and position only, so a continued response keeps its seed, and so do the turns of an episode.

        Args:
            home: of the episode of which the response is a turn; see ``Watcher.acquire``.

        Raises:
            InputError: a server refuses a request or the API key, ends a response too early, or gives images
                other tokens than the context has.
            ServerError: ``ATTEMPTS`` consecutive requests brought no token, a server refused requests for
                ``request_timeout_s``, or it recorded experts of another model.
        """
        limit, parameters = sampling.max_new_tokens, _parameters(sampling, seed, ending)
        response, prompt = Response(), await self._prompt(context)
        failures = 0
        while not response.finish_reason:
            start, version = len(response.tokens), self._watcher.version
            body = {
                "rid": f"{self._nonce}-{uuid.uuid4().hex}",
                **prompt,
                "input_ids": np.append(prompt["input_ids"], response.tokens),
                "sampling_params": parameters | {"max_new_tokens": limit - start},
            }
            try:
                answer = await self._ask(body, home)
                if context.images:
                    self._compare_tokens(answer, context, response)
                self._append(response, answer, context, limit, ending)
                if context.images and not response.finish_reason and self._has_image_token(response):
                    response = Response()  # the next request would need an image for it
                aborted = not response.finish_reason and version == self._watcher.version  # by no sync
                if aborted and len(response.tokens) == start:
                    raise _RetryError(
                        f"a server aborted it before its first token: raise {self._timeout} if requests queue"
                        " longer"
                    )
                self.retries += aborted
                failures = 0
            except _RetryError as error:
                self.retries += 1
                failures += 1
                if failures == ATTEMPTS:
                    raise ServerError(
                        f"a sample failed {ATTEMPTS} times in a row, the last time: {error}"
                    ) from None
        return response

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

    async def _prompt(self, context: Context) -> dict[str, Any]:
        """Return what all requests of a sample have in common."""
        asked = {
            "return_logprob": True,
            "return_routed_experts": bool(self._routed_experts),
            "routed_experts_start_len": context.recorded,
        }
        if not context.images:
            return asked | {"input_ids": np.asarray(context.tokens, np.int32)}
        assert self._images, "a prompt with images for a model without vision"
        return asked | {"return_prompt_token_ids": not self._ids_compared} | await self._images.of(context)

    def _compare_tokens(self, answer: Answer, context: Context, response: Response) -> None:
        """Check that the server's context, with the tokens of its images, is ours: its length, once its ids.

        An answer without tokens may come from before the server counted them.
        """
        sent = np.append(context.tokens, response.tokens)
        differs = len(answer.tokens) and answer.prompt_tokens != len(sent)
        if answer.prompt_ids is not None:
            self._ids_compared = True
            differs = differs or answer.prompt_ids != sent.tolist()
        if differs:
            raise InputError(
                f"the SGLang servers make {answer.prompt_tokens} tokens of a prompt with images that has "
                f"{len(sent)}, or other tokens: give them the model and the images' limits of this run"
            )

    def _has_image_token(self, response: Response) -> bool:
        assert self._images
        return self._images.images.image_token in response.tokens

    async def _ask(self, body: dict[str, Any], home: Home | None) -> Answer:
        """Return the answer of a server with the current weights.

        The request is sent again while servers reply HTTP 429 or 5xx. The weights' version is the key of the
        server's prefix cache, so that a request never reuses cache from before a sync in place.
        """
        pause, refused_since = _FIRST_PAUSE_S, None
        while True:
            member = await self._watcher.acquire(home)
            version = self._watcher.version
            try:
                reply = await self._request(member, body | {"extra_key": f"{self._nonce}-{version}"})
            finally:
                await self._watcher.release()
            if reply.status == 200:
                return self._read(reply, member, version)
            if reply.status in (401, 403):
                raise InputError(
                    f"{member.server.url} refuses the API key (HTTP {reply.status}): "
                    "set SGLANG_API_KEY to the server's key"
                )
            if reply.status != 429 and reply.status < 500:
                raise InputError(f"{member.server.url} refuses a request: {reply.message}")
            refused_since = refused_since or time.monotonic()
            if time.monotonic() > refused_since + self._cfg.request_timeout_s:
                raise ServerError(
                    f"{member.server.url} accepted no request within {self._timeout}, "
                    f"the last reply: {reply.message}"
                )
            self.retries += 1
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)

    def _read(self, reply: _Reply, member: Member, version: int) -> Answer:
        """Return the answer of ``member`` to a request that was sent at ``version``.

        Raises:
            _RetryError: older weights sampled a token, or the numbers of tokens, log probabilities and
                versions differ.
        """
        answer = parse_answer(reply.content, self._nonce)
        if answer.versions.min() < version:
            self._watcher.report(member, ServerEvent.REQUEST_FAILED)
            raise _RetryError(f"{member.server.url} answered from old weights")
        tokens, logprobs, versions = map(len, (answer.tokens, answer.logprobs, answer.versions))
        if (logprobs, versions) != (tokens, max(1, tokens)):
            raise _RetryError(
                f"{member.server.url} answered {tokens} tokens with {logprobs} log probabilities and weight "
                f"versions of {versions} tokens"
            )
        self.old_cache_tokens += int((answer.versions[:tokens] > version).sum())
        return answer

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
                raise _RetryError(f"{server.url} did not answer within {self._timeout}")
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
            data=orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY),
            headers={"Content-Type": "application/json"} | server.headers,
        ) as reply:
            return _Reply(reply.status, await reply.read())

    def _append(
        self, response: Response, answer: Answer, context: Context, limit: int, ending: Ending
    ) -> None:
        """Add the tokens of ``answer`` up to the end of the response, and set its ``finish_reason``."""
        tokens = np.append(response.tokens, answer.tokens)
        finish_reason, end = answer.finish_reason, ending.length(tokens)
        if end is not None:
            finish_reason = "stop"
        elif finish_reason == "abort":
            finish_reason = "length" if len(tokens) == limit else ""
        if finish_reason == "length" and len(tokens) < limit:
            # SGLang lowers the limit without a message (scheduler.py)
            raise InputError(
                f"the SGLang servers end responses after {len(tokens)} of {limit} tokens: "
                "raise context_length or max_total_tokens in [sglang.args], or lower max_new_tokens"
            )
        # an unfinished response is routed again as a longer prompt, under the newer weights
        if self._routed_experts and finish_reason:
            rows = answer.prompt_tokens + len(answer.tokens) - 1 - context.recorded
            surplus = 0 if end is None else len(tokens) - end
            response.routed_experts = self._routing(answer.routed_experts, rows)[: rows - surplus]
        response.tokens = tokens[:end]
        response.logprobs = np.append(response.logprobs, answer.logprobs)[:end]
        response.versions = np.append(response.versions, answer.versions[: len(answer.tokens)])[:end]
        response.finish_reason = finish_reason

    def _routing(self, flat: np.ndarray, rows: int) -> np.ndarray:
        """Return (rows, layers, topk) expert ids of an answer's record."""
        assert self._routed_experts
        layers, topk = self._routed_experts
        if not len(flat) or rows < 1 or len(flat) % rows:
            raise _RetryError(f"the record has {len(flat)} routed experts for {rows} tokens")
        if len(flat) != rows * layers * topk:
            raise ServerError(
                f"SGLang recorded {len(flat) // rows} routed experts a token, expected {layers} x {topk}: "
                "check that it serves model.path"
            )
        return flat.reshape(rows, layers, topk)


def _parameters(sampling: SamplingParams, seed: int, ending: Ending) -> dict[str, Any]:
    """Return SGLang's ``sampling_params``, without ``max_new_tokens``."""
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or -1,
        "stop": list(ending.stop),
        "stop_token_ids": sorted(ending.end_ids),
        "ignore_eos": not ending.end_ids,
        "no_stop_trim": True,
        "skip_special_tokens": False,
        "sampling_seed": seed,
    }
