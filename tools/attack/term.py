"""SIGTERM in every state that a server may be in: it ends within the drain time."""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from tools.attack import adapters, connections
from tools.attack.load import RESIDENT, ROTATING, Streams, ask, body_of, session_of
from tools.attack.server import Server, drain_s

SPARE_S = 5.0
SETTLE_S = 2.0


@dataclass
class Sizes:
    """How much is open in the states that have something open."""

    connections: int
    streams: int
    on_adapters: int


@dataclass
class Run:
    """One server in one state; `tasks` go on until it has ended."""

    server: Server
    sizes: Sizes
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    def also(self, work: Awaitable[None]) -> None:
        self.tasks.append(asyncio.ensure_future(work))


State = Callable[[Run], Awaitable[None]]


async def _wait_for(server: Server, name: str) -> None:
    async with session_of(server) as session:
        await ask(session, body_of("word1", name, max_new_tokens=1))


async def idle(run: Run) -> None:
    """Nothing is open."""


async def frozen(run: Run) -> None:
    """The exchange is stopped, and requests wait for it."""
    if (exchange := run.server.exchange()) is not None:
        exchange.send_signal(signal.SIGSTOP)
    for name in ROTATING[:3]:
        run.also(_wait_for(run.server, name))


async def killed(run: Run) -> None:
    """The exchange was killed a moment ago."""
    if (exchange := run.server.exchange()) is not None:
        exchange.send_signal(signal.SIGKILL)
    run.also(_wait_for(run.server, ROTATING[0]))


async def hostile(run: Run) -> None:
    """Hostile adapters are being loaded."""
    run.also(adapters.ask_all(run.server, 30, 7, 60.0, adapters.Outcome()))
    await asyncio.sleep(4 * SETTLE_S)


async def slow_connections(run: Run) -> None:
    """Slow and broken clients hold on."""
    chosen, seen, kinds = random.Random(3), connections.Seen(), ("body never sent", "half a header")
    for i in range(run.sizes.connections):
        kind = kinds[i % 2]
        run.also(connections.attack(run.server.where, kind, chosen, 120.0, seen))


async def streams(run: Run) -> None:
    """Every stream is open."""

    async def stream() -> None:
        opened = Streams(run.server)
        opened.begin(run.sizes.streams, run.sizes.on_adapters)
        try:
            await asyncio.sleep(3600)
        finally:
            await opened.close()

    await _wait_for(run.server, RESIDENT[0])
    run.also(stream())


STATES: dict[str, State] = {
    "idle": idle,
    "exchange frozen": frozen,
    "exchange killed": killed,
    "hostile load": hostile,
    "slow connections": slow_connections,
    "streams open": streams,
}


async def end_in(server: Server, state: str, sizes: Sizes) -> float:
    """Starts the server, brings it into the state and ends it; the seconds that it took to end."""
    await server.start()
    run = Run(server, sizes)
    try:
        await STATES[state](run)
        await asyncio.sleep(0.2 if state == "exchange killed" else SETTLE_S)
        return await server.end(drain_s() + 2 * SPARE_S)
    finally:
        for task in run.tasks:
            task.cancel()
        await asyncio.gather(*run.tasks, return_exceptions=True)
        server.kill()
