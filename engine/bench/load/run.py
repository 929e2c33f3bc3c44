"""Drives a server: the endless streams beside, then arrivals by themselves or as others end; times come back raw."""

from __future__ import annotations

import asyncio
import gc
import json
import random
import resource
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING

from engine.bench.load.client import Record, Server, body_of, look_at, stream
from engine.bench.load.workload import Asked, Load, background_adapters, requests_of

if TYPE_CHECKING:
    import aiohttp

TICK_S = 0.01
BACKGROUND_TOKENS = 2048  # at most, unless asked for
PATIENCE_S = 600.0  # for the background's first tokens

Tell = Callable[[str], None]


@dataclass(slots=True)
class Outcome:
    """Everything that was seen. Times are of time.perf_counter()."""

    server: Server
    records: list[Record]
    background: list[Record]
    alone: tuple[float, float] | None  # when the background ran alone
    window: tuple[float, float]  # what is measured
    lag: array[float] = field(default_factory=lambda: array("d"))  # of this process's loop, seconds
    cpu_share: float = 0.0  # of one core, that this process took


async def drive(url: str, load: Load, adapter_source: str | None, tell: Tell) -> Outcome:
    """Runs the load. Raises ConfigError or EngineDead."""
    import aiohttp

    load.check()
    timeout = aiohttp.ClientTimeout(total=load.timeout, connect=10.0)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(
        timeout=timeout, connector=connector, read_bufsize=1 << 20
    ) as session:
        server = await look_at(session, url, load.api, adapter_source)
        return await _Driver(session, server, load, tell).run()


@contextmanager
def _no_collection() -> Iterator[None]:
    """A pause of the collector would look like one of the server."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


class _Driver:
    def __init__(
        self, session: aiohttp.ClientSession, server: Server, load: Load, tell: Tell
    ) -> None:
        self.session, self.server, self.load, self.tell = session, server, load, tell
        self.chooser = random.Random(load.seed + 3)
        self.records: list[Record] = []
        self.background: list[Record] = []
        self.lag: array[float] = array("d")
        self.counted = 0
        self.start = self.measure_from = 0.0

    async def run(self) -> Outcome:
        load = self.load
        with _no_collection():
            beside = [
                asyncio.create_task(self._endless(index, adapter))
                for index, adapter in enumerate(background_adapters(load))
            ]
            ticking = asyncio.create_task(self._tick())
            try:
                alone = await self._alone(beside) if beside else None
                wall, busy = time.perf_counter(), _processor_seconds()
                self.start = wall
                self.measure_from = self.start + load.warm_up
                self.tell(f"sending requests to {self.server.url}")
                await (self._open_loop() if load.rate else self._closed_loop())
                wall, busy = time.perf_counter() - wall, _processor_seconds() - busy
            finally:
                for task in (*beside, ticking):
                    task.cancel()
                await asyncio.gather(*beside, ticking, return_exceptions=True)
        return Outcome(
            self.server,
            self.records,
            self.background,
            alone,
            self._window(),
            self.lag,
            busy / wall if wall else 0.0,
        )

    def _window(self) -> tuple[float, float]:
        if self.load.seconds is not None:
            end = self.measure_from + self.load.seconds
            if self.load.requests is None:
                return self.measure_from, end
        counted = [record for record in self.records if record.counted]
        begin = min((record.due for record in counted), default=self.measure_from)
        return begin, max((record.end for record in counted), default=begin)

    # -- arrivals

    def _more(self, at: float) -> bool:
        """Is another request to be sent at `at`?"""
        seconds = self.load.seconds
        if seconds is not None and at >= self.measure_from + seconds:
            return False
        return self.load.requests is None or self.counted < self.load.requests

    def _record(self, asked: Asked, due: float) -> Record:
        record = Record(asked, due, counted=due >= self.measure_from)
        self.counted += record.counted
        self.records.append(record)
        return record

    async def _stream(self, record: Record) -> None:
        body = json.dumps(body_of(self.server, record.asked, self.chooser)).encode()
        await stream(self.session, self.server, record, body)

    async def _open_loop(self) -> None:
        """Each request at its own time; those that are late because this process is count from when they were due."""
        due = self.start
        async with asyncio.TaskGroup() as tasks:
            for asked in requests_of(self.load):
                due += asked.gap
                if not self._more(due):
                    break
                await asyncio.sleep(due - time.perf_counter())
                tasks.create_task(self._stream(self._record(asked, due)))

    async def _closed_loop(self) -> None:
        """Each ended request makes room for the next."""
        source = requests_of(self.load)

        async def client() -> None:
            while self._more(now := time.perf_counter()):
                await self._stream(self._record(next(source), now))

        async with asyncio.TaskGroup() as tasks:
            for _ in range(self.load.open_at_once or 1):
                tasks.create_task(client())

    # -- beside them

    async def _endless(self, index: int, adapter: str | None) -> None:
        """One stream after another. The first is cut short at random, so that not all begin anew together."""
        chooser = random.Random(self.load.seed * 1000 + index)
        prompt = self.load.input_tokens.low
        most = self.load.background_tokens or BACKGROUND_TOKENS
        if self.load.background_tokens is None and self.server.room is not None:
            most = max(min(most, self.server.room - prompt), 1)
        for turn in count():
            tokens = chooser.randint(max(1, most // 2), most) if turn == 0 else most
            asked = Asked(adapter, False, prompt, tokens, 0.0)
            record = Record(asked, time.perf_counter(), counted=True)
            self.background.append(record)
            await self._stream(record)
            if record.error is not None:
                await asyncio.sleep(
                    1.0
                )  # a server in trouble is not asked a thousand times a second

    async def _alone(self, beside: list[asyncio.Task[None]]) -> tuple[float, float]:
        """Waits until every endless stream has begun, then for a while."""
        self.tell(f"starting {len(beside)} endless streams")
        until = time.perf_counter() + PATIENCE_S
        while time.perf_counter() < until:
            begun = sum(1 for record in self.background if record.times)
            if begun >= len(beside) or any(record.error for record in self.background):
                break
            await asyncio.sleep(TICK_S)
        begin = time.perf_counter()
        await asyncio.sleep(self.load.alone)
        return begin, time.perf_counter()

    async def _tick(self) -> None:
        """How late this process's own loop is: what it adds to every time."""
        with suppress(asyncio.CancelledError):
            while True:
                due = time.perf_counter() + TICK_S
                await asyncio.sleep(TICK_S)
                self.lag.append(max(0.0, time.perf_counter() - due))


def _processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
