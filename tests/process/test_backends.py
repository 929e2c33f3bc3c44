"""Both backends: what a caller sees does not depend on where the engine runs."""

from __future__ import annotations

import asyncio
import logging
import os
import random
from collections.abc import AsyncIterator
from contextlib import aclosing

import msgspec
import pytest
import pytest_asyncio

from engine.adapters.ref import AdapterRef
from engine.errors import AdapterLoadFailed, AdapterNotFound, GenerationError, InvalidRequest
from engine.messages import TenantRef
from engine.process import LocalBackend, ProcessBackend
from tests.process.fakes import (
    CONFIG,
    POISON,
    REFUSED,
    SLOW,
    AnyBackend,
    digest,
    leases_of,
    parts,
    request,
    tokens_of,
    until,
    updates_of,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(params=[ProcessBackend, LocalBackend], loop_scope="module", scope="module")
async def backend(request: pytest.FixtureRequest) -> AsyncIterator[AnyBackend]:
    """One backend for all tests; they leave it idle."""
    backend = await request.param.start(CONFIG, parts())
    yield backend
    await until(lambda: backend.stats.running == backend.stats.waiting == 0)
    assert not any((await leases_of(backend)).values())
    assert backend.alive
    await backend.close()


async def test_what_is_known_of_the_engine(backend: AnyBackend) -> None:
    assert backend.info.model_id == "echo" and backend.info.memory_plan == [("all", 1)]
    assert backend.info.host_bytes > 900_000


async def test_exchange_leaves_the_cores_to_the_engine(backend: AnyBackend) -> None:
    if isinstance(backend, ProcessBackend):
        pid = backend.pids["exchange"]
        assert pid is not None
        ours = os.getpriority(os.PRIO_PROCESS, 0)
        assert os.getpriority(os.PRIO_PROCESS, pid) == min(19, ours + 9)
        assert os.sched_getscheduler(pid) == os.SCHED_BATCH


async def test_echo_of_many_requests_some_given_up(backend: AnyBackend) -> None:
    chance = random.Random(0)

    async def one(number: int) -> None:
        tokens = [number * 100 + i for i in range(chance.randint(1, 60))]
        wanted = chance.randint(1, 60) if number % 3 == 0 else None
        got: list[int] = []
        async with aclosing(updates_of(backend, request(f"echo {number}", tokens))) as updates:
            async for update in updates:
                got += [output.token for output in update.tokens]
                if wanted is not None and len(got) >= wanted:
                    break
            else:
                assert update.finish == "length"
                assert update.usage is not None and update.usage.generated_tokens == len(tokens)
        assert got == (tokens if wanted is None else tokens[: len(got)])

    await asyncio.gather(*(one(number) for number in range(300)))
    await until(lambda: backend.stats.running == backend.stats.waiting == 0)
    assert backend.stats.steps > 0


async def test_stats_move_while_streams_run(backend: AnyBackend) -> None:
    async with aclosing(updates_of(backend, request("stats", [SLOW], 10_000))) as stream:
        seen = set()
        async for _ in stream:
            seen.add(backend.stats.steps)
            if len(seen) == 4:
                break
        assert backend.stats.running == 1


async def test_refused_request_costs_nobody_else(backend: AnyBackend) -> None:
    prompt = [SLOW, *range(20)]
    good = asyncio.create_task(tokens_of(backend, request("good", prompt)))
    with pytest.raises(InvalidRequest) as refusal:
        await tokens_of(backend, request("refused", [REFUSED]))
    assert (refusal.value.field, refusal.value.hint) == ("tokens", "another one")
    assert await good == prompt


async def test_an_open_id_is_refused(backend: AnyBackend) -> None:
    first = asyncio.create_task(tokens_of(backend, request("twice", [SLOW, 2, 3])))
    await asyncio.sleep(0)
    with pytest.raises(InvalidRequest):
        await tokens_of(backend, request("twice", [1]))
    assert await first == [SLOW, 2, 3]


async def test_failed_step_costs_the_requests_in_it(
    backend: AnyBackend, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    for number in range(5):  # failures with good steps in between are no reason to give up
        with pytest.raises(GenerationError, match="poisoned"):
            await tokens_of(backend, request(f"poison {number}", [POISON]))
        prompt = [number, 6]
        assert await tokens_of(backend, request(f"next {number}", prompt)) == prompt


async def test_large_prompts_there_and_back(backend: AnyBackend) -> None:
    prompts = [[1 << 19] * 300_000 + [n] for n in range(3)]  # 1.5 MB each
    requests = [request(f"large {n}", prompt, 2) for n, prompt in enumerate(prompts)]
    answers = await asyncio.gather(*(tokens_of(backend, r) for r in requests))
    assert answers == [[1 << 19] * 2] * 3


async def test_slow_reader_holds_up_nobody(backend: AnyBackend) -> None:
    """One reader stops for as long as the others take to finish; then it finds all of its news."""
    async with aclosing(updates_of(backend, request("behind", [7], 5_000))) as slow:
        count = len((await anext(slow)).tokens)
        others = (tokens_of(backend, request(f"other {n}", [n], 500)) for n in range(20))
        assert all(len(answer) == 500 for answer in await asyncio.gather(*others))
        async for update in slow:
            count += len(update.tokens)
    assert count == 5_000


async def test_lease_names_the_image_and_is_released_once(backend: AnyBackend) -> None:
    lease = await backend.acquire(AdapterRef(("a",), "local", "main"), "tenant")
    assert (lease.image.name, lease.image.stacked_rank, lease.cache_salt) == ("a", 8, b"tenant")
    assert (await leases_of(backend))["a"] == 1
    lease.release()
    lease.release()
    assert (await leases_of(backend))["a"] == 0
    assert await backend.unload("a") == [digest("a")] and not await backend.unload("a")


async def test_unload_of_one_source_and_tenant(backend: AnyBackend) -> None:
    (await backend.acquire(AdapterRef(("b",)), None)).release()
    assert not await backend.unload("b", "hub") and not await backend.unload("b", None, [b"other"])
    assert await backend.unload("b", "local", [b"other", b""]) == [digest("b")]


async def test_pins_and_drops_reach_the_engine_in_order(backend: AnyBackend) -> None:
    """The engine of this test keeps pinned adapters and the newest one."""

    async def residents_after(name: str) -> set[str]:
        lease = await backend.acquire(AdapterRef((name,)), None)
        asked = msgspec.structs.replace(request(f"for {name}", [1]), adapter=lease.image)
        await tokens_of(backend, asked)
        lease.release()
        await until(lambda: name in {one for one, _, _ in backend.stats.resident})
        return {one for one, _, _ in backend.stats.resident}

    assert await residents_after("pinned") == {"pinned"}
    backend.pin(digest("pinned"), True)
    assert await residents_after("other") == {"pinned", "other"}
    assert await residents_after("third") == {"pinned", "third"}
    backend.pin(digest("pinned"), False)
    assert await residents_after("other") == {"other"}
    backend.drop(digest("other"))
    await until(lambda: not backend.stats.resident)


async def test_tiers(backend: AnyBackend) -> None:
    before = await backend.tiers()
    leases = [await backend.acquire(AdapterRef((name,)), None) for name in ("t0", "t1", "t1")]
    assert [lease.tier for lease in leases] == ["source", "source", "host"]
    held = await backend.tiers()
    assert held.counts.loads == before.counts.loads + 2
    assert held.host_images == before.host_images + 2
    assert held.host_leased == 2048 and held.host_capacity == backend.info.host_bytes
    for lease in leases:
        lease.release()
    idle = await backend.tiers()
    assert (idle.host_leased, idle.host_used) == (0, held.host_used), "kept, and free to leave"


async def test_the_exchange_knows_the_tenant(backend: AnyBackend) -> None:
    lease = await backend.acquire(AdapterRef(("a",)), "token of ", TenantRef("search"))
    assert lease.cache_salt == b"token of search"
    lease.release()


async def test_adapter_errors_are_typed(backend: AnyBackend) -> None:
    with pytest.raises(AdapterNotFound) as refusal:
        await backend.acquire(AdapterRef(("missing",)), None)
    assert refusal.value.field == "adapter_id"


async def test_unforeseen_failure_of_a_call(backend: AnyBackend) -> None:
    with pytest.raises((AdapterLoadFailed, ZeroDivisionError), match="clumsy"):
        await backend.acquire(AdapterRef(("clumsy",)), None)


async def test_leaving_callers_leave_no_leases(backend: AnyBackend) -> None:
    async def one(number: int) -> None:
        lease = await backend.acquire(AdapterRef((f"a{number % 7}",)), None)
        try:
            await asyncio.sleep(0)
        finally:
            lease.release()

    for burst in range(100):
        callers = [asyncio.create_task(one(number)) for number in range(10)]
        await asyncio.sleep(0.0002 * (burst % 10))
        for caller in callers[:3]:
            caller.cancel()
        await asyncio.gather(*callers, return_exceptions=True)
    assert not any((await leases_of(backend)).values())


async def test_leaving_caller_gives_up_the_wait(backend: AnyBackend) -> None:
    waiting = asyncio.create_task(backend.acquire(AdapterRef(("slow",)), None))
    async with asyncio.timeout(5):
        while (await leases_of(backend))["waiting"] != 1:
            await asyncio.sleep(0.001)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert (await leases_of(backend))["waiting"] == 0
