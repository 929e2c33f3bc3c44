"""HTTP on one connection: aiohttp's protocol with our deadlines, our errors, and nothing held for those who send late.

A connection waits for headers (`head`) and for a body (`body`), is answered (`answer`), and may be read a little longer
after an answer that came before the end of its request (`over`): closing at once could lose the answer on its way. What
is read then is dropped; so is everything after a request that is not valid HTTP.
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
    of_headers,
    of_parser,
    path_of,
    refused,
)

log = logging.getLogger(__name__)

IDLE_S = 75.0  # that a connection may stay open between two requests
LINGER_S = 5.0  # that a connection is read after an early answer
MAX_HEAD = 1 << 16  # bytes of a request line and all headers
RECEIVED = 1 << 14  # bytes that are read from a socket at one time
BUFFER = 1 << 14  # bytes of a body that may wait for its reader; twice as many stop reading
_RECEIVE_SIZE = "max_size"  # asyncio's name for RECEIVED on its transports
REFUSED = web.RequestKey("refused", LoraxError)  # what is wrong with the headers
CONTINUES = web.RequestKey("continues", bool)  # the body is sent after `100 Continue` only

State = Literal["head", "body", "answer", "over"]
HttpRequest = web.BaseRequest
ErrorResponse = Callable[[str, LoraxError], web.Response]  # of the path and the error


@dataclass(slots=True)
class Deadlines:
    header_s: float
    idle_s: float = IDLE_S
    linger_s: float = LINGER_S


class Connection(web.RequestHandler):
    """One client. Private names of aiohttp's class are used where it has no other seam; constraints.txt pins it."""

    __slots__ = (
        "_connections",
        "_deadlines",
        "_failed",
        "_head",
        "_head_bytes",
        "_late",
        "_over",
        "_payload",
        "_respond",
        "_state",
        "_wire",
        "growing",
        "held",
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
        # While one request is answered, little is read beyond the next one.
        self._max_msg_queue_size, self._msg_queue_resume_size = 2, 0
        self._connections = server.open_connections
        self._deadlines = server.deadlines
        self._respond = server.error_response
        self._state: State = "head"
        self._late: asyncio.TimerHandle | None = None  # when headers must be complete
        self._head = b""  # the beginning of incomplete headers
        self._head_bytes = 0
        self._failed = False  # what came is not HTTP
        self._payload: StreamReader = EMPTY_PAYLOAD  # of the request in progress
        self._over: asyncio.Future[None] | None = None
        self._wire: asyncio.WriteTransport | None = (
            None  # aiohttp forgets its own before all is sent
        )
        self.held = False  # reading waits for `go_on`
        self.growing: Callable[[], None] | None = None  # called when a body has grown

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._wire = self.transport
        setattr(transport, _RECEIVE_SIZE, RECEIVED)
        self._connections.add(self)
        if self._connections.closing:
            self.abort()
        else:
            self._arm()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._disarm()
        self._connections.remove(self)
        super().connection_lost(exc)
        if self._over is not None and not self._over.done():
            self._over.set_result(None)

    def abort(self) -> None:
        """See `Closable`."""
        if self._wire is not None:
            self._wire.abort()

    # -- what arrives

    def data_received(self, data: bytes) -> None:
        if self._failed or self._state == "over":
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
        if self.growing is not None:
            self.growing()

    def _part_of_head(self, data: bytes) -> None:
        if self._state == "head" and self._late is None:
            self._connections.wait(self)  # anew: it is a new request
            self._arm()
        self._head += data[: MAX_LINE + 2 - len(self._head)]
        self._head_bytes += len(data)
        if self._head_bytes > MAX_HEAD:
            self._refuse(
                refused(431, f"the headers are larger than {MAX_HEAD} bytes", "send fewer")
            )

    def _fail(self, data: bytes) -> None:
        """Nothing more can be read: a body in progress fails, else the error is answered in its turn."""
        self._failed = True
        self._head += data[: MAX_LINE + 2]
        if self._state == "body":
            self._messages.pop()
            self._payload.set_exception(web.RequestPayloadError("it is not valid HTTP"))

    def _refuse(self, error: LoraxError) -> None:
        """Answers headers that never become complete."""
        self._disarm()
        self._failed = True
        self._messages.append((_ErrInfo(error.status, error, ""), EMPTY_PAYLOAD))
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # -- deadlines

    def _arm(self) -> None:
        self._late = self._loop.call_later(self._deadlines.header_s, self._head_late)

    def _disarm(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _head_late(self) -> None:
        self._late = None
        if not self._head_bytes:
            self.force_close()
            return
        seconds = f"{self._deadlines.header_s:g} s"
        self._refuse(refused(408, f"the headers were not complete after {seconds}", "send again"))

    def _process_keepalive(self) -> None:
        if self._late is None:
            super()._process_keepalive()
        else:  # a request has begun; the deadline of its headers counts
            self._keepalive_handle = None

    # -- flow

    def hold(self) -> None:
        """Reads nothing more until `go_on`."""
        self.held = True
        self._pause_transport_reading()

    def go_on(self) -> None:
        if self.held:
            self.held = False
            self.resume_reading()

    def resume_reading(self, resume_parser: bool = True) -> None:
        if not self.held:  # else what has arrived is not unpacked either
            super().resume_reading(resume_parser)

    def _resume_transport_reading(self) -> None:
        if not self.held:
            super()._resume_transport_reading()

    # -- one request

    def begin(self, payload: StreamReader) -> None:
        """A request has its headers; `payload` is its body."""
        self._payload = payload
        self._state = "body"
        if payload.is_eof():
            self.complete()

    def complete(self) -> None:
        """A request has its body, too."""
        self._state = "answer"
        self._connections.answer(self)

    async def finish_response(
        self, request: HttpRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        early = not self._payload.is_eof() or (self._failed and not self._messages)
        if early and not resp.prepared:
            resp.force_close()
        answer, reset = await super().finish_response(request, resp, start_time)
        if early and not reset and not self._connections.closing:
            await self._linger()
        self._payload, self._state = EMPTY_PAYLOAD, "head"
        self._connections.wait(self)
        if self._head_bytes and not self._messages:
            self._arm()
        return answer, reset

    async def _linger(self) -> None:
        """Reads and drops what the client still sends, for a while; then closes."""
        self._state, self._parser = "over", None
        self._connections.wait(self)
        transport = self.transport
        if transport is not None and not transport.is_closing():
            with suppress(OSError, NotImplementedError):
                transport.write_eof()
            self.go_on()
            transport.resume_reading()
            if self._payload.exception() is None:
                self._payload.read_nowait()
            self._over = self._loop.create_future()
            with suppress(TimeoutError):
                async with asyncio.timeout(self._deadlines.linger_s):
                    await self._over
        self.force_close()

    # -- errors

    def handle_error(
        self,
        request: HttpRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """The answer to what is not HTTP, and to what failed outside of all routes."""
        if request.writer.output_size > 0:
            raise ConnectionError("an answer has begun")
        path = request.path
        if isinstance(exc, LoraxError):
            path, error = path_of(self._head), exc
        elif isinstance(exc, http_exceptions.HttpProcessingError):
            path, error = path_of(self._head), of_parser(exc, self._head)
        else:
            error = LoraxError("internal error", hint="see the server's log")
            log.error("a request failed", exc_info=exc)
        response = self._respond(path, error)
        response.force_close()
        log.debug("%s: %d %s", request.remote, error.status, error)
        return response


class Server(web.Server):
    """Makes a `Connection` for each client, and requests whose header Expect is ours to answer."""

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
        assert isinstance(protocol, Connection), "made by this server"
        protocol.begin(payload)
        if message.method == "UNKNOWN":  # aiohttp's stand-in for what was no request
            return self._make(
                message._replace(version=HttpVersion11), payload, protocol, writer, task
            )
        error = of_headers(message)
        expected = message.headers.get(hdrs.EXPECT)
        if expected is not None:  # aiohttp answers it before our errors have a shape
            headers = CIMultiDict(message.headers)
            headers.popall(hdrs.EXPECT)
            message = message._replace(headers=CIMultiDictProxy(headers))
        if message.version not in VERSIONS:
            message = message._replace(version=HttpVersion11)
        request = self._make(message, payload, protocol, writer, task)
        if error is not None:
            request[REFUSED] = error
        request[CONTINUES] = expected is not None and message.version == HttpVersion11
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
        """Stops listening, closes what has no complete request, and waits for the answers; False if some are open."""
        for site in self.sites:
            await site.stop()
        await asyncio.sleep(0)  # what has arrived completely is begun
        if self.server is not None:
            self.server.pre_shutdown()
        self.connections.close_waiting()
        return await self.connections.gone(timeout)

    async def cleanup(self) -> None:
        """Ends what is open, at once."""
        for site in self.sites:
            await site.stop()
        self.connections.abort()
        await super().cleanup()
