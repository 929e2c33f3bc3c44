"""The HTTP application: routes, errors, CORS, and its life from the first connection to the last answer."""

from __future__ import annotations

import asyncio
import functools
import logging
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress

from aiohttp import web
from aiohttp.typedefs import Handler

import engine
from engine.config import EngineConfig
from engine.errors import EngineDead, InvalidRequest, LoraxError, MalformedRequest
from engine.metrics import Metrics
from engine.server import native, openai
from engine.server.backend import Backend
from engine.server.front import FRONT, Front, json_response
from engine.server.text import Text

log = logging.getLogger(__name__)

MAX_BODY_BYTES = 32 << 20
KEEP_ALIVE_S = 15.0  # silence after which a stream gets a comment
DRAIN_S = 90.0  # that open requests get when the server stops; aiohttp spends it in two halves
STALL_S = 30.0  # that a client may leave unread what was sent to it; then the connection is closed
LET_GO_S = 5.0  # that the engine gets to end what nobody waits for any more
WATCH_S = 0.25  # between two looks at whether the engine is alive
RETRY_AFTER_S = 1
SERVER = f"lorax/{engine.__version__}"
CLIENT_GONE = 499  # nobody reads this status; it is for the log

# What aiohttp refuses by itself -> our type of error.
HTTP_ERRORS = {404: "not_found", 405: "method_not_allowed", 413: "request_too_large"}


class _Refused(LoraxError):
    """An error of aiohttp's own, told like ours."""

    def __init__(self, status: int, message: str, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.status = status  # type: ignore[misc]
        self.error_type = HTTP_ERRORS.get(status, "http")  # type: ignore[misc]


def build_app(
    backend: Backend,
    text: Text,
    config: EngineConfig,
    *,
    keep_alive_s: float = KEEP_ALIVE_S,
    stall_s: float = STALL_S,
    max_body_bytes: int = MAX_BODY_BYTES,
) -> web.Application:
    """The application on `backend`; whoever made backend and text also closes them."""
    middlewares = [_log_access, _preflight, _errors]
    app = web.Application(middlewares=middlewares, client_max_size=max_body_bytes)
    metrics = Metrics(backend.info.max_total_tokens)
    app[FRONT] = Front(backend, text, config, metrics, keep_alive_s)
    app.add_routes([*native.routes(), *openai.routes()])
    app.on_response_prepare.append(_sign)
    app.on_response_prepare.append(functools.partial(_bound_stall, round(stall_s * 1000)))
    app.on_cleanup.append(_let_go)
    return app


# -- errors


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Every error as an answer of the route's family. A task boundary: what we did not foresee is a 500."""
    try:
        return await handler(request)
    except LoraxError as error:
        return _answer(request, error)
    except web.HTTPException as error:
        if error.status < 400:
            raise
        answer = _answer(request, _of_http(request, error))
        if "Allow" in error.headers:
            answer.headers["Allow"] = error.headers["Allow"]
        return answer
    except ConnectionResetError:
        return web.Response(status=CLIENT_GONE)
    except web.RequestPayloadError as error:
        answer = _answer(request, MalformedRequest(f"the body cannot be read: {error}"))
        answer.force_close()  # where it ends is not known
        return answer
    except Exception:
        log.exception("%s %s failed", request.method, request.path)
        return _answer(request, LoraxError("internal error", hint="see the server's log"))


def _of_http(request: web.Request, error: web.HTTPException) -> LoraxError:
    if isinstance(error, web.HTTPRequestEntityTooLarge):
        return _Refused(413, f"the body is larger than {request.client_max_size} bytes")
    if isinstance(error, web.HTTPMethodNotAllowed):
        allowed = ", ".join(sorted(error.allowed_methods))
        return _Refused(405, f"{request.path} does not take {request.method}", f"use {allowed}")
    if isinstance(error, web.HTTPNotFound):
        return _Refused(404, f"there is no route {request.path}", "see docs/api.md")
    return _Refused(error.status, error.reason)


def _answer(request: web.Request, error: LoraxError) -> web.Response:
    headers = {"Retry-After": str(RETRY_AFTER_S)} if error.status == 429 else None
    is_openai = request.path.startswith("/v1/")
    body = openai.error_body(error) if is_openai else native.error_body(error)
    if not isinstance(error, InvalidRequest):
        log.debug("%s %s: %d %s", request.method, request.path, error.status, error)
    return json_response(body, error.status, headers)


@web.middleware
async def _log_access(request: web.Request, handler: Handler) -> web.StreamResponse:
    if not log.isEnabledFor(logging.DEBUG):
        return await handler(request)
    start, status = time.monotonic(), CLIENT_GONE
    try:
        response = await handler(request)
        status = response.status
        return response
    finally:
        ms = (time.monotonic() - start) * 1000
        log.debug("%s %s %d %.1f ms", request.method, request.path, status, ms)


# -- CORS


@web.middleware
async def _preflight(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answers a browser's question whether it may send a request from another origin."""
    if request.method != "OPTIONS" or "Access-Control-Request-Method" not in request.headers:
        return await handler(request)
    asked = request.headers.get("Access-Control-Request-Headers", "authorization, content-type")
    headers = {
        "Access-Control-Allow-Methods": "GET, POST, OPTIONS",
        "Access-Control-Allow-Headers": asked,
        "Access-Control-Max-Age": "86400",
    }
    return web.Response(status=204, headers=headers)


async def _sign(request: web.Request, response: web.StreamResponse) -> None:
    """Every answer says who made it, and who may read it: any origin, or those of --cors-allow-origin."""
    response.headers["Server"] = SERVER
    origin = request.headers.get("Origin")
    if origin is None:
        return
    allowed = request.app[FRONT].config.server.cors_allow_origin
    if not allowed or "*" in allowed:
        response.headers["Access-Control-Allow-Origin"] = "*"
    else:
        response.headers["Vary"] = "Origin"
        if origin in allowed:
            response.headers["Access-Control-Allow-Origin"] = origin


# -- life


async def _bound_stall(
    milliseconds: int, request: web.Request, response: web.StreamResponse
) -> None:
    """A client that stops reading keeps its place among the open requests, and the server from ending: the kernel
    counts how long it does not take what was sent (tcp(7), TCP_USER_TIMEOUT)."""
    transport = request.transport
    connection = transport.get_extra_info("socket") if transport is not None else None
    if connection is None or connection.family not in (socket.AF_INET, socket.AF_INET6):
        return
    if sys.platform == "linux":
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)


async def _let_go(app: web.Application) -> None:
    """Waits until the engine has let go of what was answered last."""
    with suppress(TimeoutError):
        async with asyncio.timeout(LET_GO_S):
            await app[FRONT].generator.idle.wait()


async def run(app: web.Application, started: Callable[[str], None] | None = None) -> None:
    """Serves until SIGTERM or SIGINT, then lets open requests finish; a second signal ends them.

    `started` is called with the address once connections are accepted. Raises EngineDead when the engine dies.
    """
    front = app[FRONT]
    config = front.config.server
    runner = web.AppRunner(
        app, handler_cancellation=True, access_log=None, shutdown_timeout=DRAIN_S / 2
    )
    await runner.setup()
    loop, stopped, main = asyncio.get_running_loop(), asyncio.Event(), asyncio.current_task()
    assert main is not None, "a coroutine runs in a task"
    hurried = False

    def on_signal() -> None:
        nonlocal hurried
        if stopped.is_set():
            hurried = main.cancel()
        stopped.set()

    signals = (signal.SIGTERM, signal.SIGINT)
    try:
        try:
            site = web.TCPSite(runner, config.hostname, config.port, backlog=1024)
            await site.start()
            for number in signals:
                loop.add_signal_handler(number, on_signal)
            if started is not None:
                started(_address(runner))
            while front.backend.alive and not stopped.is_set():
                with suppress(TimeoutError):
                    async with asyncio.timeout(WATCH_S):
                        await stopped.wait()
            log.info("stopping: %d requests are open", front.num_open)
        finally:
            await runner.cleanup()
    except asyncio.CancelledError:
        if not hurried:
            raise
        while main.uncancel():
            pass
        log.info("stopping at once: %d requests are open", front.num_open)
    finally:
        for number in signals:
            loop.remove_signal_handler(number)
    if not front.backend.alive:
        raise EngineDead("the engine died", hint="see its last lines in the log")


def _address(runner: web.AppRunner) -> str:
    host, port = runner.addresses[0][:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
