"""HTTP on one connection: aiohttp's protocol with our deadlines, our errors and bounded memory.

A connection waits for headers (`head`), then for a body (`body`), then for its answer (`answer`). If the answer came
before the end of the request, the connection is read a little longer (`linger`), because closing at once could lose the
answer on its way. Bytes read then are dropped. So are all bytes after a request that is not valid HTTP.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from aiohttp import HttpVersion11, StreamReader, hdrs, http_exceptions, web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http import RawRequestMessage
from aiohttp.streams import EMPTY_PAYLOAD
from aiohttp.web_protocol import _ErrInfo
from multidict import CIMultiDict, CIMultiDictProxy

from engine.errors import LoraxError
from engine.server.connections import Connections
from engine.server.refusals import (
    MAX_HEADERS,
    MAX_LINE,
    VERSIONS,
    headers_error,
    parser_error,
    path_of,
    refused,
)

log = logging.getLogger(__name__)

IDLE_S = 75.0  # a connection may be idle between two requests
LINGER_S = 5.0  # a connection is still read after an early answer
MAX_HEAD = 1 << 16  # bytes of a request line and all headers
READ_BYTES = 1 << 14  # bytes of one read from a socket
BUFFER = 1 << 14  # unread bytes of a body; at twice as many, reading pauses
_RECEIVE_SIZE = "max_size"  # asyncio's name for READ_BYTES on its transports
REFUSED = web.RequestKey("refused", LoraxError)  # the error of its headers
EXPECTS_CONTINUE = web.RequestKey("continues", bool)  # the client waits for `100 Continue`

State = Literal["head", "body", "answer", "linger"]
HttpRequest = web.BaseRequest
ErrorResponse = Callable[[str, LoraxError], web.Response]  # of the path and the error


@dataclass(slots=True)
class Deadlines:
    header_s: float
    idle_s: float = IDLE_S
    linger_s: float = LINGER_S


class Connection(web.RequestHandler):
    """One client. Uses private names of aiohttp's class where it has no public ones; constraints.txt pins aiohttp."""

    __slots__ = (
        "_connections",
        "_deadlines",
        "_failed",
        "_head",
        "_head_bytes",
        "_head_timer",
        "_lost",
        "_payload",
        "_respond",
        "_socket_transport",
        "_state",
        "is_paused",
        "on_body_bytes",
    )

    def __init__(self, server: Server, loop: asyncio.AbstractEventLoop, **options: Any) -> None:
        super().__init__(
            server,
            loop=loop,
            keepalive_timeout=server.deadlines.idle_s,
            lingering_time=0,
            read_bufsize=BUFFER,
            max_line_size=MAX_LINE,
            max_field_size=MAX_LINE,
            max_headers=MAX_HEADERS,
            logger=log,
            **options,
        )
        # While one request is answered, at most the next one is read.
        self._max_msg_queue_size, self._msg_queue_resume_size = 2, 0
        self._connections = server.open_connections
        self._deadlines = server.deadlines
        self._respond = server.error_response
        self._state: State = "head"
        self._head_timer: asyncio.TimerHandle | None = None  # when headers must be complete
        self._head = b""  # the beginning of incomplete headers
        self._head_bytes = 0
        self._failed = False  # the client sent invalid HTTP
        self._payload: StreamReader = EMPTY_PAYLOAD  # of the request in progress
        self._lost: asyncio.Future[None] | None = None
        # aiohttp clears its own reference before all bytes are sent.
        self._socket_transport: asyncio.WriteTransport | None = None
        self.is_paused = False  # reading waits for `resume`
        self.on_body_bytes: Callable[[], None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._socket_transport = self.transport
        setattr(transport, _RECEIVE_SIZE, READ_BYTES)
        self._connections.add(self)
        if self._connections.aborted:
            self.abort()
        else:
            self._arm()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._disarm()
        self._connections.remove(self)
        super().connection_lost(exc)
        if self._lost is not None and not self._lost.done():
            self._lost.set_result(None)

    def abort(self) -> None:
        """See `Abortable`."""
        if self._socket_transport is not None:
            self._socket_transport.abort()

    # -- what arrives

    def data_received(self, data: bytes) -> None:
        if self._failed or self._state == "linger":
            return
        num_before = len(self._messages)
        super().data_received(data)
        if len(self._messages) > num_before:
            self._disarm()
            if isinstance(self._messages[-1][0], _ErrInfo):
                self._fail(data)
            else:
                self._head, self._head_bytes = b"", 0
        elif data and self._state != "body":
            self._part_of_head(data)
        if self.on_body_bytes is not None:
            self.on_body_bytes()

    def _part_of_head(self, data: bytes) -> None:
        if self._state == "head" and self._head_timer is None:
            self._connections.start_waiting(self)  # from now on: it is a new request
            self._arm()
        self._head += data[: MAX_LINE + 2 - len(self._head)]
        self._head_bytes += len(data)
        if self._head_bytes > MAX_HEAD:
            self._refuse(
                refused(
                    431,
                    f"the headers are larger than {MAX_HEAD} bytes, which is the limit",
                    "send fewer headers",
                )
            )

    def _fail(self, data: bytes) -> None:
        """Stops reading. A body in progress fails; otherwise the error is answered after earlier requests."""
        self._failed = True
        self._head += data[: MAX_LINE + 2]
        if self._state == "body":
            self._messages.pop()
            self._payload.set_exception(web.RequestPayloadError("the chunks are not valid HTTP"))

    def _refuse(self, error: LoraxError) -> None:
        """Answers headers that are too large or too late with `error`."""
        self._disarm()
        self._failed = True
        self._messages.append((_ErrInfo(error.status, error, ""), EMPTY_PAYLOAD))
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # -- deadlines

    def _arm(self) -> None:
        self._head_timer = self._loop.call_later(self._deadlines.header_s, self._on_head_timeout)

    def _disarm(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _on_head_timeout(self) -> None:
        self._head_timer = None
        if not self._head_bytes:
            self.force_close()
            return
        seconds = f"{self._deadlines.header_s:g} s"
        self._refuse(
            refused(408, f"the headers were not complete after {seconds}", "send them faster")
        )

    def _process_keepalive(self) -> None:
        if self._head_timer is None:
            super()._process_keepalive()
        else:  # the next request has begun: only the deadline of its headers counts
            self._keepalive_handle = None

    # -- flow

    def pause(self) -> None:
        """Pauses reading until `resume`."""
        self.is_paused = True
        self._pause_transport_reading()

    def resume(self) -> None:
        if self.is_paused:
            self.is_paused = False
            self.resume_reading()

    def resume_reading(self, resume_parser: bool = True) -> None:
        if not self.is_paused:  # else aiohttp would decompress what has arrived
            super().resume_reading(resume_parser)

    def _resume_transport_reading(self) -> None:
        if not self.is_paused:
            super()._resume_transport_reading()

    # -- one request

    def begin(self, payload: StreamReader) -> None:
        """The headers of a request are complete; `payload` is its body."""
        self._payload = payload
        self._state = "body"
        if payload.is_eof():
            self.complete()

    def complete(self) -> None:
        """The body is complete."""
        self._state = "answer"
        self._connections.stop_waiting(self)

    async def finish_response(
        self, request: HttpRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        early = not self._payload.is_eof() or (self._failed and not self._messages)
        if (early or self._connections.came_late(self)) and not resp.prepared:
            resp.force_close()
        answer, reset = await super().finish_response(request, resp, start_time)
        if early and not reset and not self._connections.closing:
            await self._linger()
        self._payload, self._state = EMPTY_PAYLOAD, "head"
        self._connections.start_waiting(self)
        if self._head_bytes and not self._messages:
            self._arm()
        return answer, reset

    async def _linger(self) -> None:
        """Reads and drops the rest of the request for at most `linger_s`, then closes."""
        self._state, self._parser = "linger", None
        self._connections.start_waiting(self)
        transport = self.transport
        if transport is not None and not transport.is_closing():
            with suppress(OSError, NotImplementedError):
                transport.write_eof()
            self.resume()
            transport.resume_reading()
            if self._payload.exception() is None:
                self._payload.read_nowait()
            self._lost = self._loop.create_future()
            with suppress(TimeoutError):
                async with asyncio.timeout(self._deadlines.linger_s):
                    await self._lost
        self.force_close()

    # -- errors

    def handle_error(
        self,
        request: HttpRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """The answer to invalid HTTP, and to errors outside of routes."""
        if request.writer.output_size > 0:
            raise ConnectionError("the answer was already started")
        path = request.path
        if isinstance(exc, LoraxError):
            path, error = path_of(self._head), exc
        elif isinstance(exc, http_exceptions.HttpProcessingError):
            path, error = path_of(self._head), parser_error(exc, self._head)
        else:
            error = LoraxError("internal error", hint="see the server's log")
            log.error("a request failed outside of its route", exc_info=exc)
        response = self._respond(path, error)
        response.force_close()
        log.debug("%s: %d %s", request.remote, error.status, error)
        return response


class Server(web.Server):
    """Makes a `Connection` for each client, and answers the header Expect itself."""

    def __init__(
        self,
        made: web.Server,
        connections: Connections,
        deadlines: Deadlines,
        error_response: ErrorResponse,
        options: dict[str, Any],
    ) -> None:
        super().__init__(
            made.request_handler,
            request_factory=self._request,
            handler_cancellation=True,
            loop=asyncio.get_running_loop(),
        )
        self._options = options
        self._make = made.request_factory
        self.open_connections = connections
        self.deadlines = deadlines
        self.error_response = error_response

    def __call__(self) -> Connection:
        return Connection(self, self._loop, **self._options)

    def _request(
        self,
        message: RawRequestMessage,
        payload: StreamReader,
        protocol: web.RequestHandler,
        writer: AbstractStreamWriter,
        task: asyncio.Task[None],
    ) -> HttpRequest:
        assert isinstance(protocol, Connection), "this server made it"
        protocol.begin(payload)
        if message.method == "UNKNOWN":  # aiohttp's stand-in for an invalid request
            return self._make(
                message._replace(version=HttpVersion11), payload, protocol, writer, task
            )
        error = headers_error(message)
        expected = message.headers.get(hdrs.EXPECT)
        if expected is not None:  # aiohttp would answer it, not in our format
            headers = CIMultiDict(message.headers)
            headers.popall(hdrs.EXPECT)
            message = message._replace(headers=CIMultiDictProxy(headers))
        if message.version not in VERSIONS:
            message = message._replace(version=HttpVersion11)
        request = self._make(message, payload, protocol, writer, task)
        if self.open_connections.came_late(protocol):
            error = refused(
                503, "the server is shutting down", "send the request to another server"
            )
        if error is not None:
            request[REFUSED] = error
        request[EXPECTS_CONTINUE] = expected is not None and message.version == HttpVersion11
        return request


class Runner(web.AppRunner):
    """Runs an application on a `Server`."""

    def __init__(
        self,
        app: web.Application,
        connections: Connections,
        deadlines: Deadlines,
        error_response: ErrorResponse,
        **options: Any,
    ) -> None:
        super().__init__(app, access_log=None, **options)
        self.connections = connections
        self._deadlines = deadlines
        self._error_response = error_response

    async def _make_server(self) -> web.Server:
        made = await super()._make_server()
        options: dict[str, Any] = {"access_log": None}
        return Server(made, self.connections, self._deadlines, self._error_response, options)

    async def drain(self, timeout: float) -> bool:
        """Closes connections without a complete request and waits for the rest; False after `timeout`. Requests of new
        connections, those for health too, are refused with 503."""
        await asyncio.sleep(0)  # requests that have arrived completely start
        if self.server is not None:
            self.server.pre_shutdown()
        self.connections.close_waiting()
        return await self.connections.wait_closed(timeout)

    async def cleanup(self) -> None:
        """Closes all connections at once."""
        for site in self.sites:
            await site.stop()
        self.connections.abort()
        await super().cleanup()
