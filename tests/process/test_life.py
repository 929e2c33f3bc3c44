"""Start, end and death of processes: who learns of it, and what is left behind."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import psutil
import pytest

from engine.adapters.ref import AdapterRef
from engine.errors import EngineDead, ModelError
from engine.process import LocalBackend, ProcessBackend
from tests.process.fakes import CONFIG, SLOW, AnyBackend, parts, request, tokens_of, until

Start = Callable[..., Awaitable[AnyBackend]]


def open_descriptors() -> set[str]:
    links = set()
    for number in os.listdir("/proc/self/fd"):
        try:
            links.add(f"{number} {os.readlink(f'/proc/self/fd/{number}')}")
        except FileNotFoundError:
            continue  # the listing's own
    return links


@pytest.fixture(autouse=True)
async def nothing_left() -> AsyncIterator[None]:
    """Whatever a test does to its backends: no task, no descriptor and no process stays."""
    descriptors = open_descriptors()
    yield
    await asyncio.sleep(0)
    gc.collect()
    assert len(asyncio.all_tasks()) == 1
    assert open_descriptors() == descriptors
    assert not psutil.Process().children()


@pytest.fixture(params=[ProcessBackend, LocalBackend])
async def start(request: pytest.FixtureRequest, nothing_left: None) -> AsyncIterator[Start]:
    """Starts backends of one kind and closes them twice."""
    started: list[AnyBackend] = []

    async def start(*names: str) -> AnyBackend:
        started.append(await request.param.start(CONFIG, parts(*names)))
        return started[-1]

    yield start
    for backend in started:
        await backend.close()
        await backend.close()
        assert not backend.alive and backend.closed.is_set()


@pytest.fixture
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    """This process's loggers say nothing of failures that are meant."""
    caplog.set_level(logging.CRITICAL + 1)


async def test_close_ends_what_is_open(start: Start) -> None:
    backend = await start()
    calls = [
        asyncio.create_task(tokens_of(backend, request(f"{n}", [SLOW], 10_000))) for n in range(5)
    ]
    waiting = asyncio.create_task(backend.acquire(AdapterRef(("slow",)), None))
    await asyncio.sleep(0.05)
    closing = time.monotonic()
    if isinstance(backend, LocalBackend):
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
    else:
        calls.append(waiting)
    await backend.close()
    for error in await asyncio.gather(*calls, return_exceptions=True):
        assert isinstance(error, EngineDead)
    assert backend.failure is None
    assert time.monotonic() - closing < 5


async def test_engine_that_fails_every_step_is_dead(start: Start, quiet: None) -> None:
    backend = await start("BrokenEngine")
    with pytest.raises(EngineDead):
        await tokens_of(backend, request("a", [1]))
    await asyncio.wait_for(backend.closed.wait(), 5)
    assert not backend.alive and backend.failure is not None
    with pytest.raises(EngineDead):
        await tokens_of(backend, request("b", [1]))
    for call in (
        backend.acquire(AdapterRef(("a",)), None),
        backend.adapters(),
        backend.unload("a"),
        backend.tiers(),
    ):
        with pytest.raises(EngineDead):
            await call


async def test_model_that_cannot_be_loaded(start: Start) -> None:
    with pytest.raises(ModelError, match="no model echo") as failure:
        await start("MissingModel")
    assert failure.value.hint == "another one"


async def test_exchange_that_cannot_start(start: Start) -> None:
    with pytest.raises((EngineDead, ZeroDivisionError), match="clumsy"):
        await start("EchoEngine", "ClumsyExchange")


async def test_engine_that_dies_while_starting(quiet: None) -> None:
    with pytest.raises(EngineDead, match="shard process ended while starting: exit code 7"):
        await ProcessBackend.start(CONFIG, parts("DyingEngine"))


async def test_start_that_is_given_up() -> None:
    started = time.monotonic()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1.0):
            await ProcessBackend.start(CONFIG, parts("HangingEngine"))
    assert time.monotonic() - started < 3


async def test_death_of_the_shard_is_everybodys(quiet: None) -> None:
    backend = await ProcessBackend.start(CONFIG, parts())
    calls: list[asyncio.Task[object]] = [
        asyncio.create_task(tokens_of(backend, request(f"{n}", [SLOW], 10_000))) for n in range(8)
    ]
    calls.append(asyncio.create_task(backend.acquire(AdapterRef(("slow",)), None)))
    await until(lambda: backend.stats.running == 8)
    for pid in backend.pids.values():
        assert pid is not None
        os.kill(
            pid, signal.SIGINT
        )  # as a terminal and a supervisor send them to every process: the front decides
        os.kill(pid, signal.SIGTERM)
    assert await tokens_of(backend, request("a", [1, 2])) == [1, 2]
    os.kill(backend.pids["shard"] or 0, signal.SIGKILL)
    async with asyncio.timeout(1):
        errors = await asyncio.gather(*calls, return_exceptions=True)
        await backend.closed.wait()
    assert all(isinstance(error, EngineDead) for error in errors)
    assert not backend.alive and "shard" in str(backend.failure)
    with pytest.raises(EngineDead, match="shard"):
        await tokens_of(backend, request("late", [1]))
    await backend.close()


PARENT = """
import asyncio, json
from engine.process import ProcessBackend
from tests.process.fakes import CONFIG, parts, request, updates_of

async def main():
    backend = await ProcessBackend.start(CONFIG, parts())
    async for _ in updates_of(backend, request("a", [1], 1_000_000_000)):
        if backend.pids:
            print(json.dumps(backend.pids), flush=True)
            backend.__class__.pids = {}

asyncio.run(main())
"""


def test_children_of_a_killed_parent_end() -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        children = [psutil.Process(pid) for pid in json.loads(parent.stdout.readline()).values()]
        assert len(children) == 2 and all(child.is_running() for child in children)
        parent.kill()
    _, alive = psutil.wait_procs(children, timeout=5)
    assert all(child.status() == psutil.STATUS_ZOMBIE for child in alive)


def test_front_does_without_torch() -> None:
    code = "import sys, engine.process; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


async def test_lease_may_be_released_while_the_backend_closes(start: Start) -> None:
    backend = await start()
    lease = await backend.acquire(AdapterRef(("a",)), None)
    closing = asyncio.create_task(backend.close())
    await backend.closed.wait()
    await asyncio.sleep(0)  # until the processes have been told to end
    lease.release()
    await closing
