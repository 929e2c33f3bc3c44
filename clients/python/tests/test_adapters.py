"""Managing adapters, with both clients."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp.test_utils import TestServer

from clients.python.tests.stand_in import ADMIN, StandIn
from lorax import AsyncClient, Client
from lorax.errors import AdapterNotFoundError, ForbiddenError, ValidationError


@pytest.fixture
def stand_in() -> StandIn:
    return StandIn()


@pytest.fixture
async def url(stand_in: StandIn) -> AsyncIterator[str]:
    async with TestServer(stand_in.app()) as server:
        yield str(server.make_url("/"))


class Asked:
    """The adapters of either client, always awaited."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client.adapters, name)
        if isinstance(self._client, AsyncClient):
            return method

        async def call(*args: Any, **options: Any) -> Any:
            return await asyncio.to_thread(method, *args, **options)

        return call


@pytest.fixture(params=[Client, AsyncClient], ids=lambda kind: kind.__name__)
async def adapters(request: pytest.FixtureRequest, url: str) -> AsyncIterator[Asked]:
    client = request.param(url, api_key=ADMIN)
    yield Asked(client)
    closed = client.close()
    if closed is not None:
        await closed


async def test_loading_and_pinning(adapters: Asked, stand_in: StandIn) -> None:
    loaded = await adapters.load("pirate", source="hub", api_token="t-1")
    assert (loaded.id, loaded.state, loaded.tier, loaded.pinned) == (
        "pirate",
        "ready",
        "host",
        False,
    )
    assert loaded.ranks == [8]  # a field that the model does not name
    assert await adapters.prefetch("pirate") is None
    pinned = await adapters.pin("pirate")
    assert pinned.pinned and pinned.tier == "device"
    assert not (await adapters.pin("pirate", False)).pinned
    assert [one.id for one in await adapters.list()] == ["pirate"]
    assert await adapters.unload("pirate") == ["d1"]
    assert await adapters.list() == []
    with pytest.raises(AdapterNotFoundError, match="pirate"):
        await adapters.unload("pirate")
    sent = [(path, body) for method, path, body in stand_in.requests if method == "POST"]
    assert sent[:4] == [
        ("/adapters/load", {"adapter_id": "pirate", "adapter_source": "hub", "api_token": "t-1"}),
        ("/adapters/prefetch", {"adapter_id": "pirate"}),
        ("/adapters/pin", {"adapter_id": "pirate", "pinned": True}),
        ("/adapters/pin", {"adapter_id": "pirate", "pinned": False}),
    ]


async def test_showing(adapters: Asked, stand_in: StandIn) -> None:
    """A private adapter is shown to its token."""
    await adapters.load("org/math")
    assert await adapters.list() == []
    found = await adapters.list(state="ready", prefix="org/", limit=5, api_token="t-1")
    assert [one.id for one in found] == ["org/math"]
    assert (await adapters.info("org/math", source="hub")).id == "org/math"
    paths = [path for _, path, _ in stand_in.requests]
    assert paths[2:] == [
        "/adapters?state=ready&prefix=org%2F&limit=5",
        "/adapters/org/math?source=hub",
    ]


async def test_aliases(adapters: Asked) -> None:
    first = await adapters.set_alias("prod", "pirate")
    assert (first.name, first.adapter_id, first.previous) == ("prod", "pirate", None)
    second = await adapters.set_alias("prod", "org/math@v2", source="hub")
    assert second.previous is not None and second.previous.adapter_id == "pirate"
    assert [one.adapter_id for one in await adapters.aliases()] == ["org/math@v2"]
    assert (await adapters.alias("prod")).digest == "d1"
    assert (await adapters.remove_alias("prod")).adapter_source == "hub"
    with pytest.raises(AdapterNotFoundError):
        await adapters.alias("prod")


@pytest.mark.parametrize("name", ["a b", "a?b#c", "ü/é@v1", "50%2F", "s3://bucket/x"])
async def test_names_in_paths(adapters: Asked, name: str) -> None:
    await adapters.load(name)
    assert (await adapters.info(name)).id == name


@pytest.mark.parametrize("name", ["", "..", "../health", "a/./b"])
async def test_names_that_mean_another_path(adapters: Asked, stand_in: StandIn, name: str) -> None:
    for method in (adapters.info, adapters.alias, adapters.remove_alias):
        with pytest.raises(ValidationError):
            await method(name)
    assert not stand_in.requests


async def test_without_the_right(url: str) -> None:
    async with AsyncClient(url, api_key="another") as client:
        with pytest.raises(ForbiddenError, match="admin"):
            await client.adapters.load("pirate")
