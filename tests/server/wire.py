"""A server on a free port in this process, and clients that send bytes as they like."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from engine.config import EngineConfig, ServerConfig
from engine.server.app import build_app, run
from engine.server.front import FRONT, Front
from engine.server.text import Text
from tests.server.fake import FakeBackend

HEAD = b" HTTP/1.1\r\nHost: x\r\n"
HELLO = b'{"inputs": "x", "prompt": "x"}'


def get(path: bytes = b"/health", headers: bytes = b"") -> bytes:
    return b"GET " + path + HEAD + headers + b"\r\n"


def post(path: bytes = b"/generate", body: bytes = HELLO, headers: bytes = b"") -> bytes:
    """A request with a body, whole."""
    return announce(len(body), path, headers) + body


def announce(length: int, path: bytes = b"/generate", headers: bytes = b"") -> bytes:
    """The headers of a request whose body has `length` bytes."""
    return b"POST " + path + HEAD + headers + b"Content-Length: %d\r\n\r\n" % length


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def kind(self) -> str:
        """The machine-readable type of an error, in either shape."""
        error = self.json["error"]
        return str(error["code"] if isinstance(error, dict) else self.json["error_type"])


@dataclass
class Wire:
    """One connection."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def head(self) -> tuple[int, dict[str, str]]:
        """Status and headers of the next answer."""
        async with asyncio.timeout(20):
            raw = await self.reader.readuntil(b"\r\n\r\n")
        first, *lines = raw.decode("latin-1").strip().split("\r\n")
        pairs = (line.partition(": ") for line in lines)
        return int(first.split()[1]), {name.lower(): value for name, _, value in pairs}

    async def answer(self) -> Answer:
        """The next answer, of known length."""
        status, headers = await self.head()
        async with asyncio.timeout(20):
            body = await self.reader.readexactly(int(headers["content-length"]))
        return Answer(status, headers, body)

    async def rest(self) -> bytes | None:
        """What comes until the server closes; None if it closes without care."""
        async with asyncio.timeout(20):
            try:
                return await self.reader.read()
            except ConnectionError:
                return None

    def close(self) -> None:
        self.writer.close()


@dataclass
class Served:
    app: web.Application
    running: asyncio.Task[None]
    port: int
    wires: list[Wire] = field(default_factory=list)

    @property
    def front(self) -> Front:
        return self.app[FRONT]

    async def connect(self, data: bytes = b"") -> Wire:
        wire = Wire(*await asyncio.open_connection("127.0.0.1", self.port))
        self.wires.append(wire)
        wire.send(data)
        return wire

    async def ask(self, data: bytes) -> Answer:
        wire = await self.connect(data)
        answer = await wire.answer()
        wire.close()
        return answer


@asynccontextmanager
async def served(
    backend: FakeBackend,
    text: Text,
    options: dict[str, Any] | None = None,
    routes: Sequence[web.RouteDef] = (),
    **server: Any,
) -> AsyncIterator[Served]:
    """Runs the server; `options` are those of `build_app`, `routes` are added, the rest are settings."""
    config = EngineConfig(server=ServerConfig(hostname="127.0.0.1", port=0))
    config = dataclasses.replace(config, server=dataclasses.replace(config.server, **server))
    app = build_app(backend, text, config, **(options or {}))
    app.add_routes(routes)
    address: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    running = asyncio.create_task(run(app, address.set_result))
    await asyncio.wait({running, address}, return_when=asyncio.FIRST_COMPLETED)
    if running.done():
        running.result()
    found = Served(app, running, int(address.result().rpartition(":")[2]))
    try:
        yield found
    finally:
        for wire in found.wires:
            wire.close()
        running.cancel()
        await asyncio.wait({running})


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)
