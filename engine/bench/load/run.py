"""Sends the load: first the background streams, then requests in an open or a closed loop. Returns raw times."""

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

from engine.bench.load.client import Record, Server, body_of, find_server, stream
from engine.bench.load.traffic import LoadRequest, background_adapters, requests_of
from engine.bench_options import Load

if TYPE_CHECKING:
    import aiohttp

TICK_S = 0.01
BACKGROUND_TOKENS = 2048  # if --background-tokens is unset
BACKGROUND_START_S = 600.0  # limit for the first tokens of the background streams

Tell = Callable[[str], None]


@dataclass(slots=True)
class Outcome:
    """All records of a run. Times are of time.perf_counter()."""

    server: Server
    records: list[Record]
    background: list[Record]
    alone: tuple[float, float] | None  # begin and end of the background alone
    window: tuple[float, float]  # begin and end of the measurement
    lag: array[float] = field(default_factory=lambda: array("d"))  # of this process's loop, seconds
    cpu_share: float = 0.0  # share of one core that this process used


async def drive(
    url: str, load: Load, adapter_source: str | None, tell: Tell, api_key: str | None = None
) -> Outcome:
    """Runs the load. `api_key`: the server's, if it has keys. Raises ConfigError or EngineDead."""
    import aiohttp

    load.check()
    timeout = aiohttp.ClientTimeout(total=load.timeout, connect=10.0)
    connector = aiohttp.TCPConnector(limit=0)
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    async with aiohttp.ClientSession(
        timeout=timeout, connector=connector, read_bufsize=1 << 20, headers=headers
    ) as session:
        server = await find_server(session, url, load.api, adapter_source)
        return await _Driver(session, server, load, tell).run()


@contextmanager
def _no_collection() -> Iterator[None]:
    """Garbage collection off: its pauses would look like the server's."""
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
            background = [
                asyncio.create_task(self._endless(index, adapter))
                for index, adapter in enumerate(background_adapters(load))
            ]
            ticking = asyncio.create_task(self._tick())
            try:
                alone = await self._alone(background) if background else None
                wall, busy = time.perf_counter(), _processor_seconds()
                self.start = wall
                self.measure_from = self.start + load.warm_up
                self.tell(f"sending requests to {self.server.url}")
                await (self._open_loop() if load.rate else self._closed_loop())
                wall, busy = time.perf_counter() - wall, _processor_seconds() - busy
            finally:
                for task in (*background, ticking):
                    task.cancel()
                await asyncio.gather(*background, ticking, return_exceptions=True)
        return Outcome(
            server=self.server,
            records=self.records,
            background=self.background,
            alone=alone,
            window=self._window(),
            lag=self.lag,
            cpu_share=busy / wall if wall else 0.0,
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
        """Whether to send another request at `at`."""
        seconds = self.load.seconds
        if seconds is not None and at >= self.measure_from + seconds:
            return False
        return self.load.requests is None or self.counted < self.load.requests

    def _record(self, request: LoadRequest, due: float) -> Record:
        record = Record(request, due, counted=due >= self.measure_from)
        self.counted += record.counted
        self.records.append(record)
        return record

    async def _stream(self, record: Record) -> None:
        body = json.dumps(body_of(self.server, record.request, self.chooser)).encode()
        await stream(self.session, self.server, record, body)

    async def _open_loop(self) -> None:
        """Sends each request at its own time. If this process is late, the request still counts from its due time."""
        due = self.start
        async with asyncio.TaskGroup() as tasks:
            for request in requests_of(self.load):
                due += request.gap
                if not self._more(due):
                    break
                await asyncio.sleep(due - time.perf_counter())
                tasks.create_task(self._stream(self._record(request, due)))

    async def _closed_loop(self) -> None:
        """Sends the next request when one ends."""
        source = requests_of(self.load)

        async def client() -> None:
            while self._more(now := time.perf_counter()):
                await self._stream(self._record(next(source), now))

        async with asyncio.TaskGroup() as tasks:
            for _ in range(self.load.open_at_once or 1):
                tasks.create_task(client())

    # -- the background

    async def _endless(self, index: int, adapter: str | None) -> None:
        """One stream after another. The first has a random length, so that the streams do not restart together."""
        chooser = random.Random(self.load.seed * 1000 + index)
        prompt = self.load.input_tokens.low
        most = self.load.background_tokens or BACKGROUND_TOKENS
        if self.load.background_tokens is None and self.server.max_total_tokens is not None:
            most = max(min(most, self.server.max_total_tokens - prompt), 1)
        for turn in count():
            tokens = chooser.randint(max(1, most // 2), most) if turn == 0 else most
            request = LoadRequest(adapter, False, prompt, tokens, 0.0)
            record = Record(request, time.perf_counter(), counted=True)
            self.background.append(record)
            await self._stream(record)
            if record.error is not None:
                await asyncio.sleep(1.0)  # do not flood a server that fails at once

    async def _alone(self, streams: list[asyncio.Task[None]]) -> tuple[float, float]:
        """Waits until every background stream has a token, then for `--alone` seconds."""
        self.tell(f"starting {len(streams)} background streams")
        until = time.perf_counter() + BACKGROUND_START_S
        while time.perf_counter() < until:
            begun = sum(1 for record in self.background if record.times)
            if begun >= len(streams) or any(record.error for record in self.background):
                break
            await asyncio.sleep(TICK_S)
        begin = time.perf_counter()
        await asyncio.sleep(self.load.alone)
        return begin, time.perf_counter()

    async def _tick(self) -> None:
        """Records how late this process's event loop is."""
        with suppress(asyncio.CancelledError):
            while True:
                due = time.perf_counter() + TICK_S
                await asyncio.sleep(TICK_S)
                self.lag.append(max(0.0, time.perf_counter() - due))


def _processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
