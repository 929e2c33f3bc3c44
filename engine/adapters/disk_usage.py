"""How full the download cache is, for those who look: they never wait long for a file system."""

from __future__ import annotations

import asyncio
import time

from engine.adapters.disk_cache import DiskCache, Usage
from engine.adapters.workers import Workers

FRESH_S = 5.0  # the disk is not read more often
PATIENCE_S = 0.25  # wait for a reading; then the last one serves
DEADLINE_S = 60.0  # of a reading


class DiskUsage:
    """The newest reading of one cache. Belongs to one event loop."""

    def __init__(self, cache: DiskCache) -> None:
        self._cache = cache
        self._workers = Workers(1, "adapter-disk")
        self._reading: asyncio.Task[Usage] | None = None
        self._read_at = -FRESH_S  # time.monotonic() of the last reading
        self.latest = Usage()

    async def read(self) -> Usage:
        """Reads the disk again, unless it was read a moment ago or a thread is stuck in it."""
        stale = time.monotonic() - self._read_at >= FRESH_S
        if self._reading is None and stale and not self._workers.abandoned:
            self._reading = asyncio.create_task(self._read())
            self._reading.add_done_callback(self._done)
        if self._reading is not None:
            await asyncio.wait({self._reading}, timeout=PATIENCE_S)
        return self.latest

    async def _read(self) -> Usage:
        deadline = time.monotonic() + DEADLINE_S
        return await self._workers.run(self._cache.usage, deadline=deadline)

    def _done(self, reading: asyncio.Task[Usage]) -> None:
        self._reading = None
        self._read_at = time.monotonic()
        if not reading.cancelled() and reading.exception() is None:
            self.latest = reading.result()

    async def close(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.wait({self._reading})
