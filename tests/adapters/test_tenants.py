"""Loads of several tenants: each tenant's next load starts in turn, however many another has."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from engine.adapters import loader
from engine.adapters.exchange import Exchange
from engine.adapters.ref import AdapterRef
from engine.adapters.sources import AdapterFiles, LocalSource, Progress, Version
from engine.adapters.tiers import HostRegion
from engine.adapters.turns import Turns
from engine.config import AdapterConfig, EngineConfig, ModelConfig
from engine.messages import TenantRef
from tests.adapters.test_exchange import Make, ref
from tests.adapters.test_exchange import make as make_exchange
from tests.adapters.test_merge import merged
from tests.lora import tiny

make = make_exchange
LAYOUT = tiny.llama_layout("bfloat16")
THREADS = 3
Loads = Callable[..., None]


class GatedSource(LocalSource):
    """Every name is the same adapter, in another version. `started` has the calls; each fetch waits at the gate."""

    def __init__(self, root: Path) -> None:
        super().__init__([root])
        self._loop = asyncio.get_running_loop()
        self.started = asyncio.Queue[str]()
        self.gate = threading.Semaphore(0)
        self.exchange: Exchange | None = None

    async def awaited_by(self, tenant: str) -> None:
        """Returns when a load of the tenant waits for a thread."""
        assert self.exchange is not None
        while tenant not in self.exchange._loader._fetchers["local"]._threads._waiting:
            await asyncio.sleep(0.001)

    def resolve(self, ref: AdapterRef, token: str | None) -> Version:
        if ref.id.startswith("b"):
            self._loop.call_soon_threadsafe(self.started.put_nowait, f"resolve {ref.id}")
        return replace(super().resolve(replace(ref, ids=("a",)), token), cache=ref.id)

    def fetch(self, version: Version, token: str | None, progress: Progress) -> AdapterFiles:
        self._loop.call_soon_threadsafe(self.started.put_nowait, version.cache)
        self.gate.acquire(timeout=60)
        return super().fetch(version, token, progress)


@pytest.fixture
async def source(saved: Path) -> GatedSource:
    return GatedSource(saved)


@pytest.fixture
async def loads(source: GatedSource, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Loads]:
    """Starts loads; the tenant is the first letter of the name."""
    monkeypatch.setattr(loader, "FETCH_THREADS", THREADS)
    config = EngineConfig(ModelConfig(model_id="org/base"), AdapterConfig(adapter_source="local"))
    region = HostRegion.create(1 << 20)
    exchange = source.exchange = Exchange(config, LAYOUT, region, sources={"local": source})
    tasks: list[asyncio.Task[None]] = []

    async def load(adapter: AdapterRef, tenant: str) -> None:
        (await exchange.acquire(adapter, None, TenantRef(tenant))).release()

    def start(*ids: str) -> None:
        adapter = merged(*ids) if len(ids) > 1 else ref(ids[0])
        tasks.append(asyncio.create_task(load(adapter, ids[0][0])))

    yield start
    for task in tasks:
        task.cancel()
    for _ in range(400):
        source.gate.release()
    await asyncio.gather(*tasks, return_exceptions=True)
    await exchange.close()
    region.close()


async def test_another_tenant_starts_next(loads: Loads, source: GatedSource) -> None:
    for number in range(THREADS + 50):
        loads(f"a{number}")
    for _ in range(THREADS):
        assert (await source.started.get()).startswith("a")
    loads("b0")
    await source.awaited_by("b")
    source.gate.release()
    started = [await source.started.get(), await source.started.get()]
    assert started[0] == "resolve b0"
    await source.awaited_by("b")
    source.gate.release()
    started.append(await source.started.get())
    assert started[1].startswith("a") and started[2] == "b0"
    assert source.started.empty()


async def test_parts_of_a_merge_are_its_tenants(loads: Loads, source: GatedSource) -> None:
    loads(*(f"a{number}" for number in range(16)))
    for _ in range(THREADS):
        assert (await source.started.get()).startswith("a")
    loads("b0", "b1")
    started: list[str] = []
    for _ in range(5):
        await source.awaited_by("b")
        source.gate.release()
        started.append(await source.started.get())
        if started[-1].startswith("resolve"):
            started.append(await source.started.get())
    assert started == ["resolve b0", "a3", "resolve b1", "a4", "b0", "a5", "b1"]


def waiting(turns: Turns) -> dict[str, int]:
    return {key: len(queue) for key, queue in turns._waiting.items()}


async def test_merges_and_memory_are_given_in_turn(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While two adapters in use fill the memory, a merge waits for it; others wait for their turn, by tenant."""
    monkeypatch.setattr(
        loader, "parse_threads", lambda device: 2
    )  # one merge at a time on any machine
    exchange = make(2, patience=60.0)
    held = [await exchange.acquire(ref(name)) for name in "ab"]

    async def load(tenant: str, adapter: AdapterRef) -> None:
        (await exchange.acquire(adapter, None, TenantRef(tenant))).release()

    def start(tenant: str, *adapters: AdapterRef) -> list[asyncio.Task[None]]:
        return [asyncio.create_task(load(tenant, adapter)) for adapter in adapters]

    merge_turns, turns = exchange._loader._merge_turns, exchange._room._turns
    tasks = start("a", merged("a", "c"))
    while merge_turns._free or turns._free:
        await asyncio.sleep(0.001)
    tasks += start("a", merged("a", "d"), merged("a", "e"), ref("c"), ref("d")) + start(
        "b", merged("a", "f"), ref("f")
    )
    while waiting(merge_turns) != {"a": 2, "b": 1} or waiting(turns) != {"a": 2, "b": 1}:
        await asyncio.sleep(0.001)
    for lease in held:
        lease.release()
    await asyncio.gather(*tasks)
