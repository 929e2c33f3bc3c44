"""Turns at something scarce, fair between keys: threads and memory for the loads of several tenants."""

from __future__ import annotations

import asyncio
from collections import deque

from engine.adapters.versions import Lru

MAX_KEYS = 4096  # keys whose last turn is remembered


class Turns:
    """A semaphore for `limit` holders. Belongs to one event loop.

    A free turn goes to the waiting key whose last turn is the longest ago, and within a key to its oldest waiter: keys
    that wait are served in turn, however many waiters each has. A new key comes first.
    """

    def __init__(self, limit: int) -> None:
        self._free = limit  # 0 while anybody waits
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}  # no queue is empty
        self._last: Lru[str, int] = Lru(MAX_KEYS)  # key -> number of its last turn
        self._given = 0

    async def acquire(self, key: str = "") -> None:
        """Waits for a turn. May be cancelled."""
        if self._free:
            self._free -= 1
            self._count(key)
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(key, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # it was given in the same moment
                self.release()
            elif turn in self._waiting.get(key, ()):
                self._drop(key, turn)
            raise

    def release(self) -> None:
        """Ends a turn and gives it to the next waiter."""
        while self._waiting:
            key = min(self._waiting, key=lambda key: self._last.get(key) or 0)
            turn = self._waiting[key][0]
            self._drop(key, turn)
            if not turn.done():  # one that was cancelled is still here until its task runs
                self._count(key)
                turn.set_result(None)
                return
        self._free += 1

    def _count(self, key: str) -> None:
        self._given += 1
        self._last.put(key, self._given)

    def _drop(self, key: str, turn: asyncio.Future[None]) -> None:
        queue = self._waiting[key]
        queue.remove(turn)
        if not queue:
            del self._waiting[key]
