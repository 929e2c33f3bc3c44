"""The exchange ends or is stopped: nobody's request ends with it, and nobody waits for ever."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from engine.adapters.ref import AdapterRef
from engine.config import EngineConfig
from engine.errors import AdapterLoadFailed, AdapterNotFound, EngineDead
from engine.process import ProcessBackend
from engine.process.watch import Watch
from tests.process.fakes import CONFIG, SLOW, leases_of, parts, request, tokens_of, until

WATCH = Watch(tick_s=0.05, away_ticks=4, dead_ticks=20, max_ends=100, max_deaths=100)
Start = Callable[..., Awaitable[ProcessBackend]]


def ref(name: str) -> AdapterRef:
    return AdapterRef((name,))


def send(backend: ProcessBackend, number: signal.Signals) -> int:
    pid = backend.pids["exchange"]
    assert pid is not None
    os.kill(pid, number)
    return pid


async def back(backend: ProcessBackend, restarts: int = 1) -> None:
    async with asyncio.timeout(30):
        while backend.exchange_restarts < restarts or backend.exchange_away:
            await asyncio.sleep(0.01)


@pytest.fixture
async def start(caplog: pytest.LogCaptureFixture) -> AsyncIterator[Start]:
    caplog.set_level(logging.CRITICAL + 1)
    started: list[ProcessBackend] = []

    async def start(
        watch: Watch = WATCH, exchange: str = "NameExchange", config: EngineConfig = CONFIG
    ) -> ProcessBackend:
        backend = await ProcessBackend.start(config, parts("EchoEngine", exchange), watch)
        started.append(backend)
        return backend

    yield start
    for backend in started:
        await backend.close()
    started.clear()
    gc.collect()
    await asyncio.sleep(0)
    assert not psutil.Process().children() and len(asyncio.all_tasks()) == 1


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
async def test_running_requests_notice_nothing(start: Start, how: signal.Signals) -> None:
    """Streams go on, leases stay, what was granted is granted again, a question is put again."""
    backend = await start()
    streams = [
        asyncio.create_task(tokens_of(backend, request(f"{n}", [SLOW, n], 200))) for n in range(4)
    ]
    held = await backend.acquire(ref("held"), "tenant")
    idle = await backend.acquire(ref("idle"), None)
    idle.release()
    old = send(backend, how)
    await until(lambda: backend.exchange_away)
    again = await backend.acquire(ref("held"), "tenant")
    assert (again.image, again.cache_salt) == (held.image, held.cache_salt)
    assert (await backend.acquire(ref("idle"), None)).image == idle.image
    assert {status.name for status in await backend.adapters()} <= {"held", "idle", "waiting"}
    new = asyncio.create_task(backend.acquire(ref("new"), None))
    await back(backend)
    assert not psutil.pid_exists(old) and backend.pids["exchange"] != old
    assert (await new).image.name == "new"
    assert (await leases_of(backend))["held"] == 2, "the new process knows what is held"
    with pytest.raises(AdapterNotFound):
        await backend.acquire(ref("missing"), None)
    assert all(len(tokens) == 200 for tokens in await asyncio.gather(*streams))
    assert backend.alive and backend.failure is None
    for lease in (held, again):
        lease.release()
        lease.release()
    assert (await leases_of(backend))["held"] == 0


async def test_one_that_is_stopped_while_it_starts_is_replaced(start: Start) -> None:
    backend = await start()
    granted = await backend.acquire(ref("granted"), None)
    first = send(backend, signal.SIGKILL)
    await until(lambda: backend.pids["exchange"] not in (first, None))
    send(backend, signal.SIGSTOP)
    assert backend.exchange_away
    await back(backend, 2)
    assert (await backend.acquire(ref("granted"), None)).image == granted.image
    (await backend.acquire(ref("new"), None)).release()


async def test_what_is_released_while_it_is_away_is_free(start: Start) -> None:
    backend = await start()
    leases = [await backend.acquire(ref(f"a{n}"), None) for n in range(20)]
    for n in range(2):
        send(backend, signal.SIGKILL)
        await until(lambda: backend.exchange_away)
        leases.pop().release()
        waiting = asyncio.create_task(backend.unload("none"))
        await back(backend, n + 1)
        assert not await waiting
    assert sum((await leases_of(backend)).values()) == len(leases)
    for lease in leases:
        lease.release()
    assert not any((await leases_of(backend)).values())


async def test_counters_do_not_fall(start: Start) -> None:
    """A new process counts from zero."""
    backend = await start()
    held = await backend.acquire(ref("held"), None)
    (await backend.acquire(ref("other"), None)).release()
    seen = [await backend.tiers()]
    assert (seen[0].counts.loads, seen[0].host_images) == (2, 2)
    for restarts in (1, 2):
        send(backend, signal.SIGSTOP if restarts == 1 else signal.SIGKILL)
        await until(lambda: backend.exchange_away)
        seen.append(await backend.tiers())
        await back(backend, restarts)
        seen.append(await backend.tiers())
        (await backend.acquire(ref(f"new{restarts}"), None)).release()
        seen.append(await backend.tiers())
    assert [stats.counts.loads for stats in seen] == [2, 2, 2, 3, 3, 3, 4]
    assert [stats.host_images for stats in seen] == [2, 2, 2, 3, 3, 3, 4], "held ones stay"
    assert seen[-1].host_leased == 1024
    held.release()


async def test_a_process_that_goes_on_ending_is_the_end(start: Start) -> None:
    backend = await start(replace(WATCH, max_ends=3))
    stream = asyncio.create_task(tokens_of(backend, request("a", [SLOW], 100_000)))
    waiting = asyncio.create_task(backend.acquire(ref("slow"), None))
    for n in range(3):
        assert backend.alive
        send(backend, signal.SIGKILL)
        if n < 2:
            await back(backend, n + 1)
    async with asyncio.timeout(10):
        await backend.closed.wait()
        for task in (stream, waiting):
            with pytest.raises(EngineDead, match="3 times within 60 s"):
                await task
    with pytest.raises(EngineDead):
        await backend.acquire(ref("a"), None)


async def test_what_ends_it_again_and_again_is_refused(start: Start) -> None:
    """Others that waited at the same time have one more try each."""
    backend = await start(replace(WATCH, max_deaths=2))
    guilty = asyncio.create_task(backend.acquire(ref("slow"), None))
    await until(lambda: len(backend._exchange._questions) == 1)
    send(backend, signal.SIGKILL)
    await back(backend, 1)
    assert not guilty.done()
    send(backend, signal.SIGKILL)
    with pytest.raises(AdapterLoadFailed, match="ended 2 times while it loaded slow"):
        await guilty
    with pytest.raises(AdapterLoadFailed, match="ended 2 times"):
        await backend.acquire(ref("slow"), None)
    await back(backend, 2)
    (await backend.acquire(ref("other"), None)).release()


async def test_a_process_that_ends_while_starting_loads_nothing(start: Start) -> None:
    """A request that waits for the new process has no part in its end."""
    backend = await start(replace(WATCH, max_deaths=1))
    first = send(backend, signal.SIGKILL)
    await until(lambda: backend.exchange_away)
    waiting = asyncio.create_task(backend.acquire(ref("new"), None))
    await until(lambda: backend.pids["exchange"] not in (first, None))
    send(backend, signal.SIGKILL)
    await back(backend, 2)
    (await waiting).release()


async def test_an_adapter_in_use_is_not_refused(start: Start) -> None:
    """It was asked for again, as every second, when the exchange ended twice."""
    backend = await start(replace(WATCH, max_deaths=2))
    granted = await backend.acquire(ref("granted"), None)
    for _ in range(2):
        backend._exchange._suspects.record_end([ref("granted"), ref("other")])
    assert (await backend.acquire(ref("granted"), None)).image == granted.image
    with pytest.raises(AdapterLoadFailed, match="ended 2 times"):
        await backend.acquire(ref("other"), None)


async def test_who_waits_is_told_in_bounded_time(start: Start, tmp_path: Path) -> None:
    config = replace(CONFIG, model=replace(CONFIG.model, model_id=str(tmp_path / "marker")))
    watch = replace(WATCH, patience_s=0.5)
    backend = await start(watch, "SlowStartExchange", config)
    granted = await backend.acquire(ref("granted"), None)
    send(backend, signal.SIGKILL)
    await until(lambda: backend.exchange_away)
    with pytest.raises(AdapterLoadFailed, match="has been away"):
        await backend.acquire(ref("a"), None)
    with pytest.raises(AdapterLoadFailed, match="has been away"):
        await backend.unload("a")
    assert await tokens_of(backend, request("b", [1, 2])) == [1, 2]
    assert (await backend.acquire(ref("granted"), None)).image == granted.image
    assert await backend.adapters() == []


async def test_a_stopped_process_does_not_hold_up_the_end(start: Start) -> None:
    backend = await start(replace(WATCH, dead_ticks=10_000))
    send(backend, signal.SIGSTOP)
    await until(lambda: backend.exchange_away)
    async with asyncio.timeout(5):
        await backend.close()
