"""The open requests of a backend, and the news that each has not read yet."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import suppress

from engine.errors import EngineDead, InvalidRequest, from_wire
from engine.messages import Request, Update
from engine.process.messages import Cancel, Submit


class _Stream:
    """News of one request; what is not read is bounded by the request's own output."""

    def __init__(self) -> None:
        self.unread: list[Update] = []
        self.news = asyncio.Event()
        self.ended = False  # the last update has arrived


class Streams:
    """Every open request by its id. `send` carries messages to the engine without waiting."""

    def __init__(self, send: Callable[[Submit | Cancel], None]) -> None:
        self._send = send
        self._open: dict[str, _Stream] = {}
        self._dead: EngineDead | None = None

    def __len__(self) -> int:
        return len(self._open)

    async def generate(self, request: Request) -> AsyncIterator[Update]:
        """See `Backend.generate`. News that has arrived is still read when the engine dies."""
        if self._dead is not None:
            raise _again(self._dead)
        if request.id in self._open:
            raise InvalidRequest(f"a request with the id {request.id} is open", field="id")
        stream = self._open[request.id] = _Stream()
        try:
            self._send(Submit(request))
            while stream.unread or not stream.ended:
                await stream.news.wait()
                stream.news.clear()
                updates, stream.unread = stream.unread, []
                for update in updates:
                    if update.error is not None:
                        raise from_wire(update.error)
                    yield update
                if not stream.ended and self._dead is not None:
                    raise _again(self._dead)
        finally:
            try:
                if not stream.ended:
                    await self._let_go(request.id, stream)
            finally:
                del self._open[request.id]

    async def _let_go(self, id: str, stream: _Stream) -> None:
        """Cancels, and waits for the engine's last word: until then it may still read the adapter's image."""
        self._send(Cancel(id))
        while not stream.ended and self._dead is None:
            stream.news.clear()
            await stream.news.wait()

    def deliver(self, updates: Iterable[Update]) -> None:
        """Hands news to its readers; none is left of a request whose reader gave up waiting for the end."""
        for update in updates:
            with suppress(KeyError):
                stream = self._open[update.id]
                stream.unread.append(update)
                stream.ended = update.finish is not None or update.error is not None
                stream.news.set()

    def fail(self, error: EngineDead) -> None:
        """No more news will come, of these requests or of any other."""
        self._dead = self._dead or error
        for stream in self._open.values():
            stream.news.set()


def _again(error: EngineDead) -> EngineDead:
    """A copy for one more reader: a raised exception collects the traceback of whoever raises it."""
    return EngineDead(error.message, field=error.field, hint=error.hint)
