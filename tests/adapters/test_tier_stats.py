"""What the exchange tells of its tiers: where an adapter was, what is in use, and what happened."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.adapters import disk_usage
from engine.adapters.disk_cache import DiskCache, Usage
from engine.adapters.disk_usage import DiskUsage
from engine.adapters.exchange import Exchange
from engine.adapters.https import HttpsSource
from engine.adapters.ref import AdapterRef
from engine.adapters.registry import disk_cache
from engine.adapters.sources import LocalSource, Version, token_hash
from engine.adapters.tiers import HostRegion
from engine.config import AdapterConfig, EngineConfig, ModelConfig
from engine.errors import AdapterError
from engine.messages import AdapterStatus, TierCounts
from tests.adapters.conftest import NAMES, contents
from tests.adapters.fake_web import WebServer
from tests.lora import tiny

LAYOUT = tiny.llama_layout("bfloat16")
Make = Callable[..., Exchange]


class TenantSource(LocalSource):
    """Each token has adapters of its own."""

    def tenant(self, token: str | None) -> bytes:
        return token_hash(token) if token else b""

    def resolve(self, ref: AdapterRef, token: str | None) -> Version:
        own = self.tenant(token)
        return replace(super().resolve(ref, token), salt=own, cache=own.hex())


@pytest.fixture
def web(saved: Path, tmp_path: Path) -> Iterator[WebServer]:
    server = WebServer(tmp_path)
    for name in NAMES:
        server.put(name, contents(saved / name))
    yield server
    server.stop()


@pytest.fixture
async def make(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Make]:
    """Makes exchanges with room for so many adapters and one download cache, which is read each time."""
    monkeypatch.setattr(disk_usage, "FRESH_S", 0.0)
    monkeypatch.setattr(disk_usage, "PATIENCE_S", 10.0)
    made: list[tuple[Exchange, HostRegion]] = []
    total = tiny.inspect(saved / "a", LAYOUT).image_bytes

    def build(room: float = 100, web: WebServer | None = None, **fields: Any) -> Exchange:
        given: dict[str, Any] = {"adapter_root": (str(saved),), "adapter_source": "local"} | fields
        config = EngineConfig(
            ModelConfig(model_id="org/base", huggingface_hub_cache=str(tmp_path / "cache")),
            AdapterConfig(**given),
        )
        sources: dict[str, Any] = {"local": TenantSource([saved])}
        if web is not None:
            given = {"context": web.context, "backoff_s": 0.01}
            sources["https"] = HttpsSource(disk_cache(config), (web.host,), **given)
        region = HostRegion.create(int(room * (total + 256)))
        exchange = Exchange(config, LAYOUT, region, sources=sources, room_patience_s=0.2)
        if web is not None:
            sources["https"]._cache = exchange._downloads
        made.append((exchange, region))
        return exchange

    yield build
    for exchange, region in made:
        await exchange.close()
        region.close()


async def load(exchange: Exchange, name: str, token: str | None = None) -> str:
    """Where it was."""
    with await exchange.acquire(AdapterRef.parse(name), token) as lease:
        return lease.tier


async def known(exchange: Exchange) -> dict[str, AdapterStatus]:
    return {status.name: status for status in await exchange.adapters()}


async def counts(exchange: Exchange) -> TierCounts:
    return (await exchange.tiers({})).counts


async def test_what_is_counted(make: Make) -> None:
    exchange = make(room=2)
    assert await counts(exchange) == TierCounts()
    found = [await load(exchange, name) for name in ("a", "b", "a", "c")]
    assert found == ["source", "source", "host", "source"]
    with pytest.raises(AdapterError):
        await load(exchange, "none")
    size = (await known(exchange))["a"].data_bytes
    counted = await counts(exchange)
    assert counted.seconds.keys() == {"fetch", "parse"} and min(counted.seconds.values()) > 0
    assert counted == TierCounts(
        host_hits=1,
        loads=3,
        loaded_bytes=3 * size,
        host_evictions=1,
        seconds=counted.seconds,
    ), "an adapter that does not exist is no load"


async def test_a_failed_load_is_counted(make: Make) -> None:
    exchange = make(max_adapter_rank=8)
    for _ in range(2):  # the second is refused without a load
        with pytest.raises(AdapterError):
            await load(exchange, "large")
    counted = await counts(exchange)
    assert (counted.failed_loads, counted.loads) == (1, 0)


async def test_who_waits_for_a_load_has_not_found_it_in_host_memory(make: Make) -> None:
    exchange = make()
    found = await asyncio.gather(*(load(exchange, "a") for _ in range(3)))
    assert found == ["source"] * 3
    assert ((await counts(exchange)).loads, (await counts(exchange)).host_hits) == (1, 0)


async def test_what_left_host_memory_is_still_known(make: Make) -> None:
    """With what was read of it, until another version of it is there."""
    exchange = make(room=1)
    await load(exchange, "a")
    (first,) = await exchange.adapters()
    assert (first.state, first.ranks, first.preloaded) == ("ready", [4], False) and first.revision
    await load(exchange, "b")
    gone = (await known(exchange))["a"]
    assert gone == replace_status(first, state="listed") and not gone.on_disk
    await load(exchange, "a")
    assert [(one.name, one.state) for one in await exchange.adapters()] == [
        ("b", "listed"),
        ("a", "ready"),
    ]


def replace_status(status: AdapterStatus, **changes: Any) -> AdapterStatus:
    fields = {name: getattr(status, name) for name in status.__struct_fields__}
    return AdapterStatus(**(fields | changes))


async def test_leases_that_no_request_uses_do_not_count(make: Make) -> None:
    exchange = make(preloaded_adapter_ids=("a",))
    await exchange.start()
    leases = [await exchange.acquire(AdapterRef.parse(name)) for name in "bbc"]
    assert [status.preloaded for status in (await known(exchange)).values()] == [True, False, False]
    one = (await exchange.tiers({})).host_used // 3
    idle = {leases[0].image.digest: 1, leases[2].image.digest: 1}
    for given, leased in (({}, 3), (idle, 2), ({leases[0].image.digest: 2}, 2)):
        assert (await exchange.tiers(given)).host_leased == leased * one
    assert await exchange.unload("b") == [leases[0].image.digest]
    stats = await exchange.tiers({})
    assert (stats.host_images, stats.host_leased, stats.host_used) == (2, 3 * one, 3 * one)
    for lease in leases:
        lease.release()
    stats = await exchange.tiers({})
    assert (stats.host_leased, stats.host_used) == (one, 2 * one)


async def test_unload_means_one_source_and_the_callers_tenants(make: Make) -> None:
    exchange = make()
    for token in (None, "alice", "bob"):
        await load(exchange, "a", token)
    digests = {status.digest for status in await exchange.adapters()}
    assert len(digests) == 1 and len(await exchange.adapters()) == 3
    assert not await exchange.unload("a", "hub") and not await exchange.unload("a", None, [b"x"])
    assert len(await exchange.unload("a", "local", [b"", token_hash("alice")])) == 1
    (left,) = await exchange.adapters()
    assert (left.state, left.tenant) == ("ready", token_hash("bob")), "its image is still there"


async def test_downloads_are_a_tier(make: Make, web: WebServer) -> None:
    """The first load downloads, the next finds the files on disk, also in the next process."""
    exchange = make(room=1, web=web, adapter_disk_cache_gb=1.0)
    where = f"https://{web.host}/"
    assert [await load(exchange, where + name) for name in "aba"] == ["source", "source", "disk"]
    assert await load(make(web=web), where + "b") == "disk"
    stats = await exchange.tiers({})
    assert (stats.counts.disk_hits, stats.counts.disk_misses) == (1, 2)
    assert (stats.disk_entries, stats.disk_capacity) == (2, 1 << 30)
    assert stats.disk_used == sum(
        len(data) for key, data in web.files.items() if key[1] in "ab" and "README" not in key
    )
    gone = (await known(exchange))[where + "b"]
    assert (gone.state, gone.on_disk) == ("listed", True)
    shutil.rmtree(exchange._downloads.folder)
    assert not (await known(exchange))[where + "b"].on_disk
    assert (await exchange.tiers({})).disk_entries == 0


async def test_evictions_of_the_disk_are_counted(make: Make, web: WebServer) -> None:
    size = sum(len(data) for key, data in web.files.items() if key[1] == "a" and "READ" not in key)
    exchange = make(web=web, adapter_disk_cache_gb=2.5 * size / (1 << 30))
    for name in NAMES[:3]:
        await load(exchange, f"https://{web.host}/{name}")
    stats = await exchange.tiers({})
    assert stats.counts.disk_evictions == 3 - stats.disk_entries > 0


# -- reading the disk


class StuckCache(DiskCache):
    """A file system that does not answer until `go` is set."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.readings = 0
        self.go = threading.Event()

    def usage(self) -> Usage:
        self.readings += 1
        assert self.go.wait(20)
        return Usage(self.readings)


async def test_nobody_waits_for_a_stuck_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_usage, "FRESH_S", 0.0)
    monkeypatch.setattr(disk_usage, "PATIENCE_S", 0.01)
    monkeypatch.setattr(disk_usage, "DEADLINE_S", 0.05)
    cache = StuckCache(tmp_path)
    usage = DiskUsage(cache)
    for _ in range(20):
        assert await usage.read() == Usage()
    assert cache.readings == 1, "one thread is stuck, and no more"
    cache.go.set()
    monkeypatch.setattr(disk_usage, "PATIENCE_S", 10.0)
    async with asyncio.timeout(10):
        while await usage.read() == Usage():
            await asyncio.sleep(0.005)
    assert usage.latest.num_bytes == 2
    await usage.close()


async def test_a_disk_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last reading serves."""
    monkeypatch.setattr(disk_usage, "FRESH_S", 0.0)
    cache = DiskCache(tmp_path)
    usage = DiskUsage(cache)
    (tmp_path / "lorax-downloads" / "entry").mkdir(parents=True)
    (tmp_path / "lorax-downloads" / "entry" / "file").write_bytes(b"123")
    assert (await usage.read()).num_bytes == 3

    def fail() -> Usage:
        raise OSError("broken")

    cache.usage = fail  # type: ignore[method-assign]
    assert (await usage.read()).num_bytes == 3
    await usage.close()
