"""Room in the host tier: who asks first is served first, whatever the sizes; tenants are served in turn."""

from __future__ import annotations

import asyncio
import random

import pytest

from engine.adapters.room import Room
from engine.adapters.tiers import HostTier
from engine.errors import AdapterLoadFailed, Overloaded
from engine.messages import IMAGE_ALIGN

UNITS = 10


@pytest.mark.parametrize("seed", range(8))
async def test_who_asks_first_is_served_first(seed: int) -> None:
    """Random sizes, given back at random times: the order of the grants is that of the questions."""
    generator = random.Random(seed)
    room = Room(HostTier(UNITS * IMAGE_ALIGN), 10.0)
    granted: list[int] = []
    held: list[int] = []

    async def ask(number: int, units: int) -> None:
        held.append(await room.reserve("x", units * IMAGE_ALIGN))
        granted.append(number)

    asked = []
    for number in range(60):
        asked.append(asyncio.create_task(ask(number, generator.choice([1, 1, 1, 2, 5, UNITS]))))
        await asyncio.sleep(0)
        while held and generator.random() < 0.6:
            room.abandon(held.pop(generator.randrange(len(held))))
            for _ in range(4):
                await asyncio.sleep(0)
    while len(granted) < 60:
        room.abandon(held.pop())
        for _ in range(4):
            await asyncio.sleep(0)
    await asyncio.gather(*asked)
    assert granted == sorted(granted)


async def test_who_gives_up_or_waits_too_long_holds_up_nobody() -> None:
    room = Room(HostTier(UNITS * IMAGE_ALIGN), 0.05)
    first = await room.reserve("x", (UNITS - 2) * IMAGE_ALIGN)
    gives_up = asyncio.create_task(room.reserve("x", UNITS * IMAGE_ALIGN))
    await asyncio.sleep(0)
    behind = asyncio.create_task(room.reserve("x", IMAGE_ALIGN))
    await asyncio.sleep(0)
    gives_up.cancel()
    room.abandon(await behind)
    with pytest.raises(Overloaded):
        await room.reserve("x", UNITS * IMAGE_ALIGN)
    room.abandon(first)
    assert await room.reserve("x", UNITS * IMAGE_ALIGN) == first


async def test_tenants_are_served_in_turn() -> None:
    """All that is freed is for the one whose turn it is, so a large reservation does not starve."""
    room = Room(HostTier(UNITS * IMAGE_ALIGN), 60.0)
    served: list[str] = []
    offsets: dict[str, int] = {}

    async def ask(name: str, units: int) -> None:
        offsets[name] = await room.reserve(name, units * IMAGE_ALIGN, name[0])
        served.append(name)

    async def asked(name: str, units: int) -> asyncio.Task[None]:
        task = asyncio.create_task(ask(name, units))
        await asyncio.sleep(0)
        return task

    async def free(*names: str) -> None:
        for name in names:
            room.abandon(offsets[name])
            for _ in range(6):
                await asyncio.sleep(0)

    tasks = [await asked(f"a{number}", 1) for number in range(UNITS)]
    tasks += [await asked("b0", 5)]
    tasks += [await asked(f"a{UNITS + number}", 1) for number in range(3)]
    tasks += [await asked("c0", 1), await asked("b1", 1)]
    assert served == [f"a{number}" for number in range(UNITS)]
    await free("a0", "a2", "a3", "a4")
    assert len(served) == UNITS, "four units in pieces are free; they wait for b0"
    await free("a5", "a1")
    assert served[UNITS:] == ["b0", "c0"]
    await free("a6", "a7", "a8", "a9")
    assert served[UNITS:] == ["b0", "c0", "a10", "b1", "a11", "a12"]
    await asyncio.gather(*tasks)
    room.tier.check()


async def test_close_ends_every_wait() -> None:
    room = Room(HostTier(UNITS * IMAGE_ALIGN), 60.0)
    await room.reserve("x", UNITS * IMAGE_ALIGN)
    waits = [asyncio.create_task(room.reserve("x", IMAGE_ALIGN, key)) for key in "aab"]
    await asyncio.sleep(0)
    room.close()
    for error in await asyncio.gather(*waits, return_exceptions=True):
        assert isinstance(error, AdapterLoadFailed)
