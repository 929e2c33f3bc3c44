"""The routes that show, load, pin and unload adapters, over the fake backend."""

from __future__ import annotations

import asyncio
import json
import logging
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from aiohttp.test_utils import TestClient
from msgspec.structs import replace

from engine.adapters.ref import AdapterRef
from engine.adapters.sources import token_hash
from engine.config import ServerConfig
from engine.errors import AdapterIncompatible, EngineDead
from engine.messages import NO_TENANT, AdapterStatus, EngineStats, TenantRef, TierCounts, TierStats
from engine.metrics import Metrics
from engine.server import adapter_use, loads, pins, prefetches
from engine.server.adapter_use import AdapterUse
from engine.server.front import FRONT, Front
from tests.server.fake import FakeBackend, FakeLease, Start

KEYS = """
- {name: operator, key: admin-key, admin: true}
- {name: user, key: user-key}
"""
ADMIN, USER = {"x-api-key": "admin-key"}, {"x-api-key": "user-key"}
# What changes something for everybody.
CHANGES: list[tuple[str, str, dict[str, Any]]] = [
    ("POST", "/adapters/load", {"adapter_id": "org/a"}),
    ("POST", "/adapters/pin", {"adapter_id": "org/a"}),
    ("POST", "/adapters/unload", {"adapter_id": "org/a"}),
    ("PUT", "/adapters/aliases/x", {"adapter_id": "org/a"}),
    ("DELETE", "/adapters/aliases/x", {}),
    ("POST", "/v1/load_lora_adapter", {"lora_name": "l", "lora_path": "org/a"}),
    ("POST", "/v1/unload_lora_adapter", {"lora_name": "l"}),
]
POSTS = ["load", "prefetch", "pin", "unload"]


async def post(client: TestClient, what: str, adapter: str, **more: Any) -> tuple[int, Any]:
    headers = more.pop("headers", {})
    body = {"adapter_id": adapter, **more}
    async with client.post(f"/adapters/{what}", json=body, headers=headers) as response:
        return response.status, await response.json()


async def get(client: TestClient, path: str, **headers: str) -> tuple[int, Any]:
    async with client.get(path, headers=headers) as response:
        return response.status, await response.json()


async def listed(client: TestClient, query: str = "", **headers: str) -> dict[str, Any]:
    """Entry by id."""
    status, body = await get(client, f"/adapters{query}", **headers)
    assert status == 200, body
    return {entry["id"]: entry for entry in body["adapters"]}


async def generate(client: TestClient, adapter: str, **parameters: Any) -> int:
    body = {"inputs": "x", "parameters": {"adapter_id": adapter, "max_new_tokens": 1} | parameters}
    async with client.post("/generate", json=body) as response:
        return response.status


def front_of(client: TestClient) -> Front:
    return client.app[FRONT]


async def until(condition: Any) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.002)


# -- the list


async def test_load_and_what_is_told(client: TestClient, backend: FakeBackend) -> None:
    status, entry = await post(client, "load", "org/a@v1", adapter_source="Hub", api_token="t")
    assert backend.acquired == [(AdapterRef(("org/a",), "hub", "v1"), "t")]
    assert status == 200 and entry == {
        "id": "org/a@v1",
        "source": "hub",
        "revision": "r1",
        "digest": b"org/a".hex(),
        "state": "ready",
        "tier": "host",
        "pinned": False,
        "preloaded": False,
        "bytes": 64,
        "rank": 8,
        "ranks": [4, 8],
        "targets": ["q_proj"],
        "base_model": None,
        "merged": False,
        "requests": 0,
        "hits": 0,
        "last_used": None,
        "seconds": {"fetch": 0.5, "parse": 0.1},
        "error": None,
    }
    before = datetime.now(UTC)
    assert await generate(client, "org/a@v1") == 200
    used = (await listed(client))["org/a@v1"]
    assert (used["tier"], used["hits"]) == ("device", 1)
    assert abs(datetime.fromisoformat(used["last_used"]) - before).total_seconds() < 60
    assert used["last_used"].endswith("+00:00")
    assert (await get(client, "/adapters/org/a@v1"))[1] == used


async def test_open_requests_are_counted(client: TestClient, backend: FakeBackend) -> None:
    backend.gate = asyncio.Event()
    asking = [asyncio.create_task(generate(client, "a")) for _ in range(3)]
    await until(lambda: len(backend.open) == 3)
    assert (await listed(client))["a"]["requests"] == 3
    backend.gate.set()
    await asyncio.gather(*asking)
    assert (await listed(client))["a"]["requests"] == 0


async def test_where_requests_found_their_adapter(client: TestClient, backend: FakeBackend) -> None:
    for adapter in ("a", "b", "a"):
        assert await generate(client, adapter) == 200
    backend.stats = EngineStats()  # both left the device
    assert await generate(client, "a") == 200
    assert await generate(client, "base") == 200
    _, cache = await get(client, "/cache")
    assert cache["hits"] == {"device": 1, "host": 1, "disk": 0, "source": 2}
    text = await (await client.get("/metrics")).text()
    for tier, hits in cache["hits"].items():
        assert f'lorax_adapter_hits_total{{tier="{tier}"}} {hits}.0' in text


def status_of(name: str, **given: Any) -> AdapterStatus:
    fields: dict[str, Any] = {
        "source": "hub",
        "digest": name.encode(),
        "state": "ready",
        "data_bytes": 10,
        "stacked_rank": 8,
        "targets": [],
        "base_model": "org/base",
        "leases": 0,
        "seconds": {},
    }
    return AdapterStatus(name, **(fields | given))


async def test_filters_and_limits(client: TestClient, backend: FakeBackend) -> None:
    error = AdapterIncompatible("wrong base", field="r", hint="another one")
    backend.statuses = [
        status_of("x/ready"),
        status_of("x/device", leases=2, preloaded=True),
        status_of("y/gone", state="listed", on_disk=True),
        status_of("y/new", state="listed", digest=None),
        status_of("y/bad", state="failed", digest=None, error=error.to_wire()),
        status_of("y/coming", state="fetching", digest=None),
    ]
    backend.stats = EngineStats(
        resident=[("x/device", b"x/device", 10), ("unloaded", b"u", 7), ("private", b"p", 7)]
    )
    every = await listed(client)
    assert {name: one["tier"] for name, one in every.items()} == {
        "unloaded": "device",
        "x/device": "device",
        "x/ready": "host",
        "y/bad": "source",
        "y/coming": "source",
        "y/gone": "disk",
        "y/new": "source",
    }
    assert list(every) == sorted(every)
    assert every["x/device"]["requests"] == 1, "the lease of the start is none of a request"
    assert every["y/bad"]["error"] == {
        "error_type": "adapter_incompatible",
        "message": "wrong base",
        "field": "r",
        "hint": "another one",
    }
    for query, names in (
        ("?state=ready", ["x/device", "x/ready"]),
        ("?tier=device", ["unloaded", "x/device"]),
        ("?prefix=y/&state=listed", ["y/gone", "y/new"]),
        ("?prefix=y/&tier=disk", ["y/gone"]),
        ("?limit=2", ["unloaded", "x/device"]),
        ("?limit=0", []),
    ):
        assert list(await listed(client, query)) == names, query
    assert (await get(client, "/adapters?limit=2&prefix=y"))[1]["total"] == 4
    for query in ("state=old", "tier=moon", "limit=-1", "limit=10001", "limit=1e3", "limit=²"):
        status, body = await get(client, f"/adapters?{query}")
        assert (status, body["field"]) == (422, query.partition("=")[0])


async def test_one_adapter(client: TestClient, backend: FakeBackend) -> None:
    backend.statuses = [
        status_of("a", state="failed", digest=None),
        status_of("a", source="local"),
        status_of("a", state="listed"),
    ]
    await client.put("/adapters/aliases/prod", json={"adapter_id": "a", "adapter_source": "local"})
    assert (await get(client, "/adapters/a"))[1]["state"] == "ready"
    assert (await get(client, "/adapters/prod"))[1]["source"] == "local"
    assert (await get(client, "/adapters/a?source=hub"))[1]["state"] == "failed"
    status, body = await get(client, "/adapters/other")
    assert (status, body["error_type"]) == (404, "adapter_not_found")
    assert "GET /adapters lists" in body["error"]


async def test_uses_are_bounded(backend: FakeBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter_use, "MAX_USED", 3)
    use = AdapterUse(backend, Metrics())
    leases = {name: await backend.acquire(AdapterRef((name,)), None) for name in "abcd"}
    for name in "abcadab":
        use.count(AdapterRef((name,)), leases[name])
    hits = {name: use.of(status_of(name)).hits for name in "abcd"}
    assert hits == {"a": 3, "b": 1, "c": 0, "d": 1}, "the least recently used are forgotten"
    for lease in leases.values():
        lease.release()


# -- prefetches


async def test_prefetch_answers_at_once(client: TestClient, backend: FakeBackend) -> None:
    backend.acquire_delay = 0.1
    for _ in range(2):
        answer = await post(client, "prefetch", "a", adapter_source="local")
        assert answer == (202, {"id": "a", "source": "local"})
    coming = (await listed(client))["a"]
    assert (coming["state"], coming["source"], coming["tier"]) == ("fetching", "local", "source")
    await until(lambda: not len(front_of(client).prefetches))
    assert len(backend.acquired) == 1, "one load for both"
    assert (await listed(client))["a"]["state"] == "ready"


async def test_a_failed_prefetch_is_seen(
    client: TestClient, backend: FakeBackend, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "engine")
    await post(client, "prefetch", "missing")
    backend.private.add("org/secret")
    backend.adapter_errors["org/secret"] = AdapterIncompatible("no", hint="another")
    await post(client, "prefetch", "org/secret", api_token="sesame")
    await until(lambda: not len(front_of(client).prefetches))
    assert "the prefetch of missing failed: no adapter" in caplog.text
    assert "sesame" not in caplog.text
    failed = (await listed(client))["missing"]
    assert failed["state"] == "failed" and failed["error"]["error_type"] == "adapter_not_found"
    own = {"x-adapter-token": "sesame"}
    assert "org/secret" in await listed(client, **own)
    assert "org/secret" not in await listed(client)
    assert "org/secret" not in await listed(client, **{"x-adapter-token": "other"})
    backend.adapter_errors.clear()
    await post(client, "prefetch", "org/secret", api_token="sesame")
    await until(lambda: not len(front_of(client).prefetches))
    assert (await listed(client, **own))["org/secret"]["state"] == "ready"


async def test_a_failure_that_the_exchange_lists_too_is_shown_once(
    client: TestClient, backend: FakeBackend
) -> None:
    backend.statuses = [status_of("missing", state="failed", digest=None)]
    await post(client, "prefetch", "missing", api_token="sesame")
    await until(lambda: not len(front_of(client).prefetches))
    headers = {"x-adapter-token": "sesame"}
    assert (await get(client, "/adapters", **headers))[1]["total"] == 1


async def test_an_unforeseen_failure_of_a_prefetch(
    client: TestClient, backend: FakeBackend, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL, "engine")
    backend.adapter_errors["a"] = ZeroDivisionError("clumsy")  # type: ignore[assignment]
    await post(client, "prefetch", "a")
    await until(lambda: not len(front_of(client).prefetches))
    assert (await listed(client))["a"]["error"]["message"] == "the prefetch failed: internal error"


async def test_prefetches_are_bounded(
    client: TestClient, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefetches, "MAX_OPEN", 3)
    backend.acquire_delay = 600
    for name in "abc":
        assert (await post(client, "prefetch", name))[0] == 202
    status, body = await post(client, "prefetch", "d")
    assert (status, body["error_type"]) == (429, "overloaded")
    assert (await post(client, "prefetch", "a"))[0] == 202, "it is being done"
    assert len(front_of(client).prefetches._open) == 3
    await front_of(client).prefetches.close()
    assert not len(front_of(client).prefetches) and not backend.waiting_acquires


async def test_failures_are_bounded(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    front_of(client).prefetches._failed.limit = 2
    for name in ("missing@1", "missing@2", "missing@3"):
        await post(client, "prefetch", name)
        await until(lambda: not len(front_of(client).prefetches))
    assert set(await listed(client)) == {"missing@2", "missing@3"}


# -- pins


async def test_pin_and_unpin(client: TestClient, backend: FakeBackend) -> None:
    status, entry = await post(client, "pin", "org/a", adapter_source="local")
    assert status == 200 and (entry["pinned"], entry["tier"], entry["requests"]) == (
        True,
        "device",
        0,
    )
    assert backend.device_calls == [("pin", b"org/a")]
    (request,) = backend.requests
    assert request.max_new_tokens == 1 and request.adapter is not None
    lease = backend.leases[0]
    assert not lease.num_released, "the pin holds it"
    assert (await get(client, "/cache"))[1]["host"]["pinned"] == 1
    assert (await post(client, "pin", "org/a", pinned=False, adapter_source="hub"))[0] == 422
    status, entry = await post(client, "pin", "org/a", pinned=False)
    assert status == 200 and not entry["pinned"] and lease.num_released == 1
    assert backend.device_calls[-1] == ("unpin", b"org/a")
    status, body = await post(client, "pin", "org/a", pinned=False)
    assert status == 422 and "is not pinned" in body["error"]


async def test_a_pin_stays_with_its_version(client: TestClient, backend: FakeBackend) -> None:
    """Until it is pinned again: then it is the newest version's."""
    await post(client, "pin", "a")
    first = backend.leases[0]
    second = replace(first.image, digest=b"second")
    acquire = backend.acquire

    async def newer(ref: AdapterRef, token: str | None, tenant: TenantRef = NO_TENANT) -> FakeLease:
        lease = await acquire(ref, token, tenant)
        lease.image = backend.in_host["a"] = second
        return lease

    backend.acquire = newer  # type: ignore[method-assign]
    assert await generate(client, "a") == 200
    assert not first.num_released and not (await listed(client))["a"]["pinned"]
    status, entry = await post(client, "pin", "a")
    assert entry["pinned"] and entry["digest"] == b"second".hex()
    assert first.num_released and ("unpin", b"a") in backend.device_calls
    assert len(front_of(client).pins) == 1
    await post(client, "unload", "a")


async def test_what_cannot_be_placed_is_not_pinned(
    client: TestClient, backend: FakeBackend
) -> None:
    backend.fail_after, backend.failure = 0, AdapterIncompatible("not finite", hint="another")
    assert (await post(client, "pin", "a"))[0] == 422
    assert not len(front_of(client).pins) and backend.device_calls[-1] == ("unpin", b"a")
    assert (await post(client, "pin", "missing"))[0] == 404


async def test_a_pin_goes_on_when_its_client_leaves(
    client: TestClient, backend: FakeBackend
) -> None:
    backend.gate = asyncio.Event()
    asking = asyncio.create_task(post(client, "pin", "a"))
    await until(lambda: backend.open)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    assert (await listed(client))["a"]["pinned"]
    assert front_of(client).loads.num_open == 1
    backend.gate.set()
    await until(lambda: not front_of(client).loads.num_open)
    assert (await listed(client))["a"]["pinned"] and not backend.cancelled
    await post(client, "unload", "a")


async def test_pins_are_bounded(
    client: TestClient, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert pins.MAX_PINS == 256
    monkeypatch.setattr(pins, "MAX_PINS", 2)
    for name in "aba":
        assert (await post(client, "pin", name))[0] == 200
    status, body = await post(client, "pin", "c")
    assert (status, body["field"]) == (422, "adapter_id")
    assert "2 adapters are pinned, which is the limit" in body["error"]
    monkeypatch.setattr(pins, "MAX_PINS", 256)
    backend.info = replace(backend.info, host_bytes=4 * 64)  # three quarters are three adapters
    assert (await post(client, "pin", "c"))[0] == 200
    status, body = await post(client, "pin", "d")
    assert (status, body["error_type"]) == (413, "adapter_too_large")
    assert "75% of host memory" in body["error"]
    assert backend.leases[-1].num_released == 1
    for name in "abc":
        assert (await post(client, "pin", name, pinned=False))[0] == 200
    assert not len(front_of(client).pins)


async def test_loads_and_pins_have_one_limit(
    client: TestClient, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loads, "MAX_OPEN", 2)
    backend.acquire_delay = 0.1
    asked = [post(client, what, "a") for what in ("load", "load", "load", "pin")]
    statuses = sorted(status for status, _ in await asyncio.gather(*asked))
    assert statuses == [200, 200, 429, 429]
    front_of(client).pins.unpin("a", None, (b"",))


async def test_the_end_of_a_server_ends_pins_and_prefetches(
    start: Start, backend: FakeBackend
) -> None:
    client = await start()
    await post(client, "pin", "a")
    backend.acquire_delay = 600
    await post(client, "prefetch", "b")
    asking = asyncio.create_task(post(client, "pin", "c"))
    await until(lambda: backend.waiting_acquires == 2)
    asking.cancel()
    await client.server.close()
    assert not backend.waiting_acquires and all(lease.num_released for lease in backend.leases)


async def test_a_dead_engine_pins_nothing(client: TestClient, backend: FakeBackend) -> None:
    backend.fail_after, backend.failure = 0, EngineDead("gone")
    assert (await post(client, "pin", "a"))[0] == 503
    assert not len(front_of(client).pins)


# -- unloading


async def test_unload(client: TestClient, backend: FakeBackend) -> None:
    await post(client, "pin", "a")
    await generate(client, "b")
    await client.put("/adapters/aliases/prod", json={"adapter_id": "a"})
    status, body = await post(client, "unload", "prod")
    assert (status, body) == (200, {"id": "a", "unloaded": [b"a".hex()]})
    assert backend.device_calls[-1] == ("drop", b"a") and all(
        lease.num_released for lease in backend.leases
    )
    assert set(await listed(client)) == {"b"}
    for adapter in ("a", "never"):
        status, body = await post(client, "unload", adapter)
        assert (status, body["error_type"]) == (404, "adapter_not_found")
        assert "is not loaded" in body["error"]
    assert (await post(client, "unload", "b", adapter_source="local"))[0] == 404
    assert (await post(client, "unload", "b", adapter_source="hub"))[0] == 200
    assert await generate(client, "a") == 200, "a later request loads it again"


async def test_unload_of_what_is_on_the_device_only(
    client: TestClient, backend: FakeBackend
) -> None:
    backend.statuses = [status_of("a", state="listed"), status_of("b", state="listed")]
    backend.stats = EngineStats(resident=[("a", b"a", 1)])
    assert (await post(client, "unload", "a"))[1]["unloaded"] == [b"a".hex()]
    assert backend.device_calls == [("drop", b"a")]
    assert (await post(client, "unload", "b"))[0] == 404


async def test_equal_contents_that_are_pinned_stay_on_the_device(
    client: TestClient, backend: FakeBackend
) -> None:
    """Two names of one adapter."""
    for name in ("a@1", "a@2"):
        assert (await post(client, "pin", name))[0] == 200
    assert (await post(client, "unload", "a@1"))[0] == 200
    assert {kind for kind, _ in backend.device_calls} == {"pin"}
    assert (await post(client, "unload", "a@2"))[0] == 200
    assert backend.device_calls[-2:] == [("unpin", b"a"), ("drop", b"a")]


# -- who may do and see what


async def test_a_private_adapter_is_its_tenants(client: TestClient, backend: FakeBackend) -> None:
    backend.private.add("org/own")
    own, other = {"x-adapter-token": "sesame"}, {"x-adapter-token": "other"}
    assert (await post(client, "pin", "org/own", headers=own))[1]["pinned"]
    for headers in ({}, other):
        assert await listed(client, **headers) == {}
        assert (await get(client, "/adapters/org/own", **headers))[0] == 404
        assert (await post(client, "unload", "org/own", headers=headers))[0] == 404
        assert (await post(client, "pin", "org/own", pinned=False, headers=headers))[0] == 422
        models = (await get(client, "/v1/models", **headers))[1]["data"]
        assert "org/own" not in [model["id"] for model in models]
        for path in ("/metrics", "/cache", "/info"):
            async with client.get(path, headers=headers) as response:
                assert "org/own" not in await response.text(), path
    assert list(await listed(client, **own)) == ["org/own"]
    assert (await get(client, "/adapters/org/own", **own))[1]["pinned"]
    assert (await post(client, "unload", "org/own", api_token="sesame"))[0] == 200


async def test_a_failed_unload_does_not_tell_private_names(
    client: TestClient, backend: FakeBackend
) -> None:
    """The answer is that for an adapter that does not exist."""
    backend.statuses = [status_of("own", tenant=token_hash("sesame"))]
    backend.stats = EngineStats(resident=[("private", b"own", 1)])
    answers = [await post(client, "unload", name) for name in ("own", "not")]
    assert answers[0][0] == answers[1][0] == 404
    assert answers[0][1]["error"].replace("own", "not") == answers[1][1]["error"]


@pytest.fixture
async def keyed(start: Start, tmp_path: Path) -> TestClient:
    file = tmp_path / "keys.yaml"
    file.write_text(KEYS)
    return await start({"api_keys_file": str(file)})


async def test_only_admins_change_things_for_everybody(
    keyed: TestClient, backend: FakeBackend
) -> None:
    for method, path, body in CHANGES:
        async with keyed.request(method, path, json=body, headers=USER) as response:
            answer = json.loads(await response.text())
            error = answer["error"]["code"] if path.startswith("/v1") else answer["error_type"]
            assert (response.status, error) == (403, "forbidden"), path
            assert "admin: true" in json.dumps(answer)
        async with keyed.request(method, path, data=b"{", headers=USER) as response:
            assert response.status == 403, "before its body is looked at"
    assert not backend.acquired and not backend.device_calls
    assert (await post(keyed, "prefetch", "org/a", headers=USER))[0] == 202
    for path in ("/adapters", "/adapters/aliases", "/cache"):
        assert (await get(keyed, path, **USER))[0] == 200
    for method, path, body in CHANGES:
        async with keyed.request(method, path, json=body, headers=ADMIN) as response:
            assert response.status in (200, 201), (path, await response.text())


async def test_keys_of_a_flag_are_admins(start: Start) -> None:
    client = await start({"api_key": ("one",)})
    assert (await post(client, "load", "a", headers={"x-api-key": "one"}))[0] == 200
    assert not ServerConfig().api_key


@pytest.mark.parametrize("what", POSTS)
async def test_broken_bodies(client: TestClient, backend: FakeBackend, what: str) -> None:
    path = f"/adapters/{what}"
    cases: list[tuple[bytes, int]] = [
        (b"", 400),
        (b"{", 400),
        (b"[]", 400),
        (b"\xff", 400),
        (b"[" * 100_000, 400),
        (b"{}", 422),
        (b'{"adapter_id": 5}', 422),
        (b'{"adapter_id": ""}', 422),
        (b'{"adapter_id": "a\\u0000"}', 422),
        (b'{"adapter_id": "a\\ud800"}', 400),
        (b'{"adapter_id": "' + b"x" * 1025 + b'"}', 422),
        (b'{"adapter_id": "a", "adapter_source": "' + b"x" * 65 + b'"}', 422),
        (b'{"adapter_id": "a", "api_token": "caf\xc3\xa9"}', 422),
        (b'{"adapter_id": "a", "api_token": 5}', 422),
        (b'{"adapter_id": "base"}', 422),
        (b'{"adapter_id": "tiny/base"}', 422),
    ]
    if what == "pin":
        cases.append((b'{"adapter_id": "a", "pinned": "yes"}', 422))
    for body, status in cases:
        async with client.post(path, data=body) as response:
            answer = await response.json()
            assert response.status == status, (body[:40], answer)
            assert answer["error_type"] == {400: "malformed_request", 422: "validation"}[status]
    assert not backend.acquired and not backend.device_calls


# -- vLLM's routes


async def lora(client: TestClient, what: str, **body: Any) -> tuple[int, Any]:
    async with client.post(f"/v1/{what}_lora_adapter", json=body) as response:
        text = await response.text()
        return response.status, text if response.status == 200 else json.loads(text)["error"]


def refused(code: int, message: str, kind: str = "InvalidUserInput") -> tuple[int, Any]:
    return code, {"message": message, "type": kind, "param": None, "code": code}


async def test_vllm_load_and_unload(client: TestClient, backend: FakeBackend) -> None:
    more = {"base_model_name": "x", "is_3d_lora_weight": False}
    done = await lora(client, "load", lora_name="sql", lora_path="org/a", **more)
    assert done == (200, "Success: LoRA adapter 'sql' added successfully.")
    assert await generate(client, "sql") == 200
    assert [ref for ref, _ in backend.acquired] == [AdapterRef(("org/a",))] * 2
    again = "If you want to load the adapter in place, set 'load_inplace' to True."
    assert await lora(client, "load", lora_name="sql", lora_path="org/b") == refused(
        400, f"The lora adapter 'sql' has already been loaded. {again}"
    )
    done = await lora(client, "load", lora_name="sql", lora_path="/models/b", load_inplace=True)
    assert done[0] == 200 and backend.acquired[-1][0] == AdapterRef(("/models/b",), "local")
    assert (await get(client, "/adapters/aliases/sql"))[1]["adapter_id"] == "/models/b"
    done = await lora(client, "unload", lora_name="sql", lora_int_id=3)
    assert done == (200, "Success: LoRA adapter 'sql' removed successfully.")
    assert backend.device_calls == [("drop", b"/models/b")]
    assert await lora(client, "unload", lora_name="sql") == refused(
        404, "The lora adapter 'sql' cannot be found.", "NotFoundError"
    )


async def test_vllm_refusals(client: TestClient, backend: FakeBackend) -> None:
    for body in ({}, {"lora_name": "a"}, {"lora_path": "b"}, {"lora_name": "", "lora_path": "b"}):
        assert await lora(client, "load", **body) == refused(
            400, "Both 'lora_name' and 'lora_path' must be provided."
        )
    needed = "'lora_name' needs to be provided to unload a LoRA adapter."
    assert await lora(client, "unload") == refused(400, needed)
    status, error = await lora(client, "load", lora_name="x", lora_path="missing")
    assert (status, error["type"], error["code"]) == (404, "NotFoundError", 404)
    assert error["message"].startswith("Loading lora x failed: No adapter found for missing")
    for name in ("base", "a@b"):
        status, error = await lora(client, "load", lora_name=name, lora_path="org/a")
        assert (status, error["type"]) == (400, "InvalidUserInput")
    assert (await lora(client, "load", lora_name="x", lora_path="a\x00"))[0] == 400
    backend.adapter_errors["org/bad"] = AdapterIncompatible("rank", hint="another")
    status, error = await lora(client, "load", lora_name="x", lora_path="org/bad")
    assert (status, error["code"]) == (400, "adapter_incompatible"), "truer than vLLM's 500"
    assert (await get(client, "/adapters/aliases"))[1] == {"aliases": []}
    assert (await lora(client, "load", lora_name=5))[0] == 400


async def test_vllm_of_two_at_once_one_has_the_name(
    client: TestClient, backend: FakeBackend
) -> None:
    backend.acquire_delay = 0.05
    asked = [lora(client, "load", lora_name="x", lora_path=path) for path in ("org/a", "org/b")]
    statuses = sorted([status for status, _ in await asyncio.gather(*asked)])
    assert statuses == [200, 400]


# -- the tiers


async def test_cache(client: TestClient, backend: FakeBackend) -> None:
    backend.stats = EngineStats(
        resident=[("a", b"a", 10)], arena_bytes=100, arena_used=10, in_use=1, evictions=3
    )
    counts = TierCounts(1, 2, 3, 4, 5, 6, 7, 8, {"fetch": 1.5})
    backend.tier_stats = TierStats(1000, 300, 200, 3, 0, 77, 2, counts)
    _, cache = await get(client, "/cache")
    assert cache == {
        "device": {
            "bytes": 10,
            "capacity_bytes": 100,
            "adapters": 1,
            "in_use": 1,
            "placements": 0,
            "evictions": 3,
        },
        "host": {
            "bytes": 300,
            "capacity_bytes": 1000,
            "adapters": 3,
            "leased_bytes": 200,
            "pinned": 0,
            "evictions": 7,
        },
        "disk": {
            "bytes": 77,
            "capacity_bytes": None,
            "entries": 2,
            "hits": 4,
            "misses": 5,
            "evictions": 8,
        },
        "hits": {"device": 0, "host": 0, "disk": 0, "source": 0},
        "loads": 2,
        "load_failures": 3,
        "loaded_bytes": 6,
        "seconds": {"fetch": 1.5},
    }


async def test_metrics_of_the_tiers(client: TestClient, backend: FakeBackend) -> None:
    backend.stats = EngineStats(arena_bytes=100, arena_used=10, evictions=3)
    counts = TierCounts(1, 2, 3, 4, 5, 6, 7, 8, {"fetch": 1.5})
    backend.tier_stats = TierStats(1000, 300, 200, 3, 5000, 77, 2, counts)
    text = await (await client.get("/metrics")).text()
    for line in (
        'lorax_adapter_bytes{tier="device"} 10.0',
        'lorax_adapter_bytes{tier="host"} 300.0',
        'lorax_adapter_bytes{tier="disk"} 77.0',
        'lorax_adapter_capacity_bytes{tier="device"} 100.0',
        'lorax_adapter_capacity_bytes{tier="host"} 1000.0',
        'lorax_adapter_capacity_bytes{tier="disk"} 5000.0',
        'lorax_adapter_evictions_total{tier="device"} 3.0',
        'lorax_adapter_evictions_total{tier="host"} 7.0',
        'lorax_adapter_evictions_total{tier="disk"} 8.0',
        'lorax_adapter_seconds_total{stage="fetch"} 1.5',
        'lorax_adapter_seconds_total{stage="parse"} 0.0',
        "lorax_adapter_loads_total 2.0",
        "lorax_adapter_load_failures_total 3.0",
        "lorax_adapter_loaded_bytes_total 6.0",
    ):
        assert f"\n{line}\n" in text, line
