"""Threads for calls that may never return: a file system that hangs, a source that does not answer.

A pool of fixed size stops working when all its threads are stuck. Here a job that misses its deadline is
*abandoned*: its caller gets an error, another job may start in its place, and its thread ends when it can. Memory
that it may write to is freed only then (`Job.when_ended`).
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from engine.adapters.turns import Turns
from engine.errors import AdapterLoadFailed, LoraxError, from_wire

T = TypeVar("T")

CLOSE_S = 2.0  # longest wait for running jobs on close


class Job(Generic[T]):
    """One call in its own thread."""

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
        """The result of the call, or its exception. Abandons it at `deadline` (monotonic): AdapterLoadFailed."""
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                return await asyncio.shield(self._result)
        except TimeoutError:
            self._abandon()
            raise AdapterLoadFailed(
                "loading took too long and was aborted",
                hint="the source or its file system does not answer; try again later",
            ) from None
        except asyncio.CancelledError:
            self._abandon()
            raise

    def when_ended(self, call: Callable[[], None]) -> None:
        """Calls back on the loop when the thread has ended; at once if it has."""
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
        except LoraxError as caught:  # without its frames, which hold what they read
            error = from_wire(caught.to_wire())
        except BaseException as caught:  # a thread boundary: `result` raises it
            error = caught
        try:
            self._loop.call_soon_threadsafe(self._ended, value, error)
        except RuntimeError:  # the loop is closed
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
            self._result.exception()  # marked retrieved: the caller may be gone
        else:
            self._result.set_result(value)
        endings, self._endings = self._endings, []
        for call in endings:
            call()


class Workers:
    """At most `limit` jobs at the same time, not counting abandoned ones. Belongs to one event loop.

    A free thread goes to the keys that wait for one in turn (`engine.adapters.turns`).
    """

    def __init__(self, limit: int, name: str) -> None:
        self.name = name
        self.abandoned = 0  # jobs that missed their deadline and still run
        self._threads = Turns(limit)
        self._running = 0

    async def start(
        self, call: Callable[..., T], *given: Any, deadline: float, key: str = ""
    ) -> Job[T]:
        """Starts a call in a thread, after waiting for a free one. Raises AdapterLoadFailed at `deadline`."""
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                await self._threads.acquire(key)
        except TimeoutError:
            raise AdapterLoadFailed(
                "too many adapters are loading", hint="try again later"
            ) from None
        self._running += 1
        try:
            return Job(self, lambda: call(*given))
        except BaseException:  # the thread did not start
            self.free()
            raise

    async def run(self, call: Callable[..., T], *given: Any, deadline: float, key: str = "") -> T:
        """The result of a call; see `Job.result`. The deadline includes the wait for a free thread."""
        job = await self.start(call, *given, deadline=deadline, key=key)
        return await job.result(deadline)

    def free(self) -> None:
        """Lets the next job start. Called by jobs."""
        self._running -= 1
        self._threads.release()

    async def close(self, timeout: float = CLOSE_S) -> None:
        """Waits for running jobs, up to `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while self._running and time.monotonic() < deadline:
            await asyncio.sleep(0.005)


def _close(value: object) -> None:
    """Closes a result that came too late, if it can be closed."""
    close = getattr(value, "close", None)
    if callable(close):
        close()
