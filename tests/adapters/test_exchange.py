"""From names to leased images: once for all who wait, never for long because of somebody else."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import random
import shutil
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from engine.adapters import loader, versions
from engine.adapters.exchange import MAX_FAILED, Exchange
from engine.adapters.hub import HubSource
from engine.adapters.lease import Lease
from engine.adapters.ref import AdapterRef
from engine.adapters.sources import (
    AdapterFiles,
    DemoSource,
    LocalSource,
    Progress,
    Source,
    Version,
    token_hash,
)
from engine.adapters.tiers import HostRegion
from engine.config import AdapterConfig, EngineConfig, ModelConfig
from engine.errors import (
    AdapterForbidden,
    AdapterIncompatible,
    AdapterLoadFailed,
    AdapterNotFound,
    AdapterTooLarge,
    LoraxError,
    Overloaded,
)
from engine.files import OpenFile
from engine.lora.image import read_image
from engine.lora.tensors import TensorInfo
from engine.messages import AdapterImageRef
from engine.ops.layout import data_start
from tests.adapters.conftest import NAMES, contents
from tests.adapters.fake_hub import FakeHub
from tests.lora import tiny

LAYOUT = tiny.llama_layout("bfloat16")
Make = Callable[..., Exchange]


class CountingSource(LocalSource):
    """A local source that counts, and waits or fails on demand."""

    def __init__(self, root: Path, name: str = "local") -> None:
        super().__init__([root])
        self.name = name
        self.resolved: Counter[str] = Counter()
        self.fetched: Counter[str] = Counter()
        self.open = threading.Event()
        self.open.set()
        self.failures = 0

    def resolve(self, ref: AdapterRef, token: str | None) -> Version:
        self.resolved[ref.id] += 1
        return super().resolve(ref, token)

    def fetch(self, version: Version, token: str | None, progress: Progress) -> AdapterFiles:
        self.fetched[Path(version.id).name] += 1
        assert self.open.wait(10)
        if self.failures:
            self.failures -= 1
            raise AdapterLoadFailed("the disk is away", hint="bring it back")
        return super().fetch(version, token, progress)


@pytest.fixture
async def make(saved: Path) -> AsyncIterator[Make]:
    """Makes exchanges with room for so many of the equal adapters, and ends them."""
    made: list[tuple[Exchange, HostRegion]] = []
    total = tiny.inspect(saved / "a", LAYOUT).image_bytes

    def build(room: float = 100, sources: dict[Any, Any] | None = None, **fields: Any) -> Exchange:
        patience = fields.pop("patience", 0.2)
        recall = fields.pop("recall", lambda num_bytes: None)
        given: dict[str, Any] = {"adapter_root": (str(saved),), "adapter_source": "local"}
        config = EngineConfig(
            model=ModelConfig(model_id="org/base"), adapters=AdapterConfig(**(given | fields))
        )
        region = HostRegion.create(int(room * (total + 256)))
        exchange = Exchange(
            config, LAYOUT, region, sources=sources, room_patience_s=patience, recall=recall
        )
        made.append((exchange, region))
        return exchange

    yield build
    for exchange, region in made:
        exchange.tier.check()
        await exchange.close()
        region.close()


def image_of(exchange: Exchange, lease: Lease) -> memoryview:
    start = lease.image.offset
    size = data_start(LAYOUT.record_bytes) + lease.image.data_bytes
    return exchange._loader._region.view[start : start + size]


def digest_of(exchange: Exchange, lease: Lease) -> bytes:
    """The digest of what really lies in the region."""
    image = image_of(exchange, lease)
    state = hashlib.sha256(image[: LAYOUT.record_bytes])
    state.update(image[data_start(LAYOUT.record_bytes) :])
    return state.digest()[:16]


def ref(name: str) -> AdapterRef:
    return AdapterRef.parse(name)


async def test_acquire(make: Make, saved: Path) -> None:
    exchange = make()
    with await exchange.acquire(ref("a")) as lease:
        assert lease.image.digest == digest_of(exchange, lease)
        assert lease.image.digest.hex() == tiny.inspect(saved / "a", LAYOUT).digest
        assert lease.image.name == "a" and lease.image.stacked_rank == 4 and lease.cache_salt == b""
        assert len(read_image(image_of(exchange, lease), LAYOUT)) == 2 * tiny.LAYERS
        (status,) = await exchange.adapters()
        assert (status.name, status.source, status.state) == ("a", "local", "ready")
        assert status.leases == 1 and status.targets == ["q_proj", "up_proj"]
        assert set(status.seconds) == {"fetch", "parse"}
        assert status.data_bytes == lease.image.data_bytes
    (status,) = await exchange.adapters()
    assert status.leases == 0
    lease.release()
    exchange.tier.check()


async def test_single_flight(make: Make, saved: Path) -> None:
    """Thousands of requests for a cold adapter are one load, and one more asks nobody."""
    source = CountingSource(saved)
    exchange = make(sources={"local": source})
    leases = await asyncio.gather(*(exchange.acquire(ref("a")) for _ in range(2000)))
    assert source.resolved["a"] == 1
    assert source.fetched["a"] == 2, "once to load, once to see that nothing changed meanwhile"
    assert {lease.image for lease in leases} == {leases[0].image}
    (await exchange.acquire(ref("a"))).release()
    assert source.resolved["a"] == 1 and source.fetched["a"] == 2
    for lease in leases:
        lease.release()
        lease.release()
    (status,) = await exchange.adapters()
    assert status.leases == 0


async def test_failures_reach_all_and_are_forgotten(make: Make, saved: Path) -> None:
    source = CountingSource(saved)
    exchange = make(sources={"local": source})
    source.failures = 1
    found = await asyncio.gather(
        *(exchange.acquire(ref("a")) for _ in range(50)), return_exceptions=True
    )
    assert len({id(error) for error in found}) == 50, "each has an error of its own"
    assert all(isinstance(error, AdapterLoadFailed) and error.hint for error in found)
    (status,) = await exchange.adapters()
    assert status.state == "failed" and status.error and "disk" in status.error["message"]
    (await exchange.acquire(ref("a"))).release()
    (status,) = await exchange.adapters()
    assert status.state == "ready" and status.error is None


async def test_nobody_waits_for_another_adapter(make: Make, saved: Path) -> None:
    slow, quick = CountingSource(saved, "hub"), CountingSource(saved)
    slow.open.clear()
    exchange = make(sources={"hub": slow, "local": quick})
    waiting = asyncio.create_task(exchange.acquire(AdapterRef.parse("a", "hub")))
    await asyncio.sleep(0.05)
    (await asyncio.wait_for(exchange.acquire(AdapterRef.parse("b", "local")), 5)).release()
    assert not waiting.done()
    states = {status.name: status.state for status in await exchange.adapters()}
    assert states == {"a": "fetching", "b": "ready"}
    slow.open.set()
    (await waiting).release()


async def test_a_waiter_that_goes_leaves_nothing_leased(make: Make, saved: Path) -> None:
    source = CountingSource(saved)
    source.open.clear()
    exchange = make(sources={"local": source})
    waiters = [asyncio.create_task(exchange.acquire(ref("a"))) for _ in range(5)]
    await asyncio.sleep(0.05)
    for waiter in waiters[1:]:
        waiter.cancel()
    source.open.set()
    (await waiters[0]).release()
    source.open.clear()
    alone = asyncio.create_task(exchange.acquire(ref("b")))
    await asyncio.sleep(0.05)
    alone.cancel()
    source.open.set()
    while (await exchange.adapters())[-1].state != "ready":
        await asyncio.sleep(0.01)
    assert [status.leases for status in await exchange.adapters()] == [0, 0]


async def test_a_failure_that_nobody_waits_for_is_only_a_status(make: Make, saved: Path) -> None:
    told: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
    source = CountingSource(saved)
    source.failures = 1
    source.open.clear()
    exchange = make(sources={"local": source})
    alone = asyncio.create_task(exchange.acquire(ref("a")))
    await asyncio.sleep(0.05)
    alone.cancel()
    del alone  # and with it the last frame that knows the load
    source.open.set()
    while (await exchange.adapters())[-1].state != "failed":
        await asyncio.sleep(0.01)
    await asyncio.sleep(0)
    gc.collect()
    assert told == []


async def test_eviction_and_leases(make: Make, saved: Path) -> None:
    """Three fit, six are wanted by many at once: every lease shows its own adapter's bytes while it is held."""
    source = CountingSource(saved)
    exchange = make(room=3, patience=20.0, sources={"local": source})
    chance = random.Random(1)
    digests: dict[str, bytes] = {}

    async def request(name: str, seconds: float) -> None:
        with await exchange.acquire(ref(name)) as lease:
            exchange.tier.check()
            assert digests.setdefault(name, lease.image.digest) == lease.image.digest
            await asyncio.sleep(seconds)
            assert digest_of(exchange, lease) == lease.image.digest
        exchange.tier.check()

    for _ in range(3):
        await asyncio.gather(
            *(request(chance.choice(NAMES), chance.random() * 0.01) for _ in range(50))
        )
    assert len(set(digests.values())) == 6
    num_loads = source.fetched.total() // 2  # a load fetches twice
    assert num_loads - len(exchange.tier) >= 6, "as many were evicted"
    assert all(status.leases == 0 for status in await exchange.adapters())
    assert len(exchange.tier) <= 3


async def test_a_full_tier(make: Make) -> None:
    """Leases keep their images; who finds no room waits, is told after a while, and gets it when they go."""
    exchange = make(room=2)
    leases = [await exchange.acquire(ref(name)) for name in "ab"]
    started = time.monotonic()
    with pytest.raises(Overloaded) as caught:
        await exchange.acquire(ref("c"))
    assert "--host-cache-gb" in (caught.value.hint or "") and time.monotonic() - started >= 0.2
    waiting = asyncio.create_task(exchange.acquire(ref("d")))
    await asyncio.sleep(0.05)
    leases[0].release()
    lease = await waiting
    assert lease.image.offset == leases[0].image.offset
    with pytest.raises(AdapterTooLarge) as too_large:
        await exchange.acquire(ref("large"))
    assert "--host-cache-gb" in (too_large.value.hint or "")


async def test_refusals_name_the_cause(make: Make) -> None:
    exchange = make(max_adapter_rank=4)
    with pytest.raises(AdapterIncompatible) as caught:
        await exchange.acquire(ref("large"))
    assert "--max-adapter-rank 12" in (caught.value.hint or "")
    with pytest.raises(AdapterNotFound):
        await exchange.acquire(ref("none"))
    with pytest.raises(AdapterForbidden):
        await exchange.acquire(ref("/etc"))
    assert not list(exchange.tier) and exchange.tier.used == 0


async def test_equal_contents_share_one_image(make: Make, saved: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        shutil.copytree(saved / "a", tmp_path / name)
    exchange = make(adapter_root=(str(tmp_path),))
    one, two = [await exchange.acquire(ref(name)) for name in ("one", "two")]
    assert one.image.offset == two.image.offset and one.image.digest == two.image.digest
    assert [status.leases for status in await exchange.adapters()] == [2, 2]
    assert await exchange.unload("one") and one.image.digest in exchange.tier
    assert await exchange.unload("two") and one.image.digest not in exchange.tier
    assert exchange.tier.used > 0, "the leases keep it"
    one.release()
    two.release()
    assert exchange.tier.used == 0


async def test_updates_are_seen(make: Make, saved: Path, tmp_path: Path) -> None:
    """A folder that changed is a new version; who holds the old one keeps it."""
    shutil.copytree(saved / "a", tmp_path / "x")
    source = CountingSource(tmp_path)
    source.ttl_s = 0.0
    exchange = make(sources={"local": source})
    old = await exchange.acquire(ref("x"))
    shutil.rmtree(tmp_path / "x")
    shutil.copytree(saved / "b", tmp_path / "x")
    new = await exchange.acquire(ref("x"))
    assert new.image.digest != old.image.digest
    for lease in (old, new):
        assert digest_of(exchange, lease) == lease.image.digest


async def test_what_was_known_is_asked_again_if_it_fails(
    make: Make, saved: Path, tmp_path: Path
) -> None:
    """The version was known, its files were replaced, its image evicted: the newest version is served."""
    shutil.copytree(saved / "a", tmp_path / "x")
    source = CountingSource(tmp_path)
    source.ttl_s = 1000.0
    exchange = make(sources={"local": source})
    with await exchange.acquire(ref("x")) as old:
        pass
    exchange.tier.drop(old.image.digest)
    shutil.rmtree(tmp_path / "x")
    shutil.copytree(saved / "b", tmp_path / "x")
    with await exchange.acquire(ref("x")) as new:
        assert new.image.digest.hex() == tiny.inspect(saved / "b", LAYOUT).digest


async def test_unload_and_preload(make: Make) -> None:
    exchange = make(room=2, preloaded_adapter_ids=("a",), adapter_id="b")
    await exchange.start()
    with pytest.raises(Overloaded):
        await exchange.acquire(ref("c"))
    loaded = {status.name: (status.state, status.leases) for status in await exchange.adapters()}
    assert loaded == {"a": ("ready", 1), "b": ("ready", 1), "c": ("failed", 0)}
    held = await exchange.acquire(ref("a"))
    assert await exchange.unload("a") and not await exchange.unload("a")
    assert [status.name for status in await exchange.adapters()] == ["c", "b"]
    assert digest_of(exchange, held) == held.image.digest, "in use, so still there"
    held.release()
    (await exchange.acquire(ref("c"))).release()
    assert not await exchange.unload("none")


async def test_adapters_of_the_demo_are_listed_before_they_are_used(
    make: Make, saved: Path
) -> None:
    exchange = make(sources={"demo": DemoSource(saved), "local": CountingSource(saved)})
    names = sorted(folder.name for folder in saved.iterdir())
    with await exchange.acquire(ref("b")):
        states = {status.name: status.state for status in await exchange.adapters()}
    assert states == dict.fromkeys(names, "listed") | {"b": "ready"}


async def test_preloading_what_is_not_there(make: Make) -> None:
    with pytest.raises(AdapterNotFound):
        await make(preloaded_adapter_ids=("none",)).start()


async def test_unload_between_landing_and_waking(make: Make, saved: Path) -> None:
    """The image of a load that has just ended belongs to those who waited, whatever is unloaded."""
    source = CountingSource(saved)
    exchange = make(sources={"local": source})
    load = exchange._loader.load

    async def load_and_unload(*given: Any) -> Any:
        image = await load(*given)
        asyncio.get_running_loop().call_soon(lambda: asyncio.ensure_future(exchange.unload("a")))
        return image

    exchange._loader.load = load_and_unload  # type: ignore[method-assign]
    lease = await exchange.acquire(ref("a"))
    await asyncio.sleep(0.01)
    assert digest_of(exchange, lease) == lease.image.digest
    lease.release()
    exchange.tier.check()


async def test_close_while_loading(make: Make, saved: Path) -> None:
    source = CountingSource(saved)
    source.open.clear()
    exchange = make(sources={"local": source})
    waiting = [asyncio.create_task(exchange.acquire(ref(name))) for name in "ab"]
    await asyncio.sleep(0.05)
    closing = asyncio.create_task(exchange.close())
    found = await asyncio.gather(*waiting, return_exceptions=True)
    source.open.set()
    await closing
    assert all(isinstance(error, AdapterLoadFailed) for error in found), found
    with pytest.raises(AdapterLoadFailed, match="shutting down"):
        await exchange.acquire(ref("c"))


# -- many names


class EndlessSource(Source):
    """One name in nine exists; few of those can be loaded, and they are all alike."""

    name = "local"
    searched = True
    ttl_s = 1000.0

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def resolve(self, ref: AdapterRef, token: str | None) -> Version:
        number = int(ref.id)
        if number % 9:
            raise AdapterNotFound(f"there is no {ref.id}")
        return Version("local", ref.id, "1", "adapter_model.safetensors")

    def fetch(self, version: Version, token: str | None, progress: Progress) -> AdapterFiles:
        if int(version.id) % 100:
            raise AdapterLoadFailed("not today")
        return LocalSource([self.folder.parent]).fetch(
            LocalSource([self.folder.parent]).resolve(AdapterRef.parse(self.folder.name), None),
            None,
            progress,
        )


async def test_thousands_of_names_leave_little_behind(
    make: Make, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions, "MAX_RESOLVED", 300)
    exchange = make(sources={"local": EndlessSource(saved / "a")})

    async def ask(number: int) -> bool:
        try:
            (await exchange.acquire(ref(str(number)))).release()
        except (AdapterLoadFailed, AdapterNotFound):
            return False
        return True

    served = 0
    for start in range(0, 4000, 1000):
        served += sum(await asyncio.gather(*(ask(start + n) for n in range(1000))))
    assert served == 5
    assert len(exchange._versions) == versions.MAX_RESOLVED
    assert len(exchange._adapters) == 5 and len(exchange._failed) == MAX_FAILED
    assert len(await exchange.adapters()) == 5 + MAX_FAILED
    assert not exchange._loads and not exchange._versions._asking


async def test_versions_beyond_memory_are_forgotten(
    make: Make, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.adapters.exchange.MAX_EVICTED", 10)
    exchange = make(sources={"local": EndlessSource(saved / "a")})
    for number in range(100, 10_000, 100):
        if number % 9 == 0:
            (await exchange.acquire(ref(str(number)))).release()
    assert len(exchange._adapters) == 11 and len(exchange.tier) == 1


# -- the hub


def hub_source(hub: FakeHub, cache: Path, **fields: Any) -> HubSource:
    given = {"endpoint": hub.url, "attempts": 2, "backoff_s": 0.01} | fields
    return HubSource(None, cache, **given)


async def test_hub_single_flight(make: Make, hub: FakeHub, tmp_path: Path) -> None:
    hub.delay_s = 0.05
    exchange = make(sources={"hub": hub_source(hub, tmp_path)}, adapter_source="hub")
    leases = await asyncio.gather(*(exchange.acquire(ref("org/public")) for _ in range(1000)))
    assert hub.count("GET org/public/resolve") == 2 and hub.count("api/models") == 1
    assert len({lease.image for lease in leases}) == 1


async def test_every_tenant_is_asked_for(make: Make, hub: FakeHub, tmp_path: Path) -> None:
    """A private adapter that is in memory is still only for those whose own token shows it."""
    exchange = make(sources={"hub": hub_source(hub, tmp_path)}, adapter_source="hub")
    name = ref("org/private")
    alice = await exchange.acquire(name, "alice")
    operator = await exchange.acquire(name, "operator")
    shared = [(lease.image.digest, lease.image.offset) for lease in (alice, operator)]
    assert shared[0] == shared[1], "one image"
    assert alice.cache_salt and operator.cache_salt and alice.cache_salt != operator.cache_salt
    before = sum(hub.requests.values())
    for _ in range(10):
        assert (await exchange.acquire(name, "alice")).cache_salt == alice.cache_salt
    assert sum(hub.requests.values()) == before, "an answer serves for a while"
    for token in (None, "bob", "expired"):
        for _ in range(2):
            with pytest.raises((AdapterForbidden, AdapterNotFound)):
                await exchange.acquire(name, token)


async def test_a_tenant_that_lost_access(make: Make, hub: FakeHub, tmp_path: Path) -> None:
    source = hub_source(hub, tmp_path, ttl_s=1.0)
    exchange = make(sources={"hub": source}, adapter_source="hub")
    name = ref("org/private")
    (await exchange.acquire(name, "alice")).release()
    hub.repos["org/private"].readers.discard("alice")
    (await exchange.acquire(name, "alice")).release()
    await asyncio.sleep(1.0)
    for _ in range(2):
        with pytest.raises(AdapterNotFound):
            await exchange.acquire(name, "alice")


async def test_a_branch_that_moves(
    make: Make, hub: FakeHub, tmp_path: Path, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new commit is seen when the old answer has aged; a hub that is slow or away stops nobody."""
    source = hub_source(hub, tmp_path, ttl_s=2.0)
    exchange = make(sources={"hub": source}, adapter_source="hub")
    monkeypatch.setattr(versions, "REFRESH_PATIENCE_S", 0.05)
    name = ref("org/public")

    async def digest() -> str:
        with await exchange.acquire(name) as lease:
            return lease.image.digest.hex()

    first, second = (tiny.inspect(saved / folder, LAYOUT).digest for folder in "ab")
    assert await digest() == first
    hub.repos["org/public"].commit(contents(saved / "b"))
    assert await digest() == first
    await asyncio.sleep(2.0)
    hub.delay_s = 1.0
    assert await digest() == first, "the hub takes its time"
    hub.delay_s = 0.0
    async with asyncio.timeout(30):
        while await digest() != second:
            await asyncio.sleep(0.05)
    hub.stop()
    await asyncio.sleep(2.0)
    assert await digest() == second


async def test_errors_of_our_own_are_one_adapters_failure(
    make: Make, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def explode(*given: object) -> None:
        raise ZeroDivisionError("a mistake")

    exchange = make()
    monkeypatch.setattr(exchange._loader, "_open", explode)
    with pytest.raises(LoraxError, match="could not be loaded"):
        await exchange.acquire(ref("a"))
    monkeypatch.undo()
    (await exchange.acquire(ref("a"))).release()


# -- faults


async def test_a_stuck_load_costs_its_own_requests(make: Make, saved: Path) -> None:
    """More loads are stuck than there are threads to parse with; what they may write to is free when they end."""
    source = CountingSource(saved)
    exchange = make(sources={"local": source}, adapter_load_timeout_s=2.0)
    exchange._loader._open = stuck = Stuck(exchange._loader._open)  # type: ignore[method-assign]
    found = await asyncio.gather(
        *(exchange.acquire(ref(name)) for name in "abc"), return_exceptions=True
    )
    assert all(isinstance(error, AdapterLoadFailed) for error in found), found
    assert exchange.abandoned >= 2
    stuck.names = set()
    (await exchange.acquire(ref("d"))).release()
    stuck.gate.set()
    while exchange.abandoned:
        await asyncio.sleep(0.005)
    for name in "abc":
        (await exchange.acquire(ref(name))).release()


class Stuck:
    """Opens files, but those of `names` only when the gate is open."""

    def __init__(self, open: Callable[..., Any]) -> None:
        self.open = open
        self.names = set("abc")
        self.gate = threading.Event()

    def __call__(self, config: OpenFile, *given: Any) -> Any:
        if config.path.parent.name in self.names:
            self.gate.wait(10)
        return self.open(config, *given)


async def test_a_stuck_writer_keeps_its_bytes(
    make: Make, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever comes later must not be given what a thread may still write to."""
    gate, write = threading.Event(), loader.write_image
    exchange = make(room=2, adapter_load_timeout_s=2.0)

    def stuck(weights: Any, layout: Any, out: memoryview, pause: Any) -> bytes:
        gate.wait(10)
        return write(weights, layout, out, lambda: None)

    monkeypatch.setattr(loader, "write_image", stuck)
    with pytest.raises(AdapterLoadFailed):
        await exchange.acquire(ref("a"))
    monkeypatch.setattr(loader, "write_image", write)
    used = exchange.tier.used
    assert used > 0
    lease = await exchange.acquire(ref("b"))
    gate.set()
    while exchange.abandoned:
        await asyncio.sleep(0.005)
    assert digest_of(exchange, lease) == lease.image.digest
    assert exchange.tier.used == used, "b alone"


async def test_what_cannot_be_served_is_not_read_again(make: Make, saved: Path) -> None:
    source = CountingSource(saved)
    exchange = make(sources={"local": source}, max_adapter_rank=4)
    messages = set()
    for _ in range(5):
        with pytest.raises(AdapterIncompatible) as caught:
            await exchange.acquire(ref("large"))
        messages.add(str(caught.value))
    assert source.fetched["large"] == 1 and len(messages) == 1


async def test_a_refusal_keeps_nothing_of_what_was_read(make: Make, saved: Path) -> None:
    """Only its text: an exception would keep the frames that raised it, and the files' contents with them."""
    exchange = make(max_adapter_rank=4)
    with suppress(AdapterIncompatible):  # pytest.raises would keep the exception
        await exchange.acquire(ref("large"))
        raise AssertionError("it was served")
    kept: list[object] = [exchange]
    for _ in range(500):  # the thread may not have ended yet
        await asyncio.sleep(0.01)
        gc.collect()
        kept = [one for one in gc.get_objects() if type(one) in (TensorInfo, OpenFile)]
        if not kept:
            break
    assert kept == []


async def test_a_full_tier_recalls_leases_that_nobody_uses(make: Make) -> None:
    idle: list[Lease] = []
    asked: list[int] = []

    def recall(num_bytes: int) -> None:
        asked.append(num_bytes)
        if idle:
            idle.pop(0).release()

    exchange = make(room=2, recall=recall, patience=10.0)
    idle += [await exchange.acquire(ref(name)) for name in "ab"]
    lease = await exchange.acquire(ref("c"))
    assert len(asked) == 1 and asked[0] >= lease.image.data_bytes and len(idle) == 1


async def test_images_of_an_exchange_before_this_one_stay(make: Make, saved: Path) -> None:
    """By their leases; whoever asks for the adapter anew has its files read, and finds the same image."""
    exchange = make(room=4, preloaded_adapter_ids=("a",))
    await exchange.start()
    held = [await exchange.acquire(ref(name)) for name in ("a", "b", "b")]
    source = CountingSource(saved)
    config = exchange._config
    region = exchange._loader._region
    with pytest.raises(ValueError):
        Exchange(config, LAYOUT, region).adopt([replace_offset(held[0].image, 7)], {})
    with pytest.raises(ValueError):
        Exchange(config, LAYOUT, region).adopt(
            [held[0].image], {1: replace_offset(held[1].image, held[0].image.offset + 256)}
        )
    again = Exchange(config, LAYOUT, region, sources={"local": source}, room_patience_s=0.2)
    leases = again.adopt(exchange.preloaded, {call: lease.image for call, lease in enumerate(held)})
    again.tier.check()
    assert [leases[call].image for call in range(3)] == [lease.image for lease in held]
    states = {status.name: (status.state, status.leases) for status in await again.adapters()}
    assert states == {"a": ("ready", 2), "b": ("ready", 2)}
    for name in "abcd":
        lease = await again.acquire(ref(name))
        assert digest_of(again, lease) == lease.image.digest
        assert source.fetched[name] == 2, "read, whatever lay there"
        if name in "ab":
            assert lease.image in [one.image for one in held]
        leases[len(leases)] = lease
    assert sorted(status.name for status in await again.adapters()) == ["a", "b", "c", "d"]
    for lease in leases.values():
        lease.release()
        lease.release()
    again.tier.check()
    assert {status.name for status in await again.adapters() if status.leases} == {"a"}
    assert await again.unload("a") and again.tier.used < exchange.tier.used * 2
    await again.close()


def replace_offset(image: AdapterImageRef, offset: int) -> AdapterImageRef:
    return msgspec.structs.replace(image, offset=offset)


class TenantSource(LocalSource):
    """A source whose adapters are private; the server's own token opens `b`."""

    def tenant(self, token: str | None) -> bytes:
        return token_hash(token or "server")

    def resolve(self, ref: AdapterRef, token: str | None) -> Version:
        found = super().resolve(ref, token)
        return replace(found, salt=self.tenant(token if found.id.endswith("a") else None))


async def test_a_tenants_adapter_is_marked(make: Make, saved: Path) -> None:
    """Whoever has no token may see what the server's own token opens, and no more."""
    exchange = make(sources={"local": TenantSource([saved])})
    for name, token, tenant in (("a", "alice", token_hash("alice")), ("b", "alice", b"")):
        with await exchange.acquire(ref(name), token) as lease:
            assert lease.image.tenant == tenant and lease.cache_salt
    statuses = {status.name: status.tenant for status in await exchange.adapters()}
    assert statuses == {"a": token_hash("alice"), "b": b""}


@pytest.mark.parametrize(("large_bytes", "lowered"), [(0, [loader.LARGE_NICENESS]), (1 << 30, [])])
async def test_large_images_are_written_at_a_lower_priority(
    make: Make, monkeypatch: pytest.MonkeyPatch, large_bytes: int, lowered: list[int]
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(loader, "LARGE_BYTES", large_bytes)
    monkeypatch.setattr("engine.adapters.loader.os.nice", asked.append)
    with await make().acquire(ref("a")):
        assert asked == lowered
