"""What must not suffer: endless streams, and probes once a second. Everything is as cheap as it can be."""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from tools.attack.connections import SECRET
from tools.attack.pickles import SAFE
from tools.attack.server import Server
from tools.tiny import prompt

PROBE_S = 1.0
ANSWER_S = 60.0
REOPEN_S = 1.0
TAIL = 600  # bytes of an answer that are kept
RESIDENT = [f"resident{i}" for i in range(4)]
ROTATING = [f"rotating{i}" for i in range(12)]
PROBES = ("health", "base", "resident adapter", "adapter to load")


def body_of(text: str, adapter: str | None = None, source: str = "local", **given: object) -> dict:
    """The body of a native request."""
    if adapter is not None:
        given |= {"adapter_id": adapter, "adapter_source": source}
    return {"inputs": text, "parameters": given}


class Stream(asyncio.Protocol):
    """One endless stream; opened again whenever it ends by length."""

    def __init__(self, streams: Streams, adapter: str | None) -> None:
        self.streams = streams
        self.adapter = adapter
        self.tail = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        text = prompt(random.Random())
        body = body_of(text, self.adapter, ignore_eos_token=True, details=True)
        data = json.dumps(body).encode()
        start = f"POST /generate_stream HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {SECRET}\r\n"
        start += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n"
        assert isinstance(transport, asyncio.Transport)
        transport.write(start.encode() + b"Connection: close\r\n\r\n" + data)
        self.streams.open.add(self)

    def data_received(self, data: bytes) -> None:
        self.tail = (self.tail + data)[-TAIL:]
        self.streams.bytes += len(data)

    def connection_lost(self, error: Exception | None) -> None:
        self.streams.lost(self, error)


@dataclass
class Streams:
    """All of them. `ended`: what ended otherwise than by its length."""

    server: Server
    open: set[Stream] = field(default_factory=set)
    ended: list[str] = field(default_factory=list)
    reopened: int = 0
    bytes: int = 0
    closing: bool = False
    tasks: set[asyncio.Task[None]] = field(default_factory=set)

    def begin(self, base: int, on_adapters: int) -> None:
        for i in range(base + on_adapters):
            self._start(None if i < base else RESIDENT[i % len(RESIDENT)], 0.0)

    def _start(self, adapter: str | None, delay: float) -> None:
        task = asyncio.create_task(self._connect(adapter, delay))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def _connect(self, adapter: str | None, delay: float) -> None:
        await asyncio.sleep(delay)
        try:
            loop = asyncio.get_running_loop()
            await loop.create_connection(lambda: Stream(self, adapter), *self.server.where)
        except OSError as error:
            self._note(adapter, repr(error))
            if not self.closing and self.server.alive:
                self._start(adapter, REOPEN_S)

    def lost(self, stream: Stream, error: Exception | None) -> None:
        self.open.discard(stream)
        if self.closing:
            return
        by_length = b'"finish_reason":"length"' in stream.tail
        if by_length:
            self.reopened += 1
        else:
            why = stream.tail[-300:].decode("utf-8", "replace").strip()
            self._note(stream.adapter, f"{error!r}: {why}" if error else why or "closed")
        self._start(stream.adapter, 0.0 if by_length else REOPEN_S)

    def _note(self, adapter: str | None, why: str) -> None:
        if not self.closing:
            self.ended.append(f"{adapter or 'base'}: {why}")

    async def close(self) -> None:
        self.closing = True
        for task in list(self.tasks):
            task.cancel()
        for stream in list(self.open):
            assert isinstance(stream.transport, asyncio.Transport)
            stream.transport.abort()
        await asyncio.gather(*self.tasks, return_exceptions=True)


async def ask(
    session: aiohttp.ClientSession, body: dict | None, limit_s: float = ANSWER_S
) -> tuple[int, str]:
    """Status and `error_type` of an answer; status 0 if none came, with the reason. No body: /health."""
    try:
        async with asyncio.timeout(limit_s):
            if body is None:
                async with session.get("/health") as response:
                    return response.status, ""
            async with session.post("/generate", json=body) as response:
                given = await response.read()
    except (TimeoutError, aiohttp.ClientError, OSError) as error:
        return 0, type(error).__name__
    if response.status == 200:
        return 200, ""
    with suppress(ValueError, AttributeError):
        return response.status, str(json.loads(given).get("error_type") or "")
    return response.status, ""


def session_of(server: Server) -> aiohttp.ClientSession:
    """Connections are not kept: a new client must get in as well. Every request carries a token."""
    return aiohttp.ClientSession(
        f"http://{server.address}",
        connector=aiohttp.TCPConnector(limit=0, force_close=True),
        timeout=aiohttp.ClientTimeout(total=None),
        headers={"Authorization": f"Bearer {SECRET}"},
    )


@dataclass
class Probes:
    """One request of each kind a second, whatever became of those before."""

    server: Server
    seconds: dict[str, list[float]] = field(default_factory=lambda: {kind: [] for kind in PROBES})
    failed: list[str] = field(default_factory=list)
    refused: int = 0  # typed errors where they are allowed
    lag: float = 0.0  # the longest that this program itself was late
    closing: bool = False
    tasks: set[asyncio.Task[None]] = field(default_factory=set)

    def begin(self) -> None:
        self.started = time.monotonic()
        self._main = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Waits for the answers that are under way."""
        self.closing = True
        await self._main

    async def _run(self) -> None:
        rotating, due = _turns(self.server.folder / "adapters"), time.monotonic()
        bodies = {
            "health": None,
            "base": body_of("word1 word2", max_new_tokens=2),
            "resident adapter": body_of("word1", RESIDENT[0], max_new_tokens=2),
        }
        async with session_of(self.server) as session:
            while self.server.alive and not self.closing:
                bodies["adapter to load"] = body_of("word1", next(rotating), max_new_tokens=2)
                for kind, body in bodies.items():
                    task = asyncio.create_task(self._probe(session, kind, body))
                    self.tasks.add(task)
                    task.add_done_callback(self.tasks.discard)
                due += PROBE_S
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                self.lag = max(self.lag, time.monotonic() - due)
            if not self.server.alive:
                self.failed.append("the server ended")
            await asyncio.gather(*self.tasks)

    async def _probe(self, session: aiohttp.ClientSession, kind: str, body: dict | None) -> None:
        start = time.monotonic()
        status, why = await ask(session, body)
        took = time.monotonic() - start
        self.seconds[kind].append(took)
        if status == 200:
            return
        if kind == "adapter to load" and status and why:
            self.refused += 1
            return
        at = start - self.started
        self.failed.append(f"{kind} at {at:.0f} s: {status} {why} after {took:.1f} s")


def _turns(folder: Path) -> Iterator[str]:
    """Good adapters in turn, each written anew before it is asked for, so that it must be loaded."""
    while True:
        for name in ROTATING:
            os.utime(folder / name / SAFE)
            yield name
