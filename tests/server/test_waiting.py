"""One timer for many waits."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

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
    assert await woken(waiter, 0.01)
    wait = asyncio.create_task(waiter.wait(None))
    await asyncio.sleep(0.03)  # longer than the wait before had
    assert not wait.done()
    waiter.wake()
    assert await wait
    waiter.close()
    waiter.close()


async def test_one_timer_serves_many_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = asyncio.get_running_loop()
    made: list[asyncio.TimerHandle] = []
    call_at = loop.call_at

    def counted(*given: Any, **named: Any) -> asyncio.TimerHandle:
        made.append(call_at(*given, **named))
        return made[-1]

    monkeypatch.setattr(loop, "call_at", counted)
    waiter = Waiter()
    for _ in range(100):
        assert await woken(waiter, 60.0)
    assert len(made) == 1
    waiter.close()
    assert made[0].cancelled()


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
