"""The server's fixtures, and both clients on a scripted transport."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import httpx
import pytest

from lorax import AsyncClient, Client
from tests.server.conftest import backend, config, folder, start, text

__all__ = ["backend", "config", "folder", "start", "text"]

Answer = Callable[[httpx.Request], httpx.Response]
Ask = Callable[..., Awaitable[Any]]


class Chunks(httpx.SyncByteStream, httpx.AsyncByteStream):
    """A body that arrives in these pieces. An exception among them is raised."""

    def __init__(self, *pieces: bytes | Exception) -> None:
        self._pieces = pieces
        self.closed = False

    def __iter__(self) -> Iterator[bytes]:
        for piece in self._pieces:
            if isinstance(piece, Exception):
                raise piece
            yield piece

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self:
            yield piece

    def close(self) -> None:
        self.closed = True

    async def aclose(self) -> None:
        self.closed = True


@pytest.fixture(params=["Client", "AsyncClient"])
def asking(request: pytest.FixtureRequest) -> Callable[..., Ask]:
    """Makes a client whose requests `answer` gets, and asks it: `await ask(lambda client: client.info())`.

    Both clients are asked in the same words; a stream becomes a list.
    """

    def make(answer: Answer, **options: Any) -> Ask:
        transport = httpx.MockTransport(answer)
        if request.param == "Client":
            session: Any = httpx.Client(transport=transport)
            client: Any = Client("http://lorax", session=session, **options)
        else:
            session = httpx.AsyncClient(transport=transport)
            client = AsyncClient("http://lorax", session=session, **options)

        async def ask(call: Callable[[Any], Any]) -> Any:
            asked = call(client)
            if inspect.isawaitable(asked):
                return await asked
            if inspect.isasyncgen(asked):
                return [part async for part in asked]
            return list(asked) if inspect.isgenerator(asked) else asked

        return ask

    return make
