"""What a tenant may have: its priority and weight, its share of the places, and a bound for each adapter."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from aiohttp.test_utils import TestClient

from engine.config import AdapterConfig, EngineConfig, ServerConfig
from engine.errors import Overloaded
from engine.server.keys import Keys
from engine.server.places import Places
from tests.server.fake import FakeBackend, Start
from tests.server.wire import until

KEYS = "[{name: big, key: big, weight: 3, priority: 5}, {name: small, key: small, weight: 1}]"
PATHS = ("/generate", "/v1/completions", "/v1/chat/completions")


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "keys.yaml"
    path.write_text(KEYS)
    return str(path)


async def ask(client: TestClient, path: str, key: str, **fields: Any) -> int:
    """The status of a request with these fields."""
    body: dict[str, Any] = {"inputs": "x", "prompt": "x", "model": "base", "max_tokens": 2}
    body["messages"] = [{"role": "user", "content": "x"}]
    body["parameters"] = {"max_new_tokens": 2} | fields
    response = await client.post(path, json=body | fields, headers={"x-api-key": key})
    await response.read()
    return response.status


@pytest.mark.parametrize("path", PATHS)
async def test_requests_carry_what_their_tenant_has(
    start: Start, backend: FakeBackend, file: str, path: str
) -> None:
    client = await start({"api_keys_file": file})
    for key, priority, expected in (
        ("big", None, ("big", 3.0, 5)),
        ("big", 5, ("big", 3.0, 5)),
        ("big", -7, ("big", 3.0, -7)),
        ("small", None, ("small", 1.0, 0)),
        ("small", -1000, ("small", 1.0, -1000)),
    ):
        given = {} if priority is None else {"priority": priority}
        assert await ask(client, path, key, **given) == 200
        request = backend.requests[-1]
        assert (request.tenant, request.weight, request.priority) == expected
    before = len(backend.requests)
    for key, priority in (("big", 6), ("small", 1), ("small", -1001)):
        assert await ask(client, path, key, priority=priority) in (400, 422)
    assert len(backend.requests) == before


def test_the_last_places_are_for_tenants_below_their_share(file: str) -> None:
    keys = Keys(ServerConfig(api_keys_file=file))
    big, small = keys.tenant_of("big"), keys.tenant_of("small")
    places = Places(40)  # shares of 30 and 10, and the last 4 are reserved
    for _ in range(36):
        places.take(small)
    with pytest.raises(Overloaded, match="36 open requests, its share is 10"):
        places.take(small)
    for _ in range(4):
        places.take(big)
    with pytest.raises(Overloaded, match="40 requests are open"):
        places.take(big)
    for tenant, count in ((small, 36), (big, 4)):
        for _ in range(count):
            places.leave(tenant)
    assert places.num_open == 0
    for _ in range(36):
        places.take(big)
    for _ in range(4):
        places.take(small)


def test_one_tenant_alone_has_all_places() -> None:
    keys = Keys(ServerConfig(api_key=("a", "b")))
    places = Places(10)
    for _ in range(10):
        places.take(keys.tenant_of("a"))
    without = Places(10)
    for _ in range(10):
        without.take(None)
    for full in (places, without):
        with pytest.raises(Overloaded):
            full.take(None)


async def test_a_flood_leaves_places_to_others(
    start: Start, backend: FakeBackend, file: str
) -> None:
    client = await start({"api_keys_file": file, "max_concurrent_requests": 10})
    backend.gate = asyncio.Event()
    flood = [asyncio.create_task(ask(client, "/generate", "small")) for _ in range(20)]
    await until(lambda: sum(one.done() for one in flood) == 11)
    assert {one.result() for one in flood if one.done()} == {429}
    other = asyncio.create_task(ask(client, "/generate", "big"))
    await until(lambda: len(backend.requests) == 10)
    backend.gate.set()
    assert await other == 200
    assert sorted([await one for one in flood]) == [200] * 9 + [429] * 11


async def test_requests_for_one_adapter_are_bounded(
    start: Start, backend: FakeBackend, config: EngineConfig
) -> None:
    """Requests that wait for the adapter count too; others and the base model are not concerned."""
    client = await start(config=replace(config, adapters=AdapterConfig(max_requests_per_adapter=2)))
    backend.gate = asyncio.Event()
    first = [
        asyncio.create_task(ask(client, "/generate", "", adapter_id="org/a")) for _ in range(2)
    ]
    await until(lambda: len(backend.requests) == 2)
    response = await client.post(
        "/generate", json={"inputs": "x", "parameters": {"adapter_id": "org/a"}}
    )
    error = await response.json()
    assert response.status == 429 and error["error_type"] == "overloaded"
    assert "org/a" in error["error"]
    others = [
        asyncio.create_task(ask(client, "/generate", "", adapter_id=name))
        for name in ("org/b", "base", "base", "base")
    ]
    await until(lambda: len(backend.requests) == 6)
    backend.gate.set()
    assert [await one for one in first + others] == [200] * 6
    assert await ask(client, "/generate", "", adapter_id="org/a") == 200
