"""Aliases: a name that the operator swaps from one adapter to another."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from aiohttp.test_utils import TestClient

from engine.adapters.ref import AdapterRef
from engine.config import AdapterConfig, EngineConfig
from engine.errors import AdapterIncompatible, ConfigError, InvalidRequest
from engine.server import aliases, loads
from engine.server.aliases import Alias, Aliases
from tests.server.fake import FakeBackend, Start

PATH = "/adapters/aliases"


async def put(client: TestClient, name: str, adapter: str, **more: Any) -> tuple[int, Any]:
    response = await client.put(f"{PATH}/{name}", json={"adapter_id": adapter, **more})
    return response.status, await response.json()


async def ask(client: TestClient, model: str) -> Any:
    body = {"model": model, "prompt": "x", "max_tokens": 1}
    return await client.post("/v1/completions", json=body)


async def test_a_name_is_swapped(client: TestClient, backend: FakeBackend) -> None:
    status, first = await put(client, "prod", "org/a@v1")
    assert (status, first["previous"], first["adapter_id"]) == (201, None, "org/a@v1")
    assert first["digest"] == b"org/a".hex()
    status, second = await put(client, "prod", "org/b", adapter_source="Hub", api_token="t")
    assert (status, second["previous"]["adapter_id"]) == (200, "org/a@v1")
    assert backend.acquired == [
        (AdapterRef(("org/a",), None, "v1"), None),
        (AdapterRef(("org/b",), "hub"), "t"),
    ]
    response = await ask(client, "prod")
    assert response.status == 200 and response.headers["x-adapter-id"] == "prod"
    assert response.headers["x-adapter-source"] == "hub"
    body = {"inputs": "x", "parameters": {"adapter_id": "prod", "max_new_tokens": 1}}
    assert (await client.post("/generate", json=body)).status == 200
    assert [ref for ref, _ in backend.acquired[2:]] == [AdapterRef(("org/b",), "hub")] * 2
    listed = await (await client.get(PATH)).json()
    assert listed["aliases"] == [{k: v for k, v in second.items() if k != "previous"}]
    models = await (await client.get("/v1/models")).json()
    assert "prod" in [model["id"] for model in models["data"]]


async def test_a_swap_during_a_request(client: TestClient, backend: FakeBackend) -> None:
    """A request keeps what it began with; the name is swapped only once the new adapter is loaded."""
    await put(client, "prod", "org/a")
    backend.acquire_delay = 0.05
    swap = asyncio.create_task(put(client, "prod", "org/b"))
    while not backend.waiting_acquires:
        await asyncio.sleep(0.001)
    assert (await ask(client, "prod")).status == 200
    assert (await swap)[0] == 200
    assert (await ask(client, "prod")).status == 200
    assert [ref.id for ref, _ in backend.acquired] == ["org/a", "org/b", "org/a", "org/b"]


async def test_a_failed_swap_changes_nothing(client: TestClient, backend: FakeBackend) -> None:
    await put(client, "prod", "org/a")
    backend.adapter_errors["org/b"] = AdapterIncompatible("wrong base", field="r")
    assert (await put(client, "prod", "org/b"))[0] == 422
    assert (await put(client, "prod", "missing"))[0] == 404
    assert (await put(client, "prod", "org/c", adapter_source="ftp"))[0] == 422
    found = await (await client.get(f"{PATH}/prod")).json()
    assert found["adapter_id"] == "org/a"


async def test_removal(client: TestClient, backend: FakeBackend) -> None:
    """After it the name is looked up as an adapter's."""
    await put(client, "team/prod", "org/a")
    response = await client.delete(f"{PATH}/team/prod")
    assert (await response.json())["adapter_id"] == "org/a"
    for method in (client.get, client.delete):
        response = await method(f"{PATH}/team/prod")
        assert response.status == 404 and (await response.json())["error_type"]
    await ask(client, "team/prod")
    assert backend.acquired[-1][0] == AdapterRef(("team/prod",))


@pytest.mark.parametrize(
    ("name", "adapter", "status", "said"),
    [
        ("base", "org/a", 422, "base model"),
        ("tiny/base", "org/a", 422, "base model"),
        ("a@b", "org/a", 422, "without @"),
        ("x" * 1025, "org/a", 422, "1024"),
        ("a%01b", "org/a", 422, "printable"),
        ("fine", "", 422, "adapter_id is empty"),
        ("fine", "prod", 422, "is an alias itself"),
        ("fine", "fine", 422, "is an alias itself"),
    ],
)
async def test_bad_aliases(
    client: TestClient, name: str, adapter: str, status: int, said: str
) -> None:
    await put(client, "prod", "org/a")
    found, answer = await put(client, name, adapter)
    assert found == status and said in answer["error"]
    assert len((await (await client.get(PATH)).json())["aliases"]) == 1


async def test_bounds(client: TestClient, backend: FakeBackend, monkeypatch: Any) -> None:
    monkeypatch.setattr(aliases, "MAX_ALIASES", 2)
    assert [(await put(client, name, "org/a"))[0] for name in "abab"] == [201, 201, 200, 200]
    status, answer = await put(client, "c", "org/a")
    assert status == 422 and "2 aliases, which is the limit" in answer["error"]
    monkeypatch.setattr(loads, "MAX_OPEN", 1)
    backend.acquire_delay = 0.05
    statuses = await asyncio.gather(*(put(client, "a", "org/b") for _ in range(3)))
    assert sorted(status for status, _ in statuses) == [200, 429, 429]


async def test_set_at_start(start: Start, backend: FakeBackend) -> None:
    config = EngineConfig(adapters=AdapterConfig(adapter_alias=("prod=org/a@v2", "dev = org/b")))
    client = await start(config=config)
    await ask(client, "prod")
    await ask(client, "dev")
    assert [ref.name for ref, _ in backend.acquired] == ["org/a@v2", "org/b"]
    assert (await put(client, "prod", "org/c"))[0] == 200


@pytest.mark.parametrize("setting", ["prod", "=org/a", "base=org/a", "a="])
def test_bad_settings(setting: str) -> None:
    with pytest.raises(ConfigError, match="--adapter-alias") as caught:
        Aliases(frozenset({"base"})).set_all(["fine=org/a", setting])
    assert caught.value.field == "adapter_alias" and caught.value.hint


def test_references_that_name_more_than_the_alias() -> None:
    """A source or a revision means the adapter itself."""
    table = Aliases()
    table.put(Alias("a", AdapterRef(("org/a",))))
    for ref in (AdapterRef(("a",), "hub"), AdapterRef(("a",), None, "v1"), AdapterRef(("b",))):
        assert table.resolve(ref) == ref
    assert table.resolve(AdapterRef(("a",))) == AdapterRef(("org/a",))
    with pytest.raises(InvalidRequest):
        table.put(Alias("b", AdapterRef(("a",))))
