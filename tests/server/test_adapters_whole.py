"""Loading, pinning and unloading adapters on the whole server: what happens to streams and to memory."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from engine.process.watch import Watch
from tests.server.whole import LARGE_BYTES, LARGE_RANK, RANK, TARGETS, Whole, serving

pytestmark = pytest.mark.asyncio(loop_scope="module")

FLOOD = 6  # adapters that share the rest of the arena
ARENA = 0.02  # share of the memory: 1 MiB, for three large adapters


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Whole]:
    async with serving(
        tmp_path_factory.mktemp("managed"),
        watch=Watch(max_ends=1000),
        adapter_memory_fraction=ARENA,
        adapter_cycle_time_s=0.05,
        host_cache_gb=20 * LARGE_BYTES / (1 << 30),
    ) as server:
        server.write("small", 1)
        for number in range(FLOOD):
            server.write(f"large{number}", 10 + number, rank=LARGE_RANK, targets=None)
        server.write_large("pinned")
        yield server


async def post(server: Whole, path: str, **body: Any) -> tuple[int, Any]:
    async with server.session.post(path, json=body) as response:
        return response.status, await response.json(content_type=None)


async def get(server: Whole, path: str) -> Any:
    async with server.session.get(path) as response:
        assert response.status == 200, await response.text()
        return await response.json()


async def entry(server: Whole, name: str) -> Any:
    return await get(server, f"/adapters/{name}")


async def levels(server: Whole) -> tuple[int, int, int]:
    """Bytes on the device and in host memory, and bytes that cannot leave it."""
    cache = await get(server, "/cache")
    return cache["device"]["bytes"], cache["host"]["bytes"], cache["host"]["leased_bytes"]


def residents(server: Whole) -> set[bytes]:
    """Digests of the adapters on the device, as last reported."""
    return {digest for _, digest, _ in server.backend.stats.resident}


async def settled(server: Whole, wanted: tuple[int, int, int]) -> None:
    """Waits until memory is as wanted: the engine reports some time after it has acted."""
    async with asyncio.timeout(60):
        while await levels(server) != wanted:
            await asyncio.sleep(0.02)


async def restarted(server: Whole) -> None:
    """Kills the exchange and waits for the next one."""
    backend, before = server.backend, server.backend.exchange_restarts
    pid = backend.pids["exchange"]
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    async with asyncio.timeout(120):
        while backend.exchange_restarts == before or backend.exchange_away:
            await asyncio.sleep(0.02)


async def test_load_shows_what_the_files_have(server: Whole) -> None:
    status, loaded = await post(server, "/adapters/load", adapter_id="small")
    assert status == 200
    assert (loaded["state"], loaded["tier"], loaded["source"]) == ("ready", "host", "local")
    assert (loaded["rank"], loaded["ranks"], sorted(loaded["targets"])) == (
        RANK,
        [RANK],
        sorted(TARGETS),
    )
    assert (
        loaded["bytes"] > 0
        and loaded["revision"]
        and loaded["seconds"].keys()
        == {
            "fetch",
            "parse",
        }
    )
    before = await get(server, "/cache")
    assert len(await server.tokens_of("small", 3)) == 3
    after = await get(server, "/cache")
    assert after["loads"] == before["loads"], "a request finds it"
    assert after["hits"]["host"] == before["hits"]["host"] + 1
    assert (await entry(server, "small"))["hits"] == 1


async def test_prefetch_and_its_failure(server: Whole) -> None:
    server.write("broken", 2).joinpath("adapter_config.json").write_text("{")
    for name in ("large0", "broken", "nowhere"):
        status, body = await post(server, "/adapters/prefetch", adapter_id=name)
        assert (status, body) == (202, {"id": name, "source": None})
    async with asyncio.timeout(60):
        while True:
            states = {one["id"]: one for one in (await get(server, "/adapters"))["adapters"]}
            named = [states.get(name, {}).get("state") for name in ("large0", "broken", "nowhere")]
            if named == ["ready", "failed", "failed"]:
                break
            await asyncio.sleep(0.02)
    assert states["broken"]["error"]["error_type"] == "adapter_load_failed"
    assert states["nowhere"]["error"]["error_type"] == "adapter_not_found"


async def test_unload_while_a_stream_runs(server: Whole) -> None:
    """The stream ends as it would have; then the memory is what it was before the adapter came."""
    expected = await server.tokens_of("small", 400)
    _, body = await post(server, "/adapters/unload", adapter_id="small")
    await server.idle()
    digest = bytes.fromhex(body["unloaded"][0])
    async with asyncio.timeout(60):
        while digest in residents(server):
            await asyncio.sleep(0.01)
    before = await levels(server)
    async with server.stream("small", 400) as stream:
        status, body = await post(server, "/adapters/unload", adapter_id="small")
        assert status == 200 and len(body["unloaded"]) == 1
        assert (await post(server, "/adapters/unload", adapter_id="small"))[0] == 404
        meanwhile = await levels(server)
        assert stream.ended or meanwhile[1] > before[1], "its memory is in use"
        await stream.reach(400)
        assert stream.error is None and stream.tokens == expected
    await settled(server, before)
    assert (await post(server, "/adapters/unload", adapter_id="small"))[0] == 404
    loads = (await get(server, "/cache"))["loads"]
    assert await server.tokens_of("small", 400) == expected
    assert (await get(server, "/cache"))["loads"] == loads + 1, "a later request loads it again"


async def test_a_pinned_adapter_stays_in_a_flood(server: Whole) -> None:
    """Two places of the arena serve six adapters in turns; the third is the pinned one's."""
    status, pinned = await post(server, "/adapters/pin", adapter_id="pinned")
    assert status == 200 and (pinned["tier"], pinned["pinned"]) == ("device", True)
    digest, seen = bytes.fromhex(pinned["digest"]), 0

    async def watch() -> None:
        nonlocal seen
        while True:
            assert digest in residents(server)
            seen += 1
            await asyncio.sleep(0.002)

    watching = asyncio.create_task(watch())
    before = server.backend.stats.placements
    for _ in range(3):
        asked = [server.ask(f"large{number}", tokens=30) for number in range(FLOOD)]
        assert {status for status, _ in await asyncio.gather(*asked)} == {200}
        assert (await server.ask("pinned"))[0] == 200
    assert not watching.done() and seen > 10, "it was there all the time"
    watching.cancel()
    await server.idle(pins=1)
    assert server.backend.stats.placements - before >= FLOOD, "the others came and went"
    assert (await post(server, "/adapters/pin", adapter_id="pinned", pinned=False))[0] == 200
    for number in range(FLOOD):
        assert (await server.ask(f"large{number}"))[0] == 200
    async with asyncio.timeout(60):  # it is no longer pinned
        while digest in residents(server):
            await asyncio.sleep(0.01)


async def test_a_pin_outlives_the_exchange(server: Whole) -> None:
    expected = await server.tokens_of("pinned", 20)
    assert (await post(server, "/adapters/pin", adapter_id="pinned"))[0] == 200
    device = server.backend.stats.placements
    host, leased = (await levels(server))[1:]
    await restarted(server)
    kept = await entry(server, "pinned")
    assert (kept["state"], kept["tier"], kept["pinned"]) == ("ready", "device", True)
    assert kept["requests"] == 0
    assert await server.tokens_of("pinned", 20) == expected
    assert server.backend.stats.placements == device, "it never left the device"
    assert (await levels(server))[2] == leased > 0
    assert (await levels(server))[1] <= host
    await server.idle(pins=1)
    assert (await post(server, "/adapters/unload", adapter_id="pinned"))[0] == 200
    async with asyncio.timeout(60):
        while (await levels(server))[2]:
            await asyncio.sleep(0.02)


async def counters(server: Whole) -> dict[str, float]:
    async with server.session.get("/metrics") as response:
        text = await response.text()
    names = r"^(lorax_adapter_\w+_(?:total|count|sum)(?:\{[^}]*\})?) (\S+)$"
    return {name: float(value) for name, value in re.findall(names, text, re.MULTILINE)}


async def test_counters_go_on_after_a_restart(server: Whole) -> None:
    await server.ask("small")
    before = await counters(server)
    assert before["lorax_adapter_loads_total"] > 0
    assert before['lorax_adapter_seconds_total{stage="parse"}'] > 0
    await restarted(server)
    again = await counters(server)
    assert not {name for name, value in before.items() if again[name] < value}
    server.write("new", 3)
    assert (await server.ask("new"))[0] == 200
    after = await counters(server)
    assert after["lorax_adapter_loads_total"] == before["lorax_adapter_loads_total"] + 1
    assert not {name for name, value in again.items() if after[name] < value}


async def test_vllm_clients(server: Whole) -> None:
    folder = str(server.write("sql", 4))
    for body, status in (
        ({"lora_name": "vllm-sql", "lora_path": folder}, 200),
        ({"lora_name": "vllm-sql", "lora_path": folder}, 400),
        ({"lora_name": "vllm-bad", "lora_path": "/etc"}, 403),
        ({"lora_name": "vllm-none", "lora_path": "./none"}, 404),
    ):
        async with server.session.post("/v1/load_lora_adapter", json=body) as response:
            assert response.status == status, await response.text()
    by_alias = await server.tokens_of("vllm-sql", 5)
    assert by_alias == await server.tokens_of("sql", 5) != await server.tokens_of(None, 5)
    async with server.session.post(
        "/v1/unload_lora_adapter", json={"lora_name": "vllm-sql"}
    ) as response:
        text = await response.text()
        assert (response.status, text) == (
            200,
            "Success: LoRA adapter 'vllm-sql' removed successfully.",
        )
    assert (await server.ask("vllm-sql"))[0] == 404
