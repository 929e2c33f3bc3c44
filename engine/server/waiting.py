"""Waiting for an event, with a cheap timeout."""

from __future__ import annotations

import asyncio


class Waiter:
    """The waits of one reader, one at a time.

    All waits share one timer. Tokens come every few milliseconds, and a timer for each would be a quarter of the cost
    of a streamed token.
    """

    def __init__(self) -> None:
        self._news: asyncio.Future[bool] | None = None  # False: the timeout
        self._timer: asyncio.TimerHandle | None = None  # calls `_look`
        self._silent_at = 0.0

    async def wait(self, timeout: float | None) -> bool:
        """Waits for the next `wake`; False if none comes within `timeout` seconds."""
        loop = asyncio.get_running_loop()
        self._news = loop.create_future()
        if timeout is None:
            self.close()
        else:
            self._silent_at = loop.time() + timeout
            if self._timer is None or self._timer.when() > self._silent_at:
                self.close()
                self._timer = loop.call_at(self._silent_at, self._look)
        try:
            return await self._news
        finally:
            self._news = None

    def wake(self) -> None:
        if self._news is not None and not self._news.done():
            self._news.set_result(True)

    def close(self) -> None:
        """Cancels the timer. Idempotent."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        """Ends the wait if its timeout has passed, else looks again later."""
        self._timer = None
        if self._news is None or self._news.done():
            return
        loop = asyncio.get_running_loop()
        if loop.time() >= self._silent_at:
            self._news.set_result(False)
        else:
            self._timer = loop.call_at(self._silent_at, self._look)
