"""Threads that may be stuck: they cost their own jobs, and nothing for ever."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from engine.adapters.workers import Workers
from engine.errors import AdapterLoadFailed, AdapterNotFound


def soon(seconds: float = 60.0) -> float:
    return time.monotonic() + seconds


async def test_results_and_errors_come_back() -> None:
    def fail() -> None:
        raise AdapterNotFound("none")

    workers = Workers(3, "test")
    calls = (workers.run(pow, n, 2, deadline=soon()) for n in range(100))
    assert await asyncio.gather(*calls) == [n * n for n in range(100)]
    with pytest.raises(AdapterNotFound):
        await workers.run(fail, deadline=soon())
    await workers.close()


async def test_no_more_than_the_limit_run_at_a_time() -> None:
    running, most, lock = 0, 0, threading.Lock()

    def work() -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.002)
        with lock:
            running -= 1

    workers = Workers(4, "test")
    await asyncio.gather(*(workers.run(work, deadline=soon()) for _ in range(60)))
    assert most <= 4


async def test_a_free_thread_goes_to_the_keys_in_turn() -> None:
    """However many jobs of one key wait, the first of another starts next."""
    gate, started = threading.Semaphore(0), asyncio.Queue[str]()
    loop = asyncio.get_running_loop()

    def work(name: str) -> None:
        loop.call_soon_threadsafe(started.put_nowait, name)
        gate.acquire(timeout=60)

    workers = Workers(4, "test")
    names = [f"a{number}" for number in range(54)]
    jobs = [
        asyncio.create_task(workers.run(work, name, deadline=soon(), key="a")) for name in names
    ]
    order = [await started.get() for _ in range(4)]
    jobs += [
        asyncio.create_task(workers.run(work, name, deadline=soon(), key="b"))
        for name in ("b0", "b1")
    ]
    await asyncio.sleep(0)
    for _ in range(54 - 4 + 2):
        gate.release()
        order.append(await started.get())
    assert set(order[:4]) == set(names[:4])
    assert order[4:] == ["b0", "a4", "b1", *names[5:]]
    for _ in range(4):
        gate.release()
    await asyncio.gather(*jobs)


class Late:
    """Something open that comes when nobody wants it."""

    def __init__(self) -> None:
        self.closed = threading.Event()

    def close(self) -> None:
        self.closed.set()


async def test_stuck_jobs_are_given_up_and_others_go_on() -> None:
    gate, late, ended = threading.Event(), Late(), []

    def stuck() -> Late:
        gate.wait(60)
        return late

    workers = Workers(2, "test")
    jobs = [await workers.start(stuck, deadline=soon()) for _ in range(2)]
    with pytest.raises(AdapterLoadFailed, match="too many"):
        await workers.run(pow, 2, 2, deadline=soon(0.05))
    for job in jobs:
        job.when_ended(lambda: ended.append("early"))
        with pytest.raises(AdapterLoadFailed, match="took too long"):
            await job.result(soon(0.05))
        job.when_ended(lambda: ended.append("late"))
    assert workers.abandoned == 2 and ended == []
    assert await workers.run(pow, 2, 2, deadline=soon()) == 4, "their places are free"
    await workers.close()
    gate.set()
    while len(ended) < 4:
        await asyncio.sleep(0.005)
    assert workers.abandoned == 0 and late.closed.is_set()
    jobs[0].when_ended(lambda: ended.append("after"))
    assert ended[-1] == "after"


async def test_cancelling_gives_up_too() -> None:
    gate = threading.Event()
    workers = Workers(1, "test")
    waiting = asyncio.create_task(workers.run(gate.wait, 60, deadline=soon()))
    await asyncio.sleep(0.05)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert workers.abandoned == 1
    assert await workers.run(pow, 3, 2, deadline=soon()) == 9
    gate.set()
    while workers.abandoned:
        await asyncio.sleep(0.005)
