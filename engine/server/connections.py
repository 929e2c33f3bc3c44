"""All connections of the server: accepts them, limits their number, and closes some to make room.

A connection *waits* while it has no complete request: it still sends headers or a body, or it is idle. At the limit,
each new connection closes the one that has waited longest. A connection whose request is being answered is never closed
to make room.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import resource
import socket
import time
from collections import OrderedDict
from contextlib import suppress
from typing import Protocol

from aiohttp import web

log = logging.getLogger(__name__)

BACKLOG = 1024
MAX_DESCRIPTORS = 65536  # children inherit the limit, and some programs loop over all of it
RESERVE = 128  # descriptors that connections leave for everything else
HEADROOM = 32  # connections above the limit when none can be closed, so that /health still answers
MAX_ACCEPTS = 32  # connections accepted before other tasks run
POLL_S = 0.02
BACK_OFF_S = (0.1, 1.0)  # first and longest pause of accepting without descriptors or memory
WARNING_INTERVAL_S = 60.0  # between two log lines about the same problem
EXHAUSTED = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}


class Abortable(Protocol):
    def abort(self) -> None:
        """Closes the connection now. Unsent bytes are lost."""
        ...


class ThrottledWarning:
    """Warnings about one problem: the first at once, then at most one a minute, with a count."""

    def __init__(self) -> None:
        self._count = 0
        self._next = 0.0

    def warn(self, message: str) -> None:
        self._count += 1
        now = time.monotonic()
        if now >= self._next:
            log.warning("%s (%d times since the last such warning)", message, self._count)
            self._count, self._next = 0, now + WARNING_INTERVAL_S


class Connections:
    """All connections of one server. With `limit` open, a new one closes one that waits."""

    def __init__(self, limit: int, headroom: int = HEADROOM) -> None:
        self.limit = limit
        self.headroom = headroom
        self.closing = False  # the server stops: it takes no more requests
        self.aborted = False  # new connections are closed at once
        self._last: set[Abortable] = set()  # that were open when it began to stop, and not waiting
        self._open: set[Abortable] = set()
        self._waiting: OrderedDict[Abortable, None] = OrderedDict()  # longest first
        self._full = ThrottledWarning()

    @property
    def num_open(self) -> int:
        return len(self._open)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def add(self, connection: Abortable) -> None:
        self._open.add(connection)
        self.start_waiting(connection)

    def remove(self, connection: Abortable) -> None:
        self._open.discard(connection)
        self._waiting.pop(connection, None)

    def start_waiting(self, connection: Abortable) -> None:
        """`connection` begins to wait for a complete request. While the server stops, its last answer is sent first."""
        if connection in self._open and not self.closing:
            self._waiting[connection] = None
            self._waiting.move_to_end(connection)

    def stop_waiting(self, connection: Abortable) -> None:
        """`connection` has a complete request and no longer waits."""
        self._waiting.pop(connection, None)

    def has_room(self, arriving: int) -> bool:
        """Whether one more may be accepted; `arriving` are accepted and not yet open."""
        return bool(self._waiting) or self.num_open + arriving < self.limit + self.headroom

    def make_room(self, arriving: int) -> None:
        """After accepting one more: closes a waiting connection at the limit."""
        if self.num_open + arriving >= self.limit:
            self._full.warn(
                f"{self.limit} connections are open, which is the limit: closing the one that waited longest"
            )
            self.close_longest_waiting()

    def close_longest_waiting(self) -> bool:
        """Closes the connection that has waited longest; False if none waits."""
        if not self._waiting:
            return False
        connection, _ = self._waiting.popitem(last=False)
        self._open.discard(connection)  # its descriptor is free in the next iteration of the loop
        connection.abort()
        return True

    def close_waiting(self) -> None:
        """The server stops: closes connections that wait."""
        self.closing = True
        while self.close_longest_waiting():
            pass
        self._last = set(self._open)

    def came_late(self, connection: Abortable) -> bool:
        """Whether it was opened after the server began to stop."""
        return self.closing and connection not in self._last

    def abort(self) -> None:
        """Closes every connection, and new ones."""
        self.closing = self.aborted = True
        for connection in list(self._open):
            connection.abort()

    async def wait_closed(self, timeout: float) -> bool:
        """Waits until those are closed that were open when the server began to stop; False after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while self._last & self._open:
            if time.monotonic() >= deadline:
                return False
            await asyncio.sleep(POLL_S)
        return True


def raise_descriptor_limit() -> None:
    """Raises the limit of open files for this process and its children, up to the hard limit or 65,536."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MAX_DESCRIPTORS)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        log.debug("raised the limit of open files from %d to %d", soft, wanted)


def make_connections(max_concurrent_requests: int) -> Connections:
    """As many connections as the limit of open files allows. Warns if max_concurrent_requests is larger."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        soft = MAX_DESCRIPTORS
    free = max(8, soft - _num_descriptors())
    reserve = min(RESERVE, free // 2)
    limit = free - reserve
    if limit < max_concurrent_requests:
        log.warning(
            "max_concurrent_requests is %d, but the limit of open files (%d) allows only %d connections: raise it"
            " (ulimit -n) or lower --max-concurrent-requests",
            max_concurrent_requests,
            soft,
            limit,
        )
    return Connections(limit, min(HEADROOM, reserve // 2))


def _num_descriptors() -> int:
    try:
        return len(os.listdir("/proc/self/fd"))
    except OSError:
        return RESERVE


class Site(web.BaseSite):
    """Listens on an address. Replaces asyncio's accept loop, which logs every failed attempt without descriptors."""

    def __init__(
        self,
        runner: web.BaseRunner,
        connections: Connections,
        host: str,
        port: int,
    ) -> None:
        super().__init__(runner, backlog=BACKLOG)
        self._connections = connections
        self._address = (host, port)
        self._listening: list[socket.socket] = []
        self._arriving: set[asyncio.Task[None]] = set()
        self._paused: dict[socket.socket, asyncio.TimerHandle] = {}
        self._delay = BACK_OFF_S[0]
        self._exhausted = ThrottledWarning()

    @property
    def name(self) -> str:
        host, port = self._address
        return f"http://{host}:{port}"

    async def start(self) -> None:
        """Raises OSError if the server cannot listen on the address."""
        await super().start()
        loop, server = asyncio.get_running_loop(), self._runner.server
        assert server is not None, "the runner is set up"
        # Binds only; `runner.addresses` and `stop` use it. `_accept` accepts.
        bound = await loop.create_server(server, *self._address, start_serving=False)
        self._server = bound
        for one in bound.sockets:
            own = one.dup()
            own.setblocking(False)
            own.listen(BACKLOG)
            self._listening.append(own)
            loop.add_reader(own, self._accept, own)

    async def stop(self) -> None:
        loop = asyncio.get_running_loop()
        for timer in self._paused.values():
            timer.cancel()
        for one in self._listening:
            loop.remove_reader(one)
            one.close()
        self._listening.clear()
        await super().stop()

    def _accept(self, listening: socket.socket) -> None:
        for _ in range(min(MAX_ACCEPTS, max(1, self._connections.headroom))):
            if not self._connections.has_room(len(self._arriving)):
                self._pause(listening)
                return
            try:
                accepted, _ = listening.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno in EXHAUSTED:
                    self._exhausted.warn(f"cannot accept connections: {error.strerror}")
                    self._connections.close_longest_waiting()
                    self._pause(listening)
                    return
                log.warning("cannot accept a connection: %s", error.strerror)
                return
            self._delay = BACK_OFF_S[0]
            self._connections.make_room(len(self._arriving))
            task = asyncio.create_task(self._serve(accepted))
            self._arriving.add(task)
            task.add_done_callback(self._arriving.discard)

    async def _serve(self, accepted: socket.socket) -> None:
        server = self._runner.server
        if server is None:
            accepted.close()
            return
        accepted.setblocking(False)
        try:
            await asyncio.get_running_loop().connect_accepted_socket(server, accepted)
        except OSError as error:  # the client closed it first
            accepted.close()
            log.debug("cannot serve a connection: %s", error.strerror)

    def _pause(self, listening: socket.socket) -> None:
        """Stops accepting for a while. New connections wait in the kernel."""
        loop = asyncio.get_running_loop()
        loop.remove_reader(listening)
        self._paused[listening] = loop.call_later(self._delay, self._resume, listening)
        self._delay = min(2 * self._delay, BACK_OFF_S[1])

    def _resume(self, listening: socket.socket) -> None:
        del self._paused[listening]
        asyncio.get_running_loop().add_reader(listening, self._accept, listening)
