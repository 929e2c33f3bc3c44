"""Threads for work that may never come back: a file system that hangs, a source that says nothing.

A pool of fixed threads is lost when each of them is stuck once. Here a job that misses its deadline is *abandoned*: its
place is free for the next one, whoever waited is told, and its thread ends whenever it can. What it still writes to is
given free only then (`Job.when_ended`).
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from engine.errors import AdapterLoadFailed

T = TypeVar("T")

CLOSE_S = 2.0  # that jobs get to end when nobody wants their results any more


class Job(Generic[T]):
    """One call in a thread of its own."""

    def __init__(self, workers: Workers, call: Callable[[], T]) -> None:
        self.abandoned = False
        self._workers = workers
        self._call = call
        self._loop = asyncio.get_running_loop()
        self._result: asyncio.Future[T] = self._loop.create_future()
        self._has_ended = False
        self._endings: list[Callable[[], None]] = []
        threading.Thread(target=self._work, name=workers.name, daemon=True).start()

    async def result(self, deadline: float) -> T:
        """What the call returned or raised. Raises AdapterLoadFailed, and abandons it, at `deadline` (monotonic)."""
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                return await asyncio.shield(self._result)
        except TimeoutError:
            self._abandon()
            raise AdapterLoadFailed(
                "loading took too long and was given up",
                hint="the source or its file system does not answer; try again later",
            ) from None
        except asyncio.CancelledError:
            self._abandon()
            raise

    def when_ended(self, call: Callable[[], None]) -> None:
        """Calls back on the loop once the thread can touch nothing any more; at once if that is so already."""
        if self._has_ended:
            call()
        else:
            self._endings.append(call)

    def _abandon(self) -> None:
        if not self._has_ended and not self.abandoned:
            self.abandoned = True
            self._workers.abandoned += 1
            self._workers.free()
            self._result.cancel()

    def _work(self) -> None:
        value: Any = None
        error: BaseException | None = None
        try:
            value = self._call()
        except (
            BaseException
        ) as caught:  # a thread's boundary: it is raised where the job is awaited
            value, error = None, caught
        try:
            self._loop.call_soon_threadsafe(self._ended, value, error)
        except RuntimeError:  # the loop is closed: nobody waits
            _close(value)

    def _ended(self, value: Any, error: BaseException | None) -> None:
        self._has_ended = True
        if self.abandoned:
            self._workers.abandoned -= 1
        else:
            self._workers.free()
        if self._result.done():
            _close(value)
        elif error is not None:
            self._result.set_exception(error)
            self._result.exception()  # whoever waited may be gone
        else:
            self._result.set_result(value)
        endings, self._endings = self._endings, []
        for call in endings:
            call()


class Workers:
    """At most `limit` jobs at a time, the abandoned ones not counted. Lives on one event loop."""

    def __init__(self, limit: int, name: str) -> None:
        self.name = name
        self.abandoned = 0  # threads that are stuck
        self._places = asyncio.Semaphore(limit)
        self._limit = limit
        self._running = 0

    async def start(self, call: Callable[..., T], *given: Any, deadline: float) -> Job[T]:
        """Begins a call in a thread when there is a place for it. Raises AdapterLoadFailed at `deadline`."""
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                await self._places.acquire()
        except TimeoutError:
            raise AdapterLoadFailed(
                "too many adapters are being loaded", hint="try again later"
            ) from None
        self._running += 1
        try:
            return Job(self, lambda: call(*given))
        except BaseException:  # no thread can be started
            self.free()
            raise

    async def run(self, call: Callable[..., T], *given: Any, deadline: float) -> T:
        """What a call returns; see `Job.result`. The wait for a place counts."""
        job = await self.start(call, *given, deadline=deadline)
        return await job.result(deadline)

    def free(self) -> None:
        """A place is free. Called by jobs."""
        self._running -= 1
        self._places.release()

    async def close(self, timeout: float = CLOSE_S) -> None:
        """Waits for running jobs, but not for those that are stuck."""
        deadline = time.monotonic() + timeout
        while self._running and time.monotonic() < deadline:
            await asyncio.sleep(0.005)


def _close(value: object) -> None:
    """What came too late for anybody, if it holds something open."""
    close = getattr(value, "close", None)
    if callable(close):
        close()
