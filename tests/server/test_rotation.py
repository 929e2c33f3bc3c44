"""Many adapters over little room: every answer is the one that the adapter gives alone.

LORAX_ROTATION=full: 2,000 adapters, of which 200 are in rotation, room for 20 on the device and 60 in host memory.
"""

from __future__ import annotations

import asyncio
import os
import random
from pathlib import Path

from engine.config import GIB
from tests.server.whole import serving

IMAGE_BYTES = 7680
FULL = os.environ.get("LORAX_ROTATION") == "full"
REGISTERED, IN_ROTATION, ON_DEVICE, IN_HOST = (2000, 200, 20, 60) if FULL else (30, 10, 2, 4)
ROUNDS, OPEN, TOKENS = (5, 64, 24) if FULL else (2, 10, 8)


async def test_every_answer_is_that_of_its_adapter_alone(tmp_path: Path) -> None:
    room = (IN_HOST + 0.5) * IMAGE_BYTES / GIB
    async with serving(
        tmp_path, host_cache_gb=room, max_active_adapters=ON_DEVICE, adapter_cycle_time_s=0.2
    ) as server:
        for number in range(REGISTERED):
            server.write(f"a{number}", number)
        chosen = random.Random(1)
        names = [f"a{number}" for number in chosen.sample(range(REGISTERED), IN_ROTATION)]
        alone = {name: await server.tokens_of(name, TOKENS) for name in names}
        assert len({tuple(tokens) for tokens in alone.values()}) > IN_ROTATION / 2
        before, places = server.backend.stats, asyncio.Semaphore(OPEN)

        async def ask(name: str) -> tuple[str, list[int]]:
            async with places:
                return name, await server.tokens_of(name, TOKENS)

        asked = names * ROUNDS
        chosen.shuffle(asked)
        together = await asyncio.gather(*map(ask, asked))
        assert [name for name, tokens in together if tokens != alone[name]] == []
        await server.idle()
        after = server.backend.stats
        assert after.evictions - before.evictions >= IN_ROTATION - ON_DEVICE
        assert len(after.resident) <= ON_DEVICE
        ready = [one for one in await server.backend.adapters() if one.state == "ready"]
        assert 0 < len(ready) <= IN_HOST
