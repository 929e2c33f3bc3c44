"""Room in the host tier: who asks first is served first, whatever the sizes."""

from __future__ import annotations

import asyncio
import random

import pytest

from engine.adapters.room import Room
from engine.adapters.tiers import HostTier
from engine.errors import Overloaded
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
