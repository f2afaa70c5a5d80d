"""Scripted SGLang servers and simulated server processes, for tests of the client without a model."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from megatron_gmpo.errors import ServerError
from megatron_gmpo.rollout.sglang.servers import Server

Answer = web.StreamResponse | dict[str, Any]


def answer_of(
    body: dict[str, Any],
    version: str,
    count: int | None = None,
    finish: str = "length",
    tokens: list[int] | None = None,
) -> dict[str, Any]:
    """Return an answer of /generate.

    It has the given tokens, or ``count`` tokens, each 100 plus its index in the sequence.
    """
    start = len(body["input_ids"])
    count = body["sampling_params"]["max_new_tokens"] if count is None else count
    tokens = [100 + start + i for i in range(count)] if tokens is None else tokens
    return {
        "output_ids": tokens,
        "meta_info": {
            "finish_reason": {"type": finish},
            "prompt_tokens": start,
            "weight_version": version,
            "output_token_logprobs": [[-token / 100, token, None] for token in tokens],
        },
    }


class FakeServer:
    """SGLang server in a thread, with the endpoints that the client uses.

    Attributes:
        weight_version: version that /model_info and the answers of /generate report.
        generates: whether /health_generate answers 200.
        generate: function that makes the reply to a request; tests replace it.
        bodies: bodies of the requests to /generate so far.
        aborted: request ids sent to /abort_request.
        in_flight, peak: current and highest number of concurrent requests.
        connections: client ports of the TCP connections to /generate so far.
    """

    def __init__(self) -> None:
        self.weight_version = "default"
        self.generates = True
        self.generate: Callable[[dict[str, Any]], Awaitable[Answer]] = self.answer
        self.bodies: list[dict[str, Any]] = []
        self.aborted: list[str] = []
        self.in_flight = self.peak = 0
        self.connections: set[int] = set()
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port: int = free.getsockname()[1]
        self.server = Server(f"http://127.0.0.1:{self.port}", "user", "admin")
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._runner: web.AppRunner | None = None

    async def answer(self, body: dict[str, Any]) -> Answer:
        return answer_of(body, self.weight_version)

    def start(self) -> None:
        async def start() -> None:
            app = web.Application()
            app.router.add_get("/model_info", self._model_info)
            app.router.add_get("/health_generate", self._health_generate)
            app.router.add_post("/generate", self._generate)
            app.router.add_post("/abort_request", self._abort_request)
            app.router.add_post("/update_weight_version", self._update_weight_version)
            app.router.add_get("/server_info", self._server_info)
            self._runner = web.AppRunner(app, shutdown_timeout=0.1, access_log=None)
            await self._runner.setup()
            await web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True).start()

        asyncio.run_coroutine_threadsafe(start(), self._loop).result(10)

    def stop(self) -> None:
        """Close the port and every connection."""

        async def stop() -> None:
            if self._runner:
                await self._runner.cleanup()
            self._runner = None

        asyncio.run_coroutine_threadsafe(stop(), self._loop).result(10)

    def close(self) -> None:
        """Stop the server and end its thread."""

        async def end_handlers() -> None:
            handlers = asyncio.all_tasks() - {asyncio.current_task()}
            for handler in handlers:
                handler.cancel()
            await asyncio.gather(*handlers, return_exceptions=True)

        self.stop()
        asyncio.run_coroutine_threadsafe(end_handlers(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _model_info(self, request: web.Request) -> web.Response:
        return web.json_response({"weight_version": self.weight_version})

    async def _health_generate(self, request: web.Request) -> web.Response:
        return web.Response(status=200 if self.generates else 503)

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        assert request.headers["Authorization"] == "Bearer user"
        assert request.transport
        self.connections.add(request.transport.get_extra_info("peername")[1])
        body = await request.json()
        self.bodies.append(body)
        self.in_flight += 1
        self.peak = max(self.peak, self.in_flight)
        try:
            answer = await self.generate(body)
        finally:
            self.in_flight -= 1
        return answer if isinstance(answer, web.StreamResponse) else web.json_response(answer)

    async def _abort_request(self, request: web.Request) -> web.Response:
        assert request.headers["Authorization"] == "Bearer admin"
        self.aborted.append((await request.json())["rid"])
        return web.Response()

    async def _update_weight_version(self, request: web.Request) -> web.Response:
        if await request.read():
            self.weight_version = (await request.json())["new_version"]
        return web.Response()

    async def _server_info(self, request: web.Request) -> web.Response:
        return web.json_response({"tp_size": 1, "base_gpu_id": 0})


class FakeProcesses:
    """Replacement for ``LocalServers`` whose processes are the fake servers."""

    def __init__(self, fakes: list[FakeServer]) -> None:
        self.fakes, self.servers = fakes, [fake.server for fake in fakes]
        self.alive = [False] * len(fakes)
        self.starts = [0] * len(fakes)
        self.broken = False

    def start(self) -> None:
        for index in range(len(self.fakes)):
            self._start(index)

    def restart(self, index: int) -> None:
        self.kill(index)
        self._start(index)

    def wait_ready(self, index: int) -> None:
        if self.broken:
            raise ServerError(f"SGLang server {index} died before it was ready: broken")

    def is_alive(self, index: int) -> bool:
        return self.alive[index]

    def end_of(self, index: int) -> str:
        return "was killed by SIGKILL"

    def kill(self, index: int) -> None:
        self.alive[index] = False
        self.fakes[index].stop()

    def stop(self) -> None:
        for index in range(len(self.fakes)):
            self.kill(index)

    def _start(self, index: int) -> None:
        self.starts[index] += 1
        if not self.broken:
            self.fakes[index].weight_version = "default"
            self.fakes[index].start()
            self.alive[index] = True
