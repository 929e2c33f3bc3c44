"""One timer for many waits."""

from __future__ import annotations

import asyncio

from engine.server.waiting import Waiter


async def woken(waiter: Waiter, timeout: float | None) -> bool:
    """What a wait gives that is woken when it has begun."""
    wait = asyncio.create_task(waiter.wait(timeout))
    await asyncio.sleep(0)
    waiter.wake()
    waiter.wake()  # once more is once
    return await wait


async def test_news_and_silence() -> None:
    waiter = Waiter()
    waiter.wake()  # nobody waits: not kept for later
    assert not await waiter.wait(0.01)
    for timeout in (60.0, None, 0.5, 60.0):
        assert await woken(waiter, timeout)
    assert not await waiter.wait(0.01), "sooner than the timer that stands"
    assert await woken(waiter, 0.01)
    await asyncio.sleep(0.03)  # the timer looks, and nobody waits
    assert await woken(waiter, 60.0)
    waiter.close()
    waiter.close()


async def test_a_timer_that_stands_looks_again() -> None:
    """It was set for an earlier wait; silence counts from the last one."""
    waiter, loop = Waiter(), asyncio.get_running_loop()
    assert await woken(waiter, 0.05)
    await asyncio.sleep(0.03)
    began = loop.time()
    assert not await waiter.wait(0.05)
    assert loop.time() - began >= 0.05


async def test_a_wait_can_be_cancelled() -> None:
    waiter = Waiter()
    wait = asyncio.create_task(waiter.wait(60.0))
    await asyncio.sleep(0)
    wait.cancel()
    assert isinstance(
        (await asyncio.gather(wait, return_exceptions=True))[0], asyncio.CancelledError
    )
    assert await woken(waiter, 60.0)
    waiter.close()
