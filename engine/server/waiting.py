"""Waiting for news, or for silence."""

from __future__ import annotations

import asyncio


class Waiter:
    """The waits of one reader, one at a time.

    One timer serves all of them: tokens come every few milliseconds, and a timer for each would be a quarter of what a
    streamed token costs.
    """

    def __init__(self) -> None:
        self._news: asyncio.Future[bool] | None = None  # False: nothing came
        self._timer: asyncio.TimerHandle | None = None  # when to look for silence
        self._silent_at = 0.0

    async def wait(self, timeout: float | None) -> bool:
        """Until the next `wake`: True; False after `timeout` seconds without one."""
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
        """No timer is left behind. Idempotent."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        """Silence, or else a later look."""
        self._timer = None
        if self._news is None or self._news.done():
            return
        loop = asyncio.get_running_loop()
        if loop.time() >= self._silent_at:
            self._news.set_result(False)
        else:
            self._timer = loop.call_at(self._silent_at, self._look)
