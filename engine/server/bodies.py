"""Reads request bodies: one memory budget for all of them, a size limit and a deadline for each.

The budget counts decompressed bytes from their arrival until the body is parsed. When it is used up, reading pauses and
the sockets fill. The first 64 KiB of each body are never paused, so large bodies cannot delay ordinary requests. Among
larger bodies the oldest is never paused: `limit` keeps room for it. So the budget holds, and every body either
completes or reaches its deadline. While other bodies are paused, a body that grows too slowly fails, because it holds
memory that they need.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from aiohttp import StreamReader, web

from engine.errors import LoraxError, MalformedRequest
from engine.server.protocol import EXPECTS_CONTINUE, Connection
from engine.server.refusals import refused

MAX_BODY_BYTES = 32 << 20
BUDGET_BYTES = 256 << 20
OWN_SHARE = 4096  # each body may always hold this fraction of the budget (1/4096): 64 KiB
STEP = 1 << 16  # bytes that a body must grow by in SLOW_S while others are paused
SLOW_S = 5.0
LOOK_S = 1.0


@dataclass(slots=True, eq=False)
class _Body:
    """One body while it is read."""

    content: StreamReader
    connection: Connection | None
    deadline: asyncio.Timeout
    since: float  # when it had last grown by STEP, or was resumed
    counted: int = 0  # bytes in the budget
    marked: int = 0  # bytes at `since`
    held: bool = False
    given_up: bool = False
    turn: asyncio.Event = field(default_factory=asyncio.Event)


class Bodies:
    """All bodies while they are read. Routes read bodies only through `read`."""

    def __init__(
        self,
        timeout_s: float,
        most: int = MAX_BODY_BYTES,
        budget: int = BUDGET_BYTES,
        slow_s: float = SLOW_S,
    ) -> None:
        self.timeout_s = timeout_s
        self.most = most
        self.budget = budget
        self.slow_s = slow_s
        self.limit = max(0, budget - most)  # bytes at which all but the oldest are paused
        self.own = budget // OWN_SHARE
        self.num_bytes = 0  # of all bodies
        self._open: set[_Body] = set()
        # Bodies of more than `own` bytes, oldest first.
        self._large: OrderedDict[_Body, None] = OrderedDict()
        self._full = False
        self._num_held = 0
        self._look: asyncio.TimerHandle | None = None

    @property
    def num_open(self) -> int:
        return len(self._open)

    @property
    def num_held(self) -> int:
        """Paused bodies."""
        return self._num_held

    @asynccontextmanager
    async def read(self, request: web.Request) -> AsyncIterator[bytearray]:
        """The whole body. Its bytes count until the block is left, so the block must not wait.

        Raises MalformedRequest, or an error of status 408 or 413.
        """
        if (request.content_length or 0) > self.most:
            raise self._too_large()
        connection = request.protocol if isinstance(request.protocol, Connection) else None
        now = asyncio.get_running_loop().time()
        body: _Body | None = None
        try:
            try:
                async with asyncio.timeout(self.timeout_s) as deadline:
                    body = _Body(request.content, connection, deadline, since=now)
                    self._enter(body)
                    data = await self._collect(request, body)
            except TimeoutError:
                raise self._too_slow(body) from None
            except web.RequestPayloadError as error:
                raise MalformedRequest(f"the body cannot be read: {_said(error)}") from None
            if connection is not None:
                connection.on_body_bytes = None
                connection.complete()
            yield data
        finally:
            if body is not None:
                self._leave(body)

    async def _collect(self, request: web.Request, body: _Body) -> bytearray:
        data, content = bytearray(), body.content
        if request.get(EXPECTS_CONTINUE) and not content.is_eof():
            await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            request.writer.output_size = 0  # no byte of the answer is sent yet
        while not content.at_eof():
            if body.held and not content.is_eof():
                await body.turn.wait()
            data += await content.readany()
            self._grew(body)
            if len(data) > self.most:
                raise self._too_large()
            if not content.at_eof():
                await asyncio.sleep(0)  # let others run: a small body may decompress to a large one
        return data

    def _too_large(self) -> LoraxError:
        return refused(
            413,
            f"the body is larger than {self.most} bytes, which is the limit",
            "send a smaller body",
        )

    def _too_slow(self, body: _Body | None) -> LoraxError:
        if body is not None and body.given_up:
            return refused(
                408,
                f"the body grew by less than {STEP} bytes in {self.slow_s:g} s while others waited for memory",
                "send the body faster",
            )
        return refused(
            408, f"the body was not complete after {self.timeout_s:g} s", "send the body faster"
        )

    # -- the budget

    def _enter(self, body: _Body) -> None:
        self._open.add(body)
        if body.connection is not None:
            body.connection.on_body_bytes = lambda: self._grew(body)
        self._grew(body)

    def _leave(self, body: _Body) -> None:
        self._open.remove(body)
        self._large.pop(body, None)
        self.num_bytes -= body.counted
        if body.connection is not None:
            body.connection.on_body_bytes = None
            body.connection.resume()
        self._num_held -= body.held
        if self._num_held or self._full:
            self._settle_all()

    def _grew(self, body: _Body) -> None:
        """Counts the bytes of `body` that have arrived."""
        grown = body.content.total_bytes - body.counted
        if grown:
            body.counted += grown
            self.num_bytes += grown
            if body.counted > self.own:
                self._large.setdefault(body)
            if body.counted >= body.marked + STEP:
                body.marked, body.since = body.counted, asyncio.get_running_loop().time()
        if (self.num_bytes >= self.limit) != self._full:
            self._settle_all()
        else:
            self._settle(body)

    def _settle_all(self) -> None:
        self._full = self.num_bytes >= self.limit
        for body in self._large:
            self._settle(body)

    def _settle(self, body: _Body) -> None:
        """Pauses or resumes `body`, depending on the budget."""
        hold = self._full and body in self._large and next(iter(self._large)) is not body
        if hold == body.held:
            return
        body.held = hold
        self._num_held += 1 if hold else -1
        if hold:
            body.turn.clear()
            self._watch()
            if body.connection is not None:
                body.connection.pause()
        else:
            body.since = asyncio.get_running_loop().time()
            body.marked = body.counted
            body.turn.set()
            if body.connection is not None:
                body.connection.resume()

    def _watch(self) -> None:
        if self._look is None:
            wait = min(LOOK_S, self.slow_s)
            self._look = asyncio.get_running_loop().call_later(wait, self._give_up_slow)

    def _give_up_slow(self) -> None:
        """Fails bodies that hold memory and grow too slowly, while others are paused."""
        self._look = None
        if not self._num_held:
            return
        self._watch()
        latest = asyncio.get_running_loop().time() - self.slow_s
        for body in self._large:
            if not body.held and not body.given_up and body.since <= latest:
                body.given_up = True
                body.deadline.reschedule(latest)  # in the past: it expires now


def _said(error: web.RequestPayloadError) -> str:
    """The last line of aiohttp's message, which has the cause."""
    return str(error).strip().rpartition("\n")[2].strip() or "the connection ended early"
