"""The HTTP application: routes, errors, and its life from the first connection to the last answer."""

from __future__ import annotations

import asyncio
import functools
import logging
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import nullcontext, suppress
from typing import Any

from aiohttp import web
from aiohttp.typedefs import Handler

from engine.backend import Backend
from engine.config import EngineConfig
from engine.errors import EngineDead, InvalidRequest, LoraxError
from engine.metrics import Metrics
from engine.server.access import check_origins, guard, preflight, sign
from engine.server.bodies import BUDGET_BYTES, MAX_BODY_BYTES, Bodies
from engine.server.connections import Site, make_connections
from engine.server.formats import Format
from engine.server.front import FRONT, Front
from engine.server.protocol import REFUSED, Deadlines, Runner
from engine.server.refusals import HTTP_ERRORS, routing_error
from engine.server.routes import FORMATS, describe_error, routes
from engine.server.text import Text

__all__ = ["HTTP_ERRORS", "build_app", "run", "runner_of"]

log = logging.getLogger(__name__)

KEEP_ALIVE_S = 15.0  # without events: then a stream gets a comment
STALL_S = 30.0  # a client may leave sent bytes unread; then its connection is closed
# Shutdown after the drain time takes at most END_S: cancelled requests get CANCEL_S, the engine LET_GO_S to drop their
# sequences, and the processes the rest; then they are killed.
END_S = 4.0
CANCEL_S = 0.25
LET_GO_S = 1.0
HURRY_S = 2.0  # the processes may take after a second signal
DEAD_S = 2.0  # open requests may take when the engine is gone
WATCH_S = 0.25  # between two checks that the engine is alive
CLIENT_GONE = 499  # only logged: the client has disconnected


def build_app(
    backend: Backend,
    text: Text,
    config: EngineConfig,
    *,
    keep_alive_s: float = KEEP_ALIVE_S,
    stall_s: float = STALL_S,
    max_body_bytes: int = MAX_BODY_BYTES,
    body_budget: int = BUDGET_BYTES,
    formats: Mapping[str, Format] = FORMATS,
) -> web.Application:
    """The application on `backend`, with the response formats in `formats` (path -> format).

    The caller closes backend and text. Raises ConfigError.
    """
    check_origins(config.server)
    middlewares = [_log_access, preflight, _errors, guard]
    app = web.Application(middlewares=middlewares, client_max_size=max_body_bytes)
    metrics = Metrics(backend.info.max_total_tokens)
    bodies = Bodies(config.server.client_body_timeout_s, max_body_bytes, body_budget)
    app[FRONT] = Front(
        backend=backend,
        text=text,
        config=config,
        metrics=metrics,
        bodies=bodies,
        keep_alive_s=keep_alive_s,
        describe_error=functools.partial(describe_error, formats),
    )
    app.add_routes(routes(formats))
    app.on_response_prepare.append(sign)
    app.on_response_prepare.append(functools.partial(_bound_stall, round(stall_s * 1000)))
    app.cleanup_ctx.append(_watch_keys)
    app.cleanup_ctx.append(_send_reports)
    app.on_cleanup.append(_let_go)
    return app


# -- errors


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answers every error in the format of the path. A task boundary: an unexpected error is a 500."""
    try:
        if REFUSED in request:
            raise request[REFUSED]
        return await handler(request)
    except LoraxError as error:
        return _answer(request, error)
    except web.HTTPException as error:
        if error.status < 400:
            raise
        answer = _answer(request, routing_error(request, error))
        if "Allow" in error.headers:
            answer.headers["Allow"] = error.headers["Allow"]
        return answer
    except ConnectionResetError:
        return web.Response(status=CLIENT_GONE)
    except Exception:
        log.exception("%s %s failed", request.method, request.rel_url.raw_path)
        return _answer(request, LoraxError("internal error", hint="see the server's log"))


def _answer(request: web.Request, error: LoraxError) -> web.Response:
    if not isinstance(error, InvalidRequest):
        path = request.rel_url.raw_path
        log.debug("%s %s: %d %s", request.method, path, error.status, error)
    return request.app[FRONT].error_response(request.path, error)


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
        log.debug("%s %s %d %.1f ms", request.method, request.rel_url.raw_path, status, ms)


# -- life


async def _bound_stall(
    milliseconds: int, request: web.Request, response: web.StreamResponse
) -> None:
    """Closes the connection of a client that stops reading, which would keep its request open and delay shutdown. The
    kernel measures how long sent bytes stay unacknowledged (tcp(7), TCP_USER_TIMEOUT)."""
    transport = request.transport
    connection = transport.get_extra_info("socket") if transport is not None else None
    if connection is None or connection.family not in (socket.AF_INET, socket.AF_INET6):
        return
    if sys.platform == "linux":
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)


async def _watch_keys(app: web.Application) -> AsyncIterator[None]:
    """Reads the file of API keys again when it changes."""
    keys = app[FRONT].keys
    watching = asyncio.create_task(keys.watch()) if keys.in_file else None
    yield
    if watching is not None:
        watching.cancel()
        await asyncio.wait({watching})


async def _send_reports(app: web.Application) -> AsyncIterator[None]:
    """Sends reports of requests (--request-logger-url)."""
    reports = app[FRONT].reports
    async with reports.running() if reports is not None else nullcontext():
        yield


async def _let_go(app: web.Application) -> None:
    """Ends pins and prefetches, waits at most LET_GO_S until the engine has dropped all sequences, then ends the
    processes of chat templates."""
    front = app[FRONT]
    with suppress(TimeoutError):
        async with asyncio.timeout(LET_GO_S):
            await asyncio.gather(front.prefetches.close(), front.pins.close())
            await front.generator.idle.wait()
    front.generator.texts.close()


def runner_of(app: web.Application, **options: Any) -> Runner:
    """A runner of the application; listening is up to the caller."""
    server = app[FRONT].config.server
    connections = make_connections(server.max_concurrent_requests)
    deadlines = Deadlines(server.client_header_timeout_s)
    options = {"shutdown_timeout": CANCEL_S, "handler_cancellation": True} | options
    return Runner(app, connections, deadlines, app[FRONT].error_response, **options)


async def run(app: web.Application, started: Callable[[str], None] | None = None) -> None:
    """Serves until SIGTERM or SIGINT, then waits for open requests up to drain_timeout_s. A second signal cancels them.

    Calls `started` with the address once the server accepts connections. Raises EngineDead when the engine dies.
    """
    front, runner = app[FRONT], runner_of(app)
    await runner.setup()
    loop, stopped, main = asyncio.get_running_loop(), asyncio.Event(), asyncio.current_task()
    assert main is not None, "this coroutine runs in a task"
    drain_s = front.config.server.drain_timeout_s
    hurried = False

    def on_signal() -> None:
        nonlocal hurried
        if stopped.is_set():
            hurried = main.cancel()
            front.end_by = time.monotonic() + HURRY_S
        else:
            front.end_by = time.monotonic() + drain_s + END_S
        stopped.set()

    signals = (signal.SIGTERM, signal.SIGINT)
    try:
        try:
            server = front.config.server
            await Site(runner, runner.connections, server.hostname, server.port).start()
            for number in signals:
                loop.add_signal_handler(number, on_signal)
            if started is not None:
                started(_address(runner))
            while front.backend.alive and not stopped.is_set():
                with suppress(TimeoutError):
                    async with asyncio.timeout(WATCH_S):
                        await stopped.wait()
            log.info("shutting down: waiting for %d open requests", front.places.num_open)
            if not await runner.drain(drain_s if front.backend.alive else min(drain_s, DEAD_S)):
                log.info("shutting down: cancelling %d open requests", front.places.num_open)
        finally:
            await runner.cleanup()
    except asyncio.CancelledError:
        if not hurried:
            raise
        while main.uncancel():
            pass
        log.info("shutting down at once: %d requests were open", front.places.num_open)
    finally:
        for number in signals:
            loop.remove_signal_handler(number)
    if not front.backend.alive:
        raise EngineDead("the engine died", hint="the log has its last lines")


def _address(runner: web.AppRunner) -> str:
    host, port = runner.addresses[0][:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
