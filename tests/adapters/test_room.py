"""Room in the host tier: who asks first is served first, whatever the sizes; tenants are served in turn."""

from __future__ import annotations

import asyncio
import random

import pytest

from engine.adapters.room import Room
from engine.adapters.tiers import HostTier
from engine.errors import AdapterLoadFailed, Overloaded
from engine.messages import IMAGE_ALIGN, TenantRef

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
        offsets[name] = await room.reserve(name, units * IMAGE_ALIGN, TenantRef(name[0]))
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
    waits = [asyncio.create_task(room.reserve("x", IMAGE_ALIGN, TenantRef(key))) for key in "aab"]
    await asyncio.sleep(0)
    room.close()
    for error in await asyncio.gather(*waits, return_exceptions=True):
        assert isinstance(error, AdapterLoadFailed)


async def test_a_tenant_with_its_share_leaves_a_quarter_to_others() -> None:
    """It waits without delaying others, until enough has been given back."""
    many, few = TenantRef("many", 0.5), TenantRef("few", 0.5)
    room = Room(HostTier(8 * IMAGE_ALIGN), 60.0)
    taken = [await room.reserve("x", IMAGE_ALIGN, many) for _ in range(6)]
    waits = asyncio.create_task(room.reserve("x", IMAGE_ALIGN, many))
    await asyncio.sleep(0)
    others = [await room.reserve("x", IMAGE_ALIGN, few) for _ in range(2)]
    assert not waits.done() and room.tier.used == room.tier.capacity
    room.abandon(others.pop())
    await settled()
    assert not waits.done(), "it still holds more than its share, and a quarter must be free"
    for offset in taken[:2]:
        room.abandon(offset)
    await settled()
    assert waits.done()
    room.abandon(waits.result())
    for offset in (*taken[2:], *others):
        room.abandon(offset)
    assert room.tier.used == 0 and not room._shares._bytes


async def test_leases_count_until_they_end() -> None:
    """Those of an image that two tenants lease, for both; those of no tenant, for nobody."""
    many, few = TenantRef("many", 0.5), TenantRef("few", 0.5)
    room = Room(HostTier(4 * IMAGE_ALIGN), 0.01)
    images = []
    for number in range(3):
        offset = await room.reserve("x", IMAGE_ALIGN, many)
        image = room.commit(offset, bytes([number]))
        assert room.lease(image.digest, "many") is image
        images.append(image)
    room.hold(images[0], "few")
    room.hold(images[0], "many")
    with pytest.raises(Overloaded):
        await room.reserve("x", IMAGE_ALIGN, many)
    room.abandon(await room.reserve("x", IMAGE_ALIGN, few))
    for image, tenant in ((images[0], "few"), (images[0], "many"), (images[1], "many")):
        room.release(image, tenant)
    room.abandon(await room.reserve("x", IMAGE_ALIGN, many))
    room.hold(images[0], "many")
    room.release(images[0], "many")
    room.tier.hold(images[0])
    room.release(images[0])
    for image in (images[0], images[2]):
        room.release(image, "many")
    assert not room._shares._bytes and not room._shares._leases


async def settled() -> None:
    """All tasks have run as far as they can."""
    for _ in range(5):
        await asyncio.sleep(0)
