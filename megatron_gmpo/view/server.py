"""Serve the page and its data to a browser.

Every request needs the token, which is the first part of the address's path, so that a page of another site
and other users of the machine cannot read the run. The name in the Host header must be one of ours, so that
another site's name that resolves to this machine is refused too. Only GET is answered, and no file of a run
folder is served as it is; an image is text in JSON.
"""

from __future__ import annotations

import asyncio
import hmac
import secrets
import socket
from collections.abc import Awaitable, Callable, Sequence

from aiohttp import web

from ..errors import InputError
from .answers import answer, to_json
from .folder import RunFolder
from .page import render

HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "frame-ancestors 'none'",  # the page has the rest of its policy itself
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def make_app(runs: Sequence[RunFolder], token: str, host: str = "127.0.0.1") -> web.Application:
    """Return the application of the page.

    Args:
        runs: run folders to show.
        token: first part of each request's path.
        host: the address that the server listens on.
    """
    names = {"127.0.0.1", "localhost", "[::1]", host, socket.gethostname(), socket.getfqdn()}
    html = render().encode()
    one_at_a_time = asyncio.Lock()  # the files are read on from where the last answer ended

    @web.middleware
    async def guarded(
        request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        given = f"{request.path}/".split("/")[1]
        if request.headers.get("Host", "").rpartition(":")[0] not in names or not hmac.compare_digest(
            given.encode(), token.encode()
        ):
            return _refusal(403, "open the address that megatron-gmpo view printed")
        response = await handler(request)
        response.headers.update(HEADERS)
        return response

    async def page(request: web.Request) -> web.StreamResponse:
        return web.Response(body=html, content_type="text/html", charset="utf-8")

    async def data(request: web.Request) -> web.StreamResponse:
        try:
            async with one_at_a_time:
                found = await asyncio.to_thread(answer, runs, request.match_info["path"], dict(request.query))
        except LookupError as error:
            return _refusal(404, f"no such data: {error}")
        return web.Response(body=to_json(found), content_type="application/json")

    app = web.Application(middlewares=[guarded])
    app.router.add_get(f"/{token}/", page)
    app.router.add_get(f"/{token}/data/{{path:.+}}", data)
    return app


def serve(runs: Sequence[RunFolder], host: str, port: int) -> None:
    """Serve the page until Ctrl-C, and print its address.

    Raises:
        InputError: the port cannot be used.
    """
    token = secrets.token_urlsafe(16)
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen()  # a browser may connect as soon as the address is printed
    except (OSError, OverflowError) as error:
        raise InputError(
            f"--host {host} --port {port} cannot be used ({error}): choose a free port, or 0 for any"
        ) from None
    shown = f"[{host}]" if ":" in host else host
    print(f"http://{shown}:{listener.getsockname()[1]}/{token}/", flush=True)
    web.run_app(make_app(runs, token, shown), sock=listener, print=None, access_log=None)


def _refusal(status: int, line: str) -> web.Response:
    return web.Response(status=status, text=f"{line}\n", headers=HEADERS)
